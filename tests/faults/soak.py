"""Keeps one run alive through a fault a minute, and watches its memory.

python -m tests.faults.soak --minutes=30

The run is started again whenever it ends, by the same command, until the time
is over. Three minutes of every four pass without a kill, so that attempts last
long enough to show a leak. Exits with 1 if an attempt ended with an error of
its own, a step that was trained twice came out differently, or memory grew.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import itertools
import json
import pathlib
import random
import signal
import time
from typing import Final, Literal

import tyro

from tests.faults import attempt as attempt_lib
from train.run import goodput

type Name = Literal[
  "nothing", "poison", "SIGTERM", "SIGKILL", "truncated", "flipped"
]

# Short stages first, then one that outlasts any soak.
_BEFORE: Final = 40  # steps of the short ones
_OPTIONS: Final = (
  f"--stages.0.steps={_BEFORE // 2}",
  f"--stages.1.steps={_BEFORE // 2}",
  "--stages.2.steps=10000000",
  "--checkpoint.every=25",
  "--log.eval-every=500",
)
_QUIET: Final = 3  # faults that do not kill, between two that do
_GROWTH: Final = 0.05  # of resident memory, after warm-up
# Memory counts from so long after an attempt's 10th step in the last stage: all
# is compiled and caches are full by then.
_WARM_SECONDS: Final = 30
# An attempt shows a leak, or none, if it was watched for so long.
_WATCH_SECONDS: Final = 90
_HOPELESS: Final = 3  # attempts in succession that end without a fault


@dataclasses.dataclass(frozen=True)
class Fault:
  """Something that happens to a run.

  `signal` ends the attempt, if there is one; `harm` then gets the newest
  checkpoint, or, of a run that lives on, the harness's folder.
  """

  signal: signal.Signals | None
  harm: Callable[[pathlib.Path], object]


def _truncate(checkpoint: pathlib.Path) -> None:
  """Cuts the largest file of the checkpoint in half."""
  file = _largest(checkpoint)
  with file.open("r+b") as content:
    content.truncate(file.stat().st_size // 2)


def _flip(checkpoint: pathlib.Path) -> None:
  """Flips a bit in the middle of its largest file."""
  file = _largest(checkpoint)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def _largest(folder: pathlib.Path) -> pathlib.Path:
  files = (p for p in folder.rglob("*") if p.is_file())
  return max(files, key=lambda p: p.stat().st_size)


_FAULTS: Final[dict[Name, Fault]] = {
  "nothing": Fault(None, lambda work: None),
  "poison": Fault(None, lambda work: (work / "poison").touch()),
  "SIGTERM": Fault(signal.SIGTERM, lambda checkpoint: None),
  "SIGKILL": Fault(signal.SIGKILL, lambda checkpoint: None),
  "truncated": Fault(signal.SIGKILL, _truncate),
  "flipped": Fault(signal.SIGKILL, _flip),
}


@dataclasses.dataclass(frozen=True)
class Soak:
  """How long, and through what."""

  minutes: float = 30
  every: float = 60
  """Seconds between faults."""
  faults: tuple[Name, ...] = tuple(_FAULTS)
  """Those that come, by turns."""
  seed: int = 0
  """Of the moments within their minute."""
  work: pathlib.Path | None = None
  """Where the run goes, and stays; by default a temporary folder, which stays
  where something failed."""

  def __post_init__(self):
    if self.minutes <= 0 or self.every <= 0:
      raise ValueError(f"{self.minutes=} and {self.every=} must be above 0.")
    if not self.faults:
      raise ValueError('faults is empty; name at least "nothing".')


def turns(names: tuple[Name, ...]) -> Iterator[Name]:
  """The faults in the order in which they come, without end."""
  kills = [name for name in names if _FAULTS[name].signal]
  quiet = itertools.cycle([n for n in names if not _FAULTS[n].signal])
  while True:
    for kill in kills or [None]:
      yield from itertools.islice(quiet, _QUIET)
      if kill:
        yield kill


class Memory:
  """Resident bytes of a process since it is warm."""

  def __init__(self):
    self._samples: list[tuple[float, int]] = []  # seconds, bytes
    self._warm = float("inf")

  def sample(self, attempt: attempt_lib.Attempt) -> None:
    done = attempt.newest + len(attempt.batches())
    if self._warm == float("inf") and done > max(attempt.newest, _BEFORE) + 10:
      self._warm = attempt.age + _WARM_SECONDS
    if attempt.age < self._warm:
      return
    status = pathlib.Path(f"/proc/{attempt.processes[0].pid}/status")
    for line in status.read_text().splitlines():
      if line.startswith("VmRSS:"):
        self._samples.append((attempt.age, 1024 * int(line.split()[1])))

  @property
  def begin(self) -> int:
    return self._samples[0][1] if self._samples else 0

  @property
  def end(self) -> int:
    return self._samples[-1][1] if self._samples else 0

  @property
  def growth(self) -> float:
    """Of the last over the first; 0 where it was not watched for long."""
    if not self._samples:
      return 0.0
    (first, begin), (last, end) = self._samples[0], self._samples[-1]
    return end / begin - 1 if last - first >= _WATCH_SECONDS else 0.0


class Results:
  """What every step came to, to compare with when it is trained again."""

  def __init__(self, run_dir: pathlib.Path):
    self._file, self._known = run_dir / "metrics.jsonl", {}
    self.newest = 0

  def read(self) -> list[str]:
    """Reads what there is now; returns what came out differently."""
    if not self._file.exists():
      return []
    found = []
    # The last line may be half a line.
    for text in self._file.read_text(encoding="utf-8").split("\n")[:-1]:
      line = json.loads(text)
      if line["kind"] != "train":
        continue
      step, values = line["step"], (line.get("loss"), line["grad_norm"])
      # As text, in which NaN equals itself.
      if self._known.setdefault(step, str(values)) != str(values):
        found.append(f"step {step} was {self._known[step]}, is {values}")
        self._known[step] = str(values)
      self.newest = max(self.newest, step)
    return found


def soak(args: Soak, work: pathlib.Path) -> list[str]:
  """Runs until the time is over; prints what happens and returns failures."""
  attempt_lib.make_work(work)
  draw, order = random.Random(args.seed), turns(args.faults)
  results = Results(work / "soak")
  end = time.monotonic() + 60 * args.minutes
  failures: list[str] = []
  steps = number = hopeless = 0
  while time.monotonic() < end and hopeless < _HOPELESS:
    attempt = attempt_lib.Attempt(work, "soak", number, options=_OPTIONS)
    memory, met = Memory(), []
    fault = None
    while fault is None and attempt.lives():
      name = next(order)
      wait = draw.uniform(0.5, 1.5) * args.every
      _watch(attempt, memory, min(wait, end - time.monotonic()))
      if time.monotonic() >= end:
        name, fault = "SIGTERM", _FAULTS["SIGTERM"]  # the end of the soak
      elif _FAULTS[name].signal:
        fault = _FAULTS[name]
      else:
        _FAULTS[name].harm(work)
      met.append(name)
    own = not attempt.lives()  # nobody killed it
    if fault and fault.signal:
      attempt.send(fault.signal, [0])
    (code,) = attempt.end()
    allowed = {0, -fault.signal} if fault and fault.signal else set()
    found = results.read()
    if own or code not in allowed:
      found.append(f"ended with {code}:\n{attempt.tail()}")
    if memory.growth > _GROWTH:
      found.append(f"memory grew by {memory.growth:.1%}")
    done = len(attempt.batches())
    hopeless = hopeless + 1 if own else 0
    steps += done
    print(
      f"{number:>3}: from {attempt.newest}, {done} steps in "
      f"{attempt.seconds:.0f} s, memory {memory.begin / 1e6:.0f} to "
      f"{memory.end / 1e6:.0f} MB ({memory.growth:+.1%}) | {', '.join(met)} | "
      f"ended with {code}{' | FAILED' if found else ''}",
      flush=True,
    )
    failures += [f"attempt {number}: {text}" for text in found]
    newest = attempt_lib.newest_checkpoint(attempt.run_dir)
    if fault and newest:
      fault.harm(attempt.run_dir / "checkpoints" / str(newest))
    number += 1
  print(
    f"{number} attempts, {steps} batches read, step {results.newest} reached\n"
    f"{goodput.account(work / 'soak')}"
  )
  if hopeless:
    failures.append(f"given up: {hopeless} attempts ended by themselves")
  return failures


def _watch(
  attempt: attempt_lib.Attempt, memory: Memory, seconds: float
) -> None:
  """Passes the time while the attempt lives."""
  until = attempt.age + seconds
  while attempt.lives() and attempt.age < until:
    memory.sample(attempt)
    time.sleep(1)


def main() -> None:
  args = tyro.cli(Soak, description=__doc__)
  attempt_lib.judge(args.work, lambda work: soak(args, work))


if __name__ == "__main__":
  main()
