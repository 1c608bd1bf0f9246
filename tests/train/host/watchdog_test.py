"""Processes that hang, in several ways, and some that do not."""

import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest

from train.host import watchdog

ROOT = pathlib.Path(__file__).parents[3]


def run(folder, *lines, patience=1.0):
  """The code and stderr of a program that has a `dog`, of so many seconds.

  Its own end, where it comes to one, has code 3.
  """
  program = [
    "import ctypes, os, pathlib, sys, time",
    "from train.host import watchdog",
    f"folder = pathlib.Path({str(folder)!r})",
    "def hang(seconds):",
    "  time.sleep(seconds)",
    f"dog = watchdog.Watchdog({patience}, folder)",
    *lines,
    "os._exit(3)",
  ]
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", "\n".join(program)],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stderr=subprocess.PIPE,
    text=True,
    timeout=100,
  )
  assert time.monotonic() - began < 60  # well before what hangs would end
  return done.returncode, done.stderr


def test_a_process_that_hangs_ends(tmp_path):
  folder = tmp_path / "stalls"
  code, err = run(folder, "dog.alive('step 12')", "hang(90)")
  assert code == 75
  said = re.search(r"nothing came for (\d+) s; the last was step 12\.", err)
  assert said and 1 <= int(said[1]) < 30
  assert "--resume" in err and "--guard.stall-seconds" in err
  assert "in hang" in err
  (file,) = folder.iterdir()
  assert str(file) in err
  written = file.read_text()
  assert "the last was step 12" in written
  assert "in hang" in written and "in _watch" in written  # all threads


def test_signs_of_life_keep_it(tmp_path):
  code, err = run(
    tmp_path,
    "for step in range(16):",
    "  time.sleep(0.25)",
    "  dog.alive(f'step {step}')",
    patience=3.5,  # a busy machine may leave it asleep for long
  )
  assert (code, err) == (3, "")


def test_a_pause_may_be_long(tmp_path):
  code, err = run(
    tmp_path,
    "with dog.paused():",
    "  with dog.paused():",
    "    time.sleep(0.1)",
    "  time.sleep(4)",
    "time.sleep(1)",  # it looks again, not reckoning from before the pause
    patience=3.5,
  )
  assert (code, err) == (3, "")
  code, err = run(
    tmp_path, "try:", "  with dog.paused(): 1 / 0", "except: hang(90)"
  )
  assert code == 75


def test_nothing_is_watched_after_the_end(tmp_path):
  code, err = run(tmp_path, "dog.close()", "time.sleep(3)")
  assert (code, err) == (3, "")


def test_a_file_system_that_hangs_does_not_keep_it(tmp_path):
  code, err = run(
    tmp_path,
    "watchdog._WRITE_SECONDS = 1",
    "pathlib.Path.mkdir = lambda *_, **__: time.sleep(90)",
    "hang(90)",
  )
  assert code == 75
  assert "in hang" in err


def test_a_full_disk_is_told(tmp_path):
  (tmp_path / "stalls").write_text("in the way")
  code, err = run(tmp_path / "stalls", "hang(90)")
  assert code == 75
  assert "could not be written" in err


def test_native_code_that_holds_the_interpreter_does_not_keep_it(tmp_path):
  code, err = run(tmp_path, "ctypes.PyDLL(None).sleep(90)")
  assert code == 1
  assert "Timeout" in err and "<module>" in err


def test_closes(tmp_path):
  before = threading.active_count()
  dog = watchdog.Watchdog(100, tmp_path)
  assert threading.active_count() == before + 1
  dog.close()
  assert threading.active_count() == before
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_refuses(tmp_path, seconds):
  with pytest.raises(ValueError, match="guard.stall_seconds=.*above 0"):
    watchdog.Watchdog(seconds, tmp_path)
