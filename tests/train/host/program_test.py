"""Programs print whatever there is to whatever takes it, and end at once."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[3]


def start(body, shell="", **kwargs):
  """A program; `body` follows its beginning. A shell execs it, as `shell`."""
  options: dict[str, Any] = dict(
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  code = "from train.host import program\nprogram.begin()\n" + body
  command = ["sh", "-c", shell or 'exec "$@"', "sh", sys.executable, "-c", code]
  return subprocess.Popen(command, **options | kwargs)


def ended(body, shell="", **kwargs) -> tuple[int, Any, Any]:
  """What it ends with, and what it said."""
  process: Any = start(body, shell, **kwargs)
  out, err = process.communicate(timeout=60)
  return process.returncode, out and out.decode("latin-1"), err.decode()


SAMPLE = r"print('a\ufffdb\u00e9\ud800\0')"


@pytest.mark.parametrize(
  ("encoding", "shown"),
  [
    ("ascii", r"a\ufffdb\xe9\ud800" + "\0\n"),
    ("latin-1", "a\\ufffdb\xe9\\ud800\0\n"),
    ("utf-8", "a\xef\xbf\xbdb\xc3\xa9\\ud800\0\n"),
    ("cp1252", "a\\ufffdb\xe9\\ud800\0\n"),
  ],
)
def test_any_character_can_be_printed(encoding, shown):
  variables = {**os.environ, "PYTHONIOENCODING": encoding}
  assert ended(SAMPLE, env=variables) == (0, shown, "")


GOES_ON = """
import sys
def main():
  for i in range(9):
    print(i, flush=True)
  print("went on", file=sys.stderr)
program.run(main)
"""


def test_a_full_disk_takes_no_output_and_ends_nothing():
  with open("/dev/full", "wb") as full:
    code, _, err = ended(GOES_ON, stdout=full)
  assert code == 0
  first, second = err.splitlines()  # told once
  assert "standard output" in first and "No space left" in first
  assert second == "went on"


def test_a_disk_that_is_full_again_is_told_again():
  code, out, err = ended("""
import os
full, free = os.open("/dev/full", os.O_WRONLY), os.dup(1)
for to in (full, full, free, free, full, free):
  os.dup2(to, 1)
  print("x")
""")
  assert (code, out) == (0, "x\nx\nx\n")
  assert err.count("WARNING: standard output") == len(err.splitlines()) == 2


def test_a_reader_that_goes_ends_nothing():
  reading, writing = os.pipe()
  os.close(reading)
  code, _, err = ended(GOES_ON, stdout=writing)
  os.close(writing)
  assert code == 0
  assert "Broken pipe" in err and err.endswith("went on\n")


@pytest.mark.parametrize("closed", [1, 2])
def test_closed_streams_are_no_files_of_the_run(tmp_path, closed):
  file = tmp_path / "metrics.jsonl"
  body = f"""
out = open({str(file)!r}, "wb")
assert out.fileno() > 2
import sys
print("said"), print("said", file=sys.stderr), out.write(b"line")
"""
  process = start(body, f'exec "$@" {closed}>&-')
  process.communicate(timeout=60)
  assert process.returncode == 0
  assert file.read_bytes() == b"line"


SWALLOWS = """
import signal, sys, time
print("ready", flush=True)
while True:
  try:
    {}
  except BaseException:
    pass
"""


@pytest.mark.parametrize(
  "doing", ["time.sleep(60)", "import nothing_of_this_name", "pass"]
)
def test_ctrl_c_is_never_swallowed(doing):
  process = start(SWALLOWS.format(doing))
  try:
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert (process.returncode, err) == (130, b"\nstopped by SIGINT\n")


def test_last_words_wait_for_no_reader():
  """Such as a pager that is not scrolled: the pipe is full."""
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  with contextlib.suppress(BlockingIOError):
    while True:
      os.write(writing, b"x")
  os.set_blocking(writing, True)
  process = start(SWALLOWS.format("time.sleep(60)"), stderr=writing)
  try:
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
  finally:
    process.kill()
    process.communicate()
    os.close(reading)
    os.close(writing)


def test_an_ignored_signal_stays_ignored():
  body = "import signal\nsignal.raise_signal(signal.SIGINT)\nprint('on')"
  ignoring = "trap '' INT; exec \"$@\""
  assert ended(body, ignoring) == (0, "on\n", "")


@pytest.mark.parametrize(
  ("ending", "code", "says"),
  [
    ("pass", 0, ""),
    ("sys.exit(3)", 3, ""),
    ("sys.exit('error: why')", 1, "error: why\n"),
    ("raise ValueError('why')", 1, "ValueError: why\n"),
  ],
)
def test_nothing_in_the_background_holds_the_end_up(ending, code, says):
  body = f"""
import sys, threading
from concurrent import futures
def main():
  threading.Thread(target=threading.Event().wait).start()
  futures.ThreadPoolExecutor().submit(threading.Event().wait)
  print("said", end="")
  {ending}
program.run(main)
"""
  found, out, err = ended(body)
  assert (found, out) == (code, "said")
  assert err.endswith(says) and bool(err) == bool(says)


def test_last_words_are_a_line_that_a_terminal_does_not_obey():
  says = r"'error: a\nb\r\x1b[31m\u202e \udcff \u00e9'"
  body = f"import sys\nprogram.run(lambda: sys.exit({says}))"
  code, _, err = ended(body)
  assert (code, err) == (1, "error: a\\nb\\r\\x1b[31m\\u202e \\udcff \u00e9\n")
