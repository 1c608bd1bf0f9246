"""Lines are in their file once, whatever a disk does meanwhile."""

import contextlib
import json
import os
import random

import pytest

from train.host import json_files
from train.run import lines as lines_lib


@pytest.fixture
def disk(monkeypatch):
  """Has the next calls fail: a list of names, "" lets one pass."""
  plan = []

  def failing(name, call):
    def called(*args):
      if plan and plan.pop(0):
        if name == "pwrite" and plan:  # half of it is written
          call(args[0], args[1][: len(args[1]) // 2], args[2])
        raise OSError(28, "No space left on device")
      return call(*args)

    return called

  for name in ("pwrite", "open", "ftruncate", "fsync"):
    monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
  return plan


def opened(file):
  return lines_lib.Lines(file, lambda line: True)


def saved(file):
  return [json.loads(text) for text in file.read_text().splitlines()]


def line(step, kind="train"):
  return {"step": step, "kind": kind, "loss": "x" * (step % 7)}


def test_what_a_full_disk_does_not_take_is_written_later(
  tmp_path, disk, capsys
):
  file = tmp_path / "metrics.jsonl"
  lines = opened(file)
  lines.add(line(1))
  disk += ["pwrite", "pwrite", "pwrite"]
  for step in (2, 3, 4):
    lines.add(line(step))
  lines.add(line(5))
  lines.close()
  assert saved(file) == [line(step) for step in range(1, 6)]
  out = capsys.readouterr().out
  assert out.count("could not be written (No space left") == 1  # told once


def test_lines_that_nothing_takes_are_told(tmp_path, disk, capsys):
  lines = opened(tmp_path / "metrics.jsonl")
  disk += ["pwrite"] * 9
  lines.add(line(1))
  lines.add(line(2))
  lines.close()
  assert "2 lines of" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(30))
def test_lines_are_those_of_a_list(tmp_path, disk, seed):
  """Random additions and cuts, any of which may fail; at last all is well."""
  file, rng = tmp_path / "metrics.jsonl", random.Random(seed)
  lines, expected, step = opened(file), [], 0
  for _ in range(40):
    disk[:] = [rng.choice(("", "", "fails")) for _ in range(3)]
    match rng.randrange(5):
      case 0:
        step = rng.randint(0, step)
        stays = lambda x, to=step: x["step"] < to or x["kind"] == "eval"
        lines.keep(stays)
        expected = [x for x in expected if stays(x)]
      case 1:
        lines.sync()
      case 2:  # the process ends, and another goes on
        disk.clear()
        lines.close()
        lines = opened(file)
      case _:
        step += 1
        new = line(step, rng.choice(("train", "eval")))
        lines.add(new)
        expected.append(new)
  disk.clear()
  lines.close()
  assert saved(file) == expected


def test_half_a_line_goes_and_a_whole_one_gets_its_end(tmp_path):
  file = tmp_path / "metrics.jsonl"
  file.write_text(json.dumps(line(1)) + "\n" + json.dumps(line(2)))
  with contextlib.closing(opened(file)) as lines:
    lines.add(line(3))
  assert saved(file) == [line(1), line(2), line(3)]
  file.write_text(json.dumps(line(1)) + '\n{"step": 2, "ki')
  with contextlib.closing(opened(file)) as lines:
    lines.add(line(3))
  assert saved(file) == [line(1), line(3)]


@pytest.mark.parametrize(
  "text",
  ["{", "[]", "3", '{"step": 1}', "\0\0", "[" * 10**5],
  ids=lambda text: text[:9],
)
def test_a_malformed_line_is_named(tmp_path, text):
  file = tmp_path / "metrics.jsonl"
  file.write_text(json.dumps(line(1)) + f"\n{text}\n" + json.dumps(line(2)))
  before = file.read_bytes()
  with pytest.raises(json_files.Damaged, match=r"metrics\.jsonl, line 2"):
    opened(file)
  assert file.read_bytes() == before


@pytest.mark.parametrize(
  "garbage",
  [b"{", b"\0" * 10**5, b"\xff" * 10**5 + b"\n[]\n{", b"3\n"],
  ids=lambda garbage: f"{garbage[:9]}",
)
def test_garbage_goes_with_the_lines_that_come_again(tmp_path, garbage, capsys):
  """A power cut may leave zeros, and old blocks, after what was synced."""
  file = tmp_path / "metrics.jsonl"
  lines = [json.dumps(line(step)).encode() + b"\n" for step in (1, 2, 3)]
  file.write_bytes(lines[0] + lines[1] + garbage + b"\n" + lines[2])
  with contextlib.closing(lines_lib.Lines(file, lambda x: x["step"] < 3)) as x:
    x.add(line(3))
  assert saved(file) == [line(1), line(2), line(3)]
  out = capsys.readouterr().out
  assert "metrics.jsonl, line 3 is malformed" in out
  assert len(out) < len(str(file)) + 200
