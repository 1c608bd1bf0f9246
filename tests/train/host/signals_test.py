"""A first signal asks a program to stop, a second one ends it."""

import os
import signal
import threading

import pytest

from train.host import program
from train.host import signals


@pytest.fixture
def ended(monkeypatch):
  """What the program would end by, and when."""
  came, event = [], threading.Event()

  def stop_at_once(signum):
    came.append(signum)
    event.set()

  monkeypatch.setattr(program, "stop_at_once", stop_at_once)
  return came, event


@pytest.mark.parametrize(
  "kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda x: x.name
)
def test_the_second_signal_ends_the_program(kind, ended, capfd):
  asked, (came, event) = [], ended
  before = signal.getsignal(kind)
  with signals.asking(lambda: asked.append(kind)):
    signal.raise_signal(kind)
    assert asked == [kind]
    signal.raise_signal(signal.SIGINT)
    assert event.wait(60)
  assert came == [signal.SIGINT]
  assert signal.getsignal(kind) == before
  assert capfd.readouterr().err.count("again: at once") == 1


def test_nothing_is_left_behind():
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  former = signal.set_wakeup_fd(writing)
  try:
    free = os.dup(reading)
    os.close(free)
    with signals.asking(lambda: pytest.fail("asked")):
      pass
    again = os.dup(reading)
    os.close(again)
  finally:
    restored = signal.set_wakeup_fd(former)
    os.close(reading)
    os.close(writing)
  assert restored == writing and again == free


def test_under_nohup_the_terminal_may_go(ended):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with signals.asking(lambda: pytest.fail("asked")):
      signal.raise_signal(signal.SIGHUP)
  finally:
    signal.signal(signal.SIGHUP, before)
  assert ended[0] == []


def test_of_several_processes_jax_hears_the_others_as_sigterm(
  monkeypatch, ended
):
  monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
  heard = []
  before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
  try:
    with signals.asking(lambda: pytest.fail("asked")):
      signal.raise_signal(signal.SIGHUP)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert heard == [True] and ended[0] == []
