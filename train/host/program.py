"""How a program begins and ends: its streams, Ctrl-C, its exit code.

`begin` is called before the imports that take seconds; so little is imported
here.
"""

import atexit
from collections.abc import Callable
import io
import os
import select
import signal
import sys
import traceback
from typing import Any, Final, NoReturn, TextIO

_PATIENCE_SECONDS: Final = 1
_NAMES: Final = {1: "standard output", 2: "standard error"}


class _Lasting(io.RawIOBase):
  """A standard stream to which writing never fails.

  Where a reader is gone (`| head`) or the disk is full, that is told once, by
  the other stream; what cannot be written is lost, and the next is tried.
  """

  def __init__(self, descriptor: int):
    self._descriptor, self._failing = descriptor, False

  def fileno(self) -> int:
    return self._descriptor

  def isatty(self) -> bool:
    return os.isatty(self._descriptor)

  def writable(self) -> bool:
    return True

  def write(self, data: Any) -> int:
    try:
      count = os.write(self._descriptor, data)
    except OSError as e:
      self._tell(e)
      return len(data)
    self._failing = False
    return count

  def _tell(self, e: OSError) -> None:
    if self._failing:
      return
    self._failing = True
    text = (
      f"WARNING: {_NAMES[self._descriptor]} cannot be written to "
      f"({e.strerror}); the program goes on without.\n"
    )
    say(text, 3 - self._descriptor)


def say(text: str, descriptor: int = 2) -> None:
  """Writes to a standard stream at once, from any thread or signal handler.

  A full pipe that nobody reads, or a terminal that is held, is not waited for.
  """
  try:
    if select.select([], [descriptor], [], _PATIENCE_SECONDS)[1]:
      os.write(descriptor, text.encode(errors="backslashreplace"))
  except OSError:
    pass  # nobody listens


def begin() -> None:
  """Sets the streams and Ctrl-C up.

  What is printed never fails: characters that a stream's encoding lacks are
  shown as \\xNN, and a stream that is closed or full is gone on without. Ctrl-C
  ends the program at once, with a line and code 130, until something else is
  done on it, see `signals`.
  """
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:  # closed; the next file opened would take its place
      os.open(os.devnull, os.O_RDWR)
  sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, stop_at_once)


def stop_at_once(signum: int, frame: Any = None) -> NoReturn:
  """Ends the program; a signal handler.

  No exception: an import, or a library that calls back, might swallow it.
  """
  del frame
  say(f"\nstopped by {signal.Signals(signum).name}\n")
  os._exit(128 + signum)


def run(main: Callable[[], None]) -> NoReturn:
  """Calls `main` and ends with its exit code.

  What libraries have left in the background is not waited for: threads of a
  save that failed would hold the program up for minutes.
  """
  code = 1
  try:
    main()
    code = 0
  except SystemExit as e:
    code = _code(e)
  except BaseException:
    traceback.print_exc()
  sys.stdout.flush()
  atexit._run_exitfuncs()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _stream(descriptor: int, before: TextIO | None) -> TextIO:
  if before is not None:
    before.flush()
  return io.TextIOWrapper(
    io.BufferedWriter(_Lasting(descriptor)),
    encoding=before.encoding if before is not None else "utf-8",
    errors="backslashreplace",
    line_buffering=True,
  )


def _code(e: SystemExit) -> int:
  """The exit code; a text is printed and gives 1, as in Python.

  In one line that a terminal shows, and obeys none of: it may hold what others
  have called their files.
  """
  if isinstance(e.code, int):
    return e.code
  if e.code is None:
    return 0
  shown = (x if x.isprintable() else repr(x)[1:-1] for x in str(e.code))
  print("".join(shown), file=sys.stderr)
  return 1
