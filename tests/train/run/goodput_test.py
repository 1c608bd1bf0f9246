"""The account of a run's time, against sums made by hand."""

import json
import pathlib

import pytest

from train.run import goodput


class Time:
  """A clock that goes on only when it is told to."""

  def __init__(self):
    self.now = 1000.0

  def time(self):
    return self.now

  def perf_counter(self):
    return self.now - 990  # another origin

  def passes(self, seconds):
    self.now += seconds


@pytest.fixture
def clock_time(monkeypatch):
  clock_time = Time()
  monkeypatch.setattr(goodput, "time", clock_time)
  return clock_time


def spent(account):
  return {cause: x for cause, x in account.seconds.items() if x}


def test_what_is_inside_counts_once(tmp_path, clock_time):
  clock = goodput.Clock(str(tmp_path), 0, began=993.0)
  with clock.spend("start"):
    clock_time.passes(1)
    with clock.spend("compile"):
      clock_time.passes(10)
    clock_time.passes(2)
  clock_time.passes(100)
  with pytest.raises(KeyError), clock.spend("data"):
    clock_time.passes(4)
    raise KeyError
  clock_time.passes(50)
  clock.note(3)
  clock_time.passes(1e6)  # a note says what was known then
  account = goodput.account(tmp_path)
  assert spent(account) == dict(start=10, compile=10, data=4, steps=150)
  assert account.wall == 174
  assert account.goodput == 150 / 174
  assert (account.kept, account.again, account.skipped) == (3, 0, 0)


def test_a_kill_costs_the_steps_since_the_checkpoint(tmp_path, clock_time):
  clock = goodput.Clock(str(tmp_path), 0)
  clock_time.passes(40)
  clock.saved(10)
  clock_time.passes(90)  # slower
  clock.note(13)
  clock_time.passes(7)  # killed; and it is a while until it starts again
  clock = goodput.Clock(str(tmp_path), 10)
  with clock.spend("restore"):
    clock_time.passes(5)
  clock_time.passes(20)
  clock.close()
  assert spent(goodput.account(tmp_path)) == dict(
    steps=40, again=90, down=7, restore=5, start=20
  )  # no step of the second attempt is known to be done
  clock_time.passes(10)
  clock.note(20)
  account = goodput.account(tmp_path)
  assert spent(account) == dict(steps=70, again=90, down=7, restore=5)
  assert (account.kept, account.again) == (20, 3)
  assert account.attempts == 2


def test_an_older_checkpoint_costs_several_attempts(tmp_path, clock_time):
  for begin, end in ((0, 20), (20, 40), (10, 30)):
    clock = goodput.Clock(str(tmp_path), begin)
    clock_time.passes(60)
    clock.note(end)
  # The first one's second half, evenly, and the second one.
  account = goodput.account(tmp_path)
  assert spent(account) == dict(steps=90, again=90)
  assert (account.kept, account.again) == (30, 30)


def test_going_back_costs_what_was_done_since(tmp_path, clock_time):
  clock = goodput.Clock(str(tmp_path), 100)
  clock_time.passes(30)
  clock.saved(110)
  clock_time.passes(12)
  clock.skipped(113)
  clock.went_back(114, 110)
  clock_time.passes(25)
  clock.saved(120)
  clock_time.passes(1)
  clock.note(121)
  account = goodput.account(tmp_path)
  assert spent(account) == dict(steps=56, again=12)
  assert (account.kept, account.again, account.skipped) == (21, 4, 0)
  # To a checkpoint of an attempt before.
  clock = goodput.Clock(str(tmp_path), 120)
  clock_time.passes(8)
  clock.went_back(122, 110)
  clock_time.passes(2)
  clock.note(111)
  account = goodput.account(tmp_path)
  assert spent(account) == dict(steps=32, again=12 + 26 + 8)
  assert (account.kept, account.again) == (11, 4 + 11 + 2)


def test_skipped_steps_are_no_progress(tmp_path, clock_time):
  clock = goodput.Clock(str(tmp_path), 0)
  clock_time.passes(10)
  for step in (2, 5):
    clock.skipped(step)
  clock.saved(5)
  clock_time.passes(9)
  clock.skipped(7)  # lost anyway
  clock.note(8)
  goodput.Clock(str(tmp_path), 5)
  account = goodput.account(tmp_path)
  assert spent(account) == dict(steps=6, skipped=4, again=9)
  assert (account.kept, account.again, account.skipped) == (3, 3, 2)


def test_reads_as_a_table(tmp_path, clock_time):
  clock = goodput.Clock(str(tmp_path), 0)
  clock_time.passes(90)
  clock.note(1200)
  clock_time.passes(5)
  clock = goodput.Clock(str(tmp_path), 1200)
  with clock.spend("compile"):
    clock_time.passes(5)
  clock.close()
  assert str(goodput.account(tmp_path)).splitlines() == [
    "goodput  90.0% of 1m40s in 2 attempts",
    "  steps kept        90.0%  1m30s  (1,200 steps)",
    "  compile            5.0%  5s",
    "  down               5.0%  5s",
  ]


BAD = {"again": -1.0}


@pytest.mark.parametrize(
  "bad",
  [
    "",
    '{"began": 10',
    "[]",
    "{}",
    "\0\0\0",
    dict(seconds=BAD),
    dict(seconds={"naps": 1.0}),
    dict(seconds=3),
    dict(step=-1),
    dict(saved=[3]),
    dict(now="late"),
    dict(now=float("nan")),
    dict(after=float("inf")),
    dict(saved=[[float("-inf"), 1.0]]),
    dict(began=10**400),
  ],
)
def test_a_damaged_attempt_is_left_out_and_told(tmp_path, clock_time, bad):
  for begin in (0, 1, 2):
    clock = goodput.Clock(str(tmp_path), begin)
    clock_time.passes(10)
    clock.note(begin + 1)
  file = tmp_path / "attempts" / "2.json"
  if isinstance(bad, dict):
    bad = json.dumps(json.loads(file.read_text()) | bad)
  file.write_text(bad)
  account = goodput.account(tmp_path)
  assert spent(account) == dict(steps=20, down=10)
  assert account.attempts == 2
  assert f"left out: {file} is damaged" in str(account)
  # It counts as an attempt: the next one is not written over it.
  goodput.Clock(str(tmp_path), 3)
  assert file.read_text() == bad
  assert (tmp_path / "attempts" / "4.json").exists()


def test_a_run_without_attempts_has_none(tmp_path):
  account = goodput.account(tmp_path)
  assert (account.attempts, account.wall, account.goodput) == (0, 0, 0)
  assert "0 attempts" in str(account)


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch, capfd):
  clock = goodput.Clock(str(tmp_path), 0)
  clock.note(1)
  file = tmp_path / "attempts" / "1.json"
  before = file.read_text()

  def full(*_, **__):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "write_text", full)
    clock.note(2)
  assert file.read_text() == before
  out = capfd.readouterr().out
  assert str(file) in out and "No space left" in out
  clock.note(3)
  assert json.loads(file.read_text())["step"] == 3


def test_one_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(goodput.processes, "is_first", lambda: False)
  clock = goodput.Clock(str(tmp_path), 0)
  with clock.spend("data"):
    clock.note(1)
  clock.close()
  assert not any(tmp_path.iterdir())
