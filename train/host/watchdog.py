"""Ends a process that hangs, so that a scheduler can start it again.

A collective whose peer is gone, a file system that does not answer: such a
process waits for ever, and holds its machines. JAX's heartbeat finds processes
that died, not those that wait.
"""

from collections.abc import Iterator
import contextlib
import faulthandler
import os
import pathlib
import socket
import threading
import time
from typing import Final

# What sysexits.h calls a temporary failure: it is worth another try.
EXIT_CODE: Final = 75

# The file system may be what hangs: the process ends after so long anyway.
_WRITE_SECONDS: Final = 20

_STDERR: Final = 2  # the file itself: Python's may be held by what hangs


class Watchdog:
  """Waits in a thread of its own for signs of life.

  Where none comes for `seconds`, it writes the stacks of all threads to the log
  and to a file, and ends the process with `EXIT_CODE`. The processes that wait
  for this one do the same, or are ended by JAX's heartbeat.

  Even the interpreter may be held, by native code that never gives it back: no
  thread of Python runs then. After twice as long, faulthandler's own thread
  writes the stacks to the log and ends the process, with code 1.
  """

  def __init__(self, seconds: int | float, folder: str | pathlib.Path):
    """Begins to watch.

    Args:
      seconds: The longest that may pass between two signs of life.
      folder: Where stacks go, RUN_DIR/stalls; made when there are some.

    Raises:
      ValueError: `seconds` is not above 0.
    """
    if not seconds > 0:
      raise ValueError(f"guard.stall_seconds={seconds} must be above 0.")
    self._seconds, self._folder = seconds, pathlib.Path(folder)
    self._pauses = 0
    self._closed = threading.Event()
    self.alive("the start")
    self._thread = threading.Thread(
      target=self._watch, name="watchdog", daemon=True
    )
    self._thread.start()

  def alive(self, what: str) -> None:
    """A sign of life: `what` is done. Takes no time to speak of."""
    self._last = time.monotonic(), what

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Inside, what takes long does so rightly, such as compiling."""
    self._pauses += 1
    try:
      yield
    finally:
      self.alive(self._last[1])
      self._pauses -= 1

  def close(self) -> None:
    """Ends the watch."""
    self._closed.set()
    self._thread.join()
    faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    while True:
      # Put off at each turn, for as long as Python's threads do run.
      faulthandler.dump_traceback_later(
        2 * self._seconds, exit=True, file=_STDERR
      )
      since, what = self._last
      silent = 0 if self._pauses else time.monotonic() - since
      if silent >= self._seconds:
        self._end(silent, what)
      left = self._seconds - silent
      if self._closed.wait(min(left, self._seconds / 4)):
        return

  def _end(self, silent: int | float, what: str) -> None:
    late = threading.Timer(_WRITE_SECONDS, os._exit, [EXIT_CODE])
    late.daemon = True
    late.start()
    name = f"{socket.gethostname()}-{os.getpid()}.txt"
    file = self._folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    text = (
      f"stalled: nothing came for {silent:.0f} s; the last was {what}. This"
      f" process ends with code {EXIT_CODE}: the scheduler should start the"
      " same command again, with --resume. If steps really take that long,"
      " raise --guard.stall-seconds. All threads' stacks follow, and are in"
      f" {file}.\n"
    )
    os.write(_STDERR, text.encode())
    faulthandler.dump_traceback(_STDERR)
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      with file.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        faulthandler.dump_traceback(out)
    except OSError as e:
      os.write(_STDERR, f"{file} could not be written: {e}\n".encode())
    os._exit(EXIT_CODE)
