"""Signals that ask a program to stop: the first time soon, then at once."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import signal
import threading
from typing import Any, Final

import jax

from train.host import program

# From a terminal (Ctrl-C, or its end), or from a scheduler.
_KINDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def asking(stop: Callable[[], None]) -> Iterator[None]:
  """Inside, the first signal calls `stop`, and a second one ends the program.

  A signal that is ignored stays so (SIGHUP under nohup). In one of several
  processes JAX hears SIGTERM, and makes all agree on a step: there the others
  become SIGTERM, and `stop` is not called.

  That a signal came is told, and the second obeyed, by a thread: the main one
  may be compiling for minutes.
  """
  alone = jax.process_count() == 1
  kinds = [
    kind
    for kind in _KINDS
    if signal.getsignal(kind) != signal.SIG_IGN
    and (alone or kind != signal.SIGTERM)
  ]
  ask = stop if alone else lambda: os.kill(os.getpid(), signal.SIGTERM)

  def handle(signum: int, frame: Any) -> None:
    del signum, frame
    ask()

  with _told(kinds):
    before = {kind: signal.signal(kind, handle) for kind in kinds}
    try:
      yield
    finally:
      for kind, former in before.items():
        signal.signal(kind, former)


@contextlib.contextmanager
def _told(kinds: list[signal.Signals]) -> Iterator[None]:
  """Inside, a thread tells of the first of these, and ends all at another."""
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  thread = threading.Thread(
    target=_listen, args=(reading, kinds), name="signals", daemon=True
  )
  thread.start()
  before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(writing)
    thread.join()
    os.close(reading)


def _listen(reading: int, kinds: list[signal.Signals]) -> None:
  asked = False
  while number := os.read(reading, 1):  # empty once nobody writes any more
    if number[0] not in kinds:
      continue
    if asked:
      program.stop_at_once(number[0])
    else:
      program.say("stopping after this step (again: at once)\n")
    asked = True
