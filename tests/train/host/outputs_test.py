"""What a run writes for people may fail, and is told once."""

import pytest

from train.host import outputs
from train.host import processes


def test_a_failure_is_told_once_until_it_works_again(capsys):
  output, works = outputs.Output("notes.txt"), iter((0, 0, 1, 0))
  for works_now in works:
    with output.attempt():
      if not works_now:
        raise OSError(5, "Input/output error")
  out = capsys.readouterr().out.splitlines()
  assert (
    out
    == [
      "WARNING: notes.txt could not be written (Input/output error); training "
      "goes on"
    ]
    * 2
  )


def test_other_errors_leave_unless_named(capsys):
  output = outputs.Output("notes.txt")
  with pytest.raises(RuntimeError):
    with output.attempt():
      raise RuntimeError("why")
  with output.attempt(RuntimeError):
    raise RuntimeError("why")
  assert "RuntimeError('why')" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("a\n\tb é ☃ \ufffd", "a\n\tb é ☃ \ufffd"),
    ("\x1b[2J\x07", r"\x1b[2J\x07"),
    ("a\rb\0\x7f\x9b", r"a\x0db\x00\x7f\x9b"),
    ("\u2028\u202e\u2066", r"\u2028\u202e\u2066"),
    ("\ud800\udfff", r"\ud800\udfff"),
  ],
)
def test_text_is_shown_and_not_obeyed(tmp_path, capsys, text, shown):
  with processes.log_to(tmp_path / "log.txt"):
    processes.say(text)
  assert capsys.readouterr().out == shown + "\n"
  logged = (tmp_path / "log.txt").read_text("utf-8").splitlines()
  assert [x.partition("Z ")[2] for x in logged] == [
    x.rstrip() for x in shown.split("\n")
  ]


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, capsys):
  with processes.log_to(tmp_path / "no folder" / "log.txt"):
    processes.say("one")
    processes.say("two")
  out, err = capsys.readouterr()
  assert out == "one\ntwo\n" and err.count("log.txt could not be written") == 1
