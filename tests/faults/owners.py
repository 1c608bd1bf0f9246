"""Starts two programs on one run's folder: one trains, the other says who does.

python -m tests.faults.owners --times=20

By turns, both are started at once on no folder yet; at once on a folder whose
owner was killed; and the second one while the first trains. One must end with
0 and come to the same as a run alone; the other ends with a line that names the
first one's host and process. Exits with 1 if not.
"""

import dataclasses
import pathlib
import shutil
import signal
import socket
import time
from typing import Final, Literal

import jax
import tyro

from tests.faults import attempt as attempt_lib
from tests.faults import comparison

type Case = Literal["both at once", "after a kill", "a second one"]

_CASES: Final[tuple[Case, ...]] = (
  "both at once",
  "after a kill",
  "a second one",
)
_OPTIONS: Final = (
  *("--stages.0.steps=8", "--checkpoint.every=2"),
  *("--log.eval-every=100", "--log.sample-every=100"),
)


@dataclasses.dataclass(frozen=True)
class Owners:
  """How often."""

  times: int = 20
  work: pathlib.Path | None = None
  """Where the runs go, and stay; by default a temporary folder, which stays
  where something failed."""


def _start(work: pathlib.Path, run: str, number: int) -> attempt_lib.Attempt:
  return attempt_lib.Attempt(work, run, number, 1, ("pretrain",), _OPTIONS)


def _until_it_trains(attempt: attempt_lib.Attempt) -> None:
  while attempt.lives() and not attempt.batches():
    time.sleep(0.05)


def wrong(work: pathlib.Path, run: str, case: Case) -> list[str]:
  """What should not be, of two programs and one run."""
  if case == "after a kill":
    killed = _start(work, run, 9)
    _until_it_trains(killed)
    killed.send(signal.SIGKILL, [0])
    killed.end()
  first = _start(work, run, 0)
  if case == "a second one":
    _until_it_trains(first)
    first.send(signal.SIGSTOP, [0])  # or it might end before the second begins
  both = [first, second := _start(work, run, 1)]
  if case == "a second one":
    second.end_by_itself()
    first.send(signal.SIGCONT, [0])
  codes = [attempt.end_by_itself()[0] for attempt in both]
  if sorted(codes) != [0, 1]:
    said = "\n".join(attempt.tail() for attempt in both)
    return [f"they ended with {codes}:\n{said}"]
  winner, loser = both if codes[0] == 0 else both[::-1]
  found = comparison.differences(work / run, work / "alone")
  errors = [x for x in loser.said() if "error" in x or "Traceback" in x]
  who = f"process {winner.processes[0].pid} on {socket.gethostname()}"
  if len(errors) != 1 or who not in errors[0]:
    found.append(f"the second one did not name {who}:\n{loser.tail()}")
  if loser.batches():
    found.append("both have trained")
  return found


def prove(work: pathlib.Path, times: int) -> list[str]:
  """Tries it so often; what went wrong."""
  attempt_lib.make_work(work)
  alone = _start(work, "alone", 0)
  if alone.end_by_itself() != [0]:
    return [f"alone:\n{alone.tail()}"]
  failures = []
  for i in range(times):
    case, run = _CASES[i % len(_CASES)], f"two_{i}"
    found = wrong(work, run, case)
    print(f"{i:3} {case}{' | FAILED' if found else ''}", flush=True)
    failures += [f"{run} ({case}): {text}" for text in found]
    if not found:
      shutil.rmtree(work / run)
  return failures


def main() -> None:
  args = tyro.cli(Owners, description=__doc__)
  jax.config.update("jax_platforms", "cpu")
  attempt_lib.judge(args.work, lambda work: prove(work, args.times))


if __name__ == "__main__":
  main()
