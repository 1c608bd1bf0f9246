"""Kills a run again and again, and compares what comes of it.

python -m tests.faults.kills --kills=60 --seed=0 --processes=both

Each run is killed at random moments and started again by the same command
until it ends by itself; then it must equal a run that nobody killed, bit for
bit. Runs follow each other until there were enough kills. Exits with 1 if
anything differs, or any attempt ended with an error of its own.
"""

import collections
import dataclasses
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from typing import Final, Literal

import jax
import tyro

from tests.faults import attempt as attempt_lib
from tests.faults import comparison

type Aim = Literal["life", "save", "commit", "open"]

# What the kills aim at, by turns; signals alternate, and an odd number of aims
# has every aim meet both.
_AIMS: Final[tuple[Aim, ...]] = (
  *("life", "save", "commit", "life", "open", "save", "life"),
)
_SIGNALS: Final = (signal.SIGKILL, signal.SIGTERM)
# Steps between an attempt's checkpoints: saves apart, and saves that follow
# each other as closely as can be.
_EVERY: Final = (4, 1)


@dataclasses.dataclass(frozen=True)
class Kills:
  """What to kill, and how often."""

  kills: int = 60
  """Attempts to kill, at least, of runs with each number of processes."""
  seed: int = 0
  """Of the moments, and of the processes that are hit."""
  processes: Literal["1", "2", "both"] = "1"
  """How many a run has."""
  stages: tuple[str, ...] = attempt_lib.STAGES
  """Kinds of a run's stages, of these."""
  work: pathlib.Path | None = None
  """Where the runs go, and stay; by default a temporary folder, which stays
  where something failed."""

  def __post_init__(self):
    if self.kills < 1:
      raise ValueError(f"{self.kills=} must be at least 1.")


@dataclasses.dataclass
class Tally:
  """What happened to the runs with one number of processes."""

  processes: int
  stages: tuple[str, ...]
  runs: int = 0
  attempts: int = 0
  sent: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  phases: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  repeated: int = 0
  """Steps that were trained again."""
  failures: list[str] = dataclasses.field(default_factory=list)

  @property
  def kills(self) -> int:
    return sum(self.sent.values())


class Killer:
  """Draws moments, waits for them, and strikes."""

  def __init__(self, seed: int, life: float):
    """`life`: seconds that an attempt takes from beginning to end."""
    self._random, self._life, self._turn = random.Random(seed), life, 0

  def options(self) -> tuple[str, ...]:
    """Of the next attempt."""
    return (f"--checkpoint.every={self._random.choice(_EVERY)}",)

  def strike(self, attempt: attempt_lib.Attempt) -> tuple[str, str, list[int]]:
    """Kills, unless the attempt ends before.

    Returns:
      The signal's name, or "" where there was nothing left to kill; the aim
      and what the attempt was doing; and the processes that were hit.
    """
    aim = _AIMS[self._turn % len(_AIMS)]
    kind = _SIGNALS[self._turn % len(_SIGNALS)]
    count = len(attempt.processes)
    victims = self._random.choice([[0], [count - 1], [*range(count)]])
    if not self._await(aim, attempt):
      return "", "", []
    self._turn += 1
    during = f"{aim}: {attempt.phase()}"
    attempt.send(kind, victims)
    return kind.name, during, victims

  def _await(self, aim: Aim, attempt: attempt_lib.Attempt) -> bool:
    """Sleeps until the moment has come; False if the attempt ended before."""
    draw = self._random
    if aim == "life":
      moment = draw.uniform(0, self._life)
      return _until(attempt, lambda: attempt.age > moment)
    if aim == "open":  # the folder is made, or its files are written anew
      file = attempt.run_dir / draw.choice(
        ["", "checkpoints", "config.json", "metrics.jsonl"]
      )
      before = _changed(file)
      return _until(attempt, lambda: _changed(file) != before)
    seen: set[str] = set()
    number = draw.randint(1, 8)

    def begun():
      seen.update(attempt_lib.saving(attempt.run_dir))
      return len(seen) >= number

    # Folders that an earlier attempt left behind do not count.
    number += len(attempt_lib.saving(attempt.run_dir))
    if not _until(attempt, begun):
      return False
    if aim == "commit":
      return _until(attempt, lambda: not attempt_lib.saving(attempt.run_dir))
    moment = attempt.age + draw.uniform(0, 0.2)
    return _until(attempt, lambda: attempt.age > moment)


def _until(attempt: attempt_lib.Attempt, come) -> bool:
  while attempt.lives():
    if come():
      return True
    time.sleep(0.002)
  return False


def _changed(file: pathlib.Path) -> int:
  try:
    return file.stat().st_mtime_ns
  except FileNotFoundError:
    return 0


def check_end(codes: list[int], sent: str, victims: list[int]) -> str:
  """Why an attempt should not have ended so; "" if it may.

  Of those that were hit, by the signal or, asked to stop, with 0. Others may
  end as they like once a process has died; if none has, they stop with it.
  """
  died = -signal.Signals[sent] if sent else None
  fell = any(codes[i] == died for i in victims)
  for i, code in enumerate(codes):
    ends = {0, died} if i in victims else {0}
    if code not in ends and not (fell and i not in victims):
      return f"process {i} ended with {code}; {sent} to {victims}, all: {codes}"
  return ""


def check_batches(
  batches: list[tuple[str, ...]], unbroken: list[tuple[str, ...]], newest: int
) -> str:
  """Whether the batches are those after step `newest`, in order; "" if so."""
  if batches == unbroken[newest : newest + len(batches)]:
    return ""
  first = unbroken.index(batches[0]) if batches[0] in unbroken else "no step"
  return (
    f"the newest checkpoint was {newest}, but the {len(batches)} batches are "
    f"not those that follow it; the first is that after {first}"
  )


def run_once(
  work: pathlib.Path, killer: Killer, tally: Tally, kills: int
) -> None:
  """One run to its end, killed until there were `kills` of all runs."""
  name = f"killed_{tally.processes}_{tally.runs}"
  unbroken = f"unbroken_{tally.processes}"
  expected = _read(work, unbroken)
  tally.runs += 1
  reached, number = 0, 0
  while True:
    options = killer.options()
    attempt = attempt_lib.Attempt(
      work, name, number, tally.processes, tally.stages, options
    )
    number, tally.attempts = number + 1, tally.attempts + 1
    sent, during, victims = "", "", []
    if tally.kills < kills:
      sent, during, victims = killer.strike(attempt)
    codes = attempt.end() if sent else attempt.end_by_itself()
    batches = attempt.batches()
    failure = check_end(codes, sent, victims)
    if batches and not failure:
      failure = check_batches(batches, expected, attempt.newest)
    trained = attempt.newest + len(batches)
    tally.repeated += max(0, min(reached, trained) - attempt.newest)
    reached = max(reached, trained)
    if sent:
      tally.sent[sent] += 1
      tally.phases[during] += 1
    print(
      f"{name}.{number - 1:<3} from {attempt.newest:>2}, read to {trained:>2}, "
      f"{attempt.seconds:5.1f} s | "
      f"{sent or 'ended by itself':<8} {during} {victims or ''} -> {codes}"
      f"{' | FAILED' if failure else ''}",
      flush=True,
    )
    if failure:
      tally.failures.append(f"{name}.{number - 1}: {failure}\n{attempt.tail()}")
      return
    if not sent:
      break
  folders = work / name, work / unbroken
  found = comparison.differences(*folders)
  tally.failures += [f"{name}: {difference}" for difference in found]
  print(f"{name}: {len(found)} differences", flush=True)
  if not found:
    shutil.rmtree(folders[0])


def _read(work: pathlib.Path, run: str) -> list[tuple[str, ...]]:
  """The batches of a run of one attempt, as it noted them."""
  files = sorted((work / f"{run}.logs").glob("*.batches"))
  return list(zip(*(file.read_text().splitlines() for file in files)))


def prove(
  work: pathlib.Path,
  kills: int,
  seed: int,
  processes: int,
  stages: tuple[str, ...] = attempt_lib.STAGES,
) -> Tally:
  """Makes the run that nobody kills, then kills others."""
  attempt_lib.make_work(work)
  tally = Tally(processes, stages)
  life = 0.0
  # The first one compiles; how long an attempt lives, the second one tells.
  names = f"compiling_{processes}", f"unbroken_{processes}"
  for name in names:
    attempt = attempt_lib.Attempt(work, name, 0, processes, stages)
    codes = attempt.end_by_itself()
    life = attempt.seconds
    if any(codes):
      tally.failures.append(f"{name} failed:\n{attempt.tail()}")
      return tally
    print(f"{name}: {life:.0f} s, {len(attempt.batches())} batches", flush=True)
  # If these two differ, nothing can be said of others.
  found = comparison.differences(*(work / name for name in names))
  tally.failures += [f"{names[0]}: {difference}" for difference in found]
  killer = Killer(seed, life)
  while tally.kills < kills:
    run_once(work, killer, tally, kills)
  return tally


def table(tallies: list[Tally]) -> str:
  """What was done, a row for each number of processes; then each failure."""
  head = (
    "processes | runs | attempts | SIGKILL | SIGTERM | steps again | failed"
  )
  rows = [
    f"{t.processes:9} | {t.runs:4} | {t.attempts:8} | {t.sent['SIGKILL']:7} | "
    f"{t.sent['SIGTERM']:7} | {t.repeated:11} | {len(t.failures):6}"
    for t in tallies
  ]
  phases = sum((t.phases for t in tallies), collections.Counter())
  struck = [f"  {n:4} {during}" for during, n in sorted(phases.items())]
  failures = [f"FAILED {failure}" for t in tallies for failure in t.failures]
  return "\n".join(
    [head, *rows, "struck (aim: what it was doing):", *struck, *failures]
  )


def main() -> None:
  args = tyro.cli(Kills, description=__doc__)
  jax.config.update("jax_platforms", "cpu")
  work = args.work or pathlib.Path(tempfile.mkdtemp(prefix="kills_"))
  counts = (1, 2) if args.processes == "both" else (int(args.processes),)
  tallies = [prove(work, args.kills, args.seed, n, args.stages) for n in counts]
  print(table(tallies))
  if any(tally.failures for tally in tallies):
    sys.exit(f"Something failed; all of it is in {work}.")
  if not args.work:
    shutil.rmtree(work)


if __name__ == "__main__":
  main()
