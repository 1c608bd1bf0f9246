"""Where the time of a run goes, over all its attempts.

A run may be killed and resumed many times, on many hosts. Each start is an
attempt, and RUN_DIR/attempts/N.json says where its time went. Goodput is the
share of all time, that between attempts included, that went into steps which
the run kept.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import math
import pathlib
import time
from typing import Final, Literal

import numpy as np

from dsa_jax import ranges
from train.host import atomic_files
from train.host import json_files
from train.host import outputs
from train.host import processes
from train.run import metrics as metrics_lib

type Cause = Literal[
  "start", "restore", "compile", "data", "checkpoint", "evaluation", "sample"
]

# What a table calls them, in its order.
_TITLES: Final = {
  "steps": "steps kept",
  "again": "steps done again",
  "skipped": "steps skipped",
  "start": "start",
  "restore": "restore",
  "compile": "compile",
  "data": "wait for data",
  "checkpoint": "checkpoint",
  "evaluation": "evaluation",
  "sample": "sample",
  "down": "down",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
  """One attempt, up to its last note. Times are Unix seconds."""

  began: float
  now: float
  after: int
  """The step that it began after."""
  step: int
  """The newest step."""
  saved: list[tuple[int, float]]
  """The steps that it saved, and the seconds of steps that had passed."""
  skipped: list[int]
  """The steps that changed nothing, because a guard said so."""
  again: int
  """Steps that were thrown away when the loop went back."""
  seconds: dict[str, float]
  """By cause; "steps" are those that stand, "again" those thrown away."""

  @classmethod
  def read(cls, file: pathlib.Path) -> "Attempt":
    """Raises a ValueError that names the file where it is damaged."""
    try:
      x = json_files.read(file)
      attempt = cls(
        began=float(x["began"]),
        now=float(x["now"]),
        after=int(x["after"]),
        step=int(x["step"]),
        saved=[(int(step), float(seconds)) for step, seconds in x["saved"]],
        skipped=[int(step) for step in x["skipped"]],
        again=int(x["again"]),
        seconds={k: float(v) for k, v in x["seconds"].items()},
      )
      times = [attempt.began, attempt.now, *attempt.seconds.values()]
      if not all(map(math.isfinite, times)) or min(times) < 0:
        raise ValueError("a time is negative, or no number")
      if (
        attempt.step < attempt.after
        or not attempt.seconds.keys() <= _TITLES.keys()
      ):
        raise ValueError("its steps or causes are none")
    except json_files.Damaged:
      raise
    except (
      *(ValueError, TypeError, KeyError, AttributeError),
      OverflowError,  # of infinity, or of 400 digits
    ) as e:
      raise ValueError(f"{file} is damaged: {ranges.shown(e)}.") from e
    return attempt

  def seconds_until(self, step: int) -> float:
    """Seconds of steps up to one; between two that were saved, evenly."""
    known = [(self.after, 0.0), *self.saved]
    known.append((self.step, self.seconds.get("steps", 0.0)))
    steps, seconds = zip(*known)
    return float(np.interp(step, steps, seconds))


class Clock:
  """Times this attempt, in the main thread; the first process writes it down.

  Nothing waits for a device. What is in no `spend` counts as steps.
  """

  def __init__(self, run_dir: str, step: int, *, began: float | None = None):
    """Begins an attempt.

    Args:
      run_dir: The run's folder.
      step: The last one that is done already.
      began: When the program did, in unix seconds, if not just now; what has
        passed since then counts as "start".
    """
    now = time.time()
    self._began = now if began is None else began
    self._after = self._step = step
    self._saved: list[tuple[int, float]] = []
    self._skipped: list[int] = []
    self._again = 0
    self._seconds = {"start": max(now - self._began, 0.0), "steps": 0.0}
    self._causes = ["steps"]  # the innermost one last
    self._since = time.perf_counter()
    self._file = None
    if processes.is_first():
      folder = pathlib.Path(run_dir) / "attempts"
      self._file = folder / f"{1 + max(_files(folder), default=0)}.json"
    self._output = outputs.Output(str(self._file))
    self._write()

  @contextlib.contextmanager
  def spend(self, cause: Cause) -> Iterator[None]:
    """Charges the time inside to `cause`, except for a nested `spend`."""
    self._charge()
    self._causes.append(cause)
    try:
      yield
    finally:
      self._charge()
      self._causes.pop()

  def note(self, step: int) -> None:
    """`step` is done; writes down all that is known."""
    self._step = step
    self._charge()
    self._write()

  def saved(self, step: int) -> None:
    """A checkpoint of `step` has been asked for: a place to go on from."""
    self._step = step
    self._charge()
    self._saved.append((step, self._seconds["steps"]))
    self._write()

  def skipped(self, step: int) -> None:
    """A guard found `step` bad, and let it change nothing."""
    self._skipped.append(step)

  def went_back(self, step: int, to: int) -> None:
    """After `step`, the loop goes back to the checkpoint of step `to`."""
    self._step = step
    self._charge()
    kept = self._attempt().seconds_until(to)
    lost = self._seconds["steps"] - kept
    self._seconds["again"] = self._seconds.get("again", 0.0) + lost
    self._seconds["steps"] = kept
    self._again += step - max(to, self._after)
    self._saved = [mark for mark in self._saved if mark[0] <= to]
    self._skipped = [skipped for skipped in self._skipped if skipped <= to]
    # If it is one of an attempt before, that one's later steps are lost too.
    self._after = min(self._after, to)
    self._step = to
    self._write()

  def close(self) -> None:
    """The last note."""
    self.note(self._step)

  def _charge(self) -> None:
    now, cause = time.perf_counter(), self._causes[-1]
    spent = self._seconds.get(cause, 0.0) + now - self._since
    self._seconds[cause], self._since = spent, now

  def _attempt(self) -> Attempt:
    return Attempt(
      began=self._began,
      now=time.time(),
      after=self._after,
      step=self._step,
      saved=self._saved,
      skipped=self._skipped,
      again=self._again,
      seconds=self._seconds,
    )

  def _write(self) -> None:
    if self._file is None:
      return
    text = json.dumps(dataclasses.asdict(self._attempt()))
    with self._output.attempt():
      self._file.parent.mkdir(exist_ok=True)
      atomic_files.write(self._file, text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
  """Where the time of a run went."""

  attempts: int
  """Those that could be read."""
  kept: int
  """Steps that made the model what it is."""
  again: int
  """Steps thrown away: done after the checkpoint that the run went on from."""
  skipped: int
  """Steps that changed nothing."""
  seconds: dict[str, float]
  """By cause: "steps" (kept), "again", "skipped", "down" (from the last note of
  an attempt to the next one's beginning), and those of `Clock.spend`."""
  damaged: tuple[str, ...]
  """Problems of attempts that are left out; their time counts as "down"."""

  @property
  def wall(self) -> float:
    """Seconds, all in all."""
    return sum(self.seconds.values())

  @property
  def goodput(self) -> float:
    """Share of the time that went into steps which were kept."""
    return self.seconds["steps"] / max(self.wall, 1e-9)

  def __str__(self) -> str:
    """A line for each cause, after one for all."""
    counts = {"steps": self.kept, "again": self.again, "skipped": self.skipped}
    lines = [
      f"goodput  {self.goodput:.1%} of {metrics_lib.duration(self.wall)} in"
      f" {self.attempts} attempt{'s' * (self.attempts != 1)}"
    ]
    for cause, title in _TITLES.items():
      seconds, count = self.seconds[cause], counts.get(cause, 0)
      if seconds or count:
        share = seconds / max(self.wall, 1e-9)
        steps = f"  ({count:,} steps)" if cause in counts else ""
        lines.append(
          f"  {title:<16} {share:>6.1%}  {metrics_lib.duration(seconds)}{steps}"
        )
    lines += [f"  left out: {what}" for what in self.damaged]
    return "\n".join(lines)


def account(run_dir: str | pathlib.Path) -> Account:
  """Adds all attempts of a run up, the one that is running included.

  What an attempt did after its last note is not known, and counts as "down".
  """
  attempts, damaged = [], []
  for _, file in sorted(_files(pathlib.Path(run_dir) / "attempts").items()):
    try:
      attempts.append(Attempt.read(file))
    except ValueError as e:
      damaged.append(str(e))
  seconds: dict[str, float] = dict.fromkeys(_TITLES, 0.0)
  counts = dict(kept=0, again=0, skipped=0)
  for one, other in zip(attempts, attempts[1:]):
    # Clocks of several hosts may differ.
    seconds["down"] += max(other.began - one.now, 0.0)
  limit: int | float = math.inf  # no later attempt went on from after this step
  for attempt in reversed(attempts):
    _add(attempt, limit, seconds, counts)
    limit = min(limit, attempt.after)
  return Account(
    attempts=len(attempts), seconds=seconds, damaged=tuple(damaged), **counts
  )


def was_saved(run_dir: str | pathlib.Path) -> bool:
  """Whether some attempt says that there was a checkpoint of the run.

  It went on from one, or saved again: the first is waited for.
  """
  for file in _files(pathlib.Path(run_dir) / "attempts").values():
    try:
      attempt = Attempt.read(file)
    except ValueError:
      continue
    if attempt.after > 0 or len(attempt.saved) > 1:
      return True
  return False


def _add(
  attempt: Attempt,
  limit: int | float,
  seconds: dict[str, float],
  counts: dict[str, int],
) -> None:
  """Adds an attempt of which nothing after step `limit` was kept."""
  for cause, spent in attempt.seconds.items():
    if cause != "steps":
      seconds[cause] += spent
  spent = attempt.seconds.get("steps", 0.0)
  if attempt.step == attempt.after:  # it did not get as far as a step
    seconds["start"] += spent
    counts["again"] += attempt.again
    return
  end = int(max(min(attempt.step, limit), attempt.after))
  until = attempt.seconds_until(end)
  done = end - attempt.after
  skipped = sum(step <= end for step in attempt.skipped)
  wasted = until * skipped / max(done, 1)
  seconds["steps"] += until - wasted
  seconds["skipped"] += wasted
  seconds["again"] += spent - until
  counts["kept"] += done - skipped
  counts["skipped"] += skipped
  counts["again"] += attempt.again + attempt.step - end


def _files(folder: pathlib.Path) -> dict[int, pathlib.Path]:
  """The attempts in a folder, by number."""
  files = folder.glob("*.json")
  return {int(x.stem): x for x in files if x.stem.isdecimal()}
