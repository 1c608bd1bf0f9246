"""Has system calls of a short run fail, at many places, one run each.

python -m tests.faults.io --places=200 --seed=0

At each place a run is begun, or gone on with from its middle; from some call
on its writes, say, fail with ENOSPC: once, a few times, or for ever. It must go
on, or end with a line; and what it comes to, after a start without faults if it
ended, must equal a run without any, bit for bit. Exits with 1 if not.
"""

import dataclasses
import errno
import json
import pathlib
import random
import select
import shutil
import subprocess
import sys
import time
from typing import Any, Final, Self

import jax
import tyro

from tests.faults import attempt as attempt_lib
from tests.faults import comparison
from tests.faults import failing_calls

_ERRORS: Final = (errno.EIO, errno.ENOSPC)
_COUNTS: Final = (1, 3, 20, failing_calls.FOREVER)
# Longer than any run takes, on a busy machine and compiling.
_PATIENCE_SECONDS: Final = 900
# What libraries leave in the background may hold the end up for so long.
_END_SECONDS: Final = 20
_RUNS_A_WORKER: Final = 25


@dataclasses.dataclass(frozen=True)
class Places:
  """How many, and which."""

  places: int = 200
  seed: int = 0
  """Of the places."""
  only: int | None = None
  """Tries this one of them alone, counted from 0."""
  work: pathlib.Path | None = None
  """Where the runs go, and stay; by default a temporary folder, which stays
  where something failed."""


class Worker:
  """A process that trains run after run, see `io_program`."""

  def __init__(self, work: pathlib.Path):
    self._said = work / "log.txt"
    self._log = self._said.open("ab")
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.faults.io_program", str(work)],
      cwd=attempt_lib.ROOT,
      env=failing_calls.variables(work) | {"PYTHONPATH": str(attempt_lib.ROOT)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
    )
    self.runs = 0

  def train(
    self,
    run: pathlib.Path,
    fault: failing_calls.Fault | None = None,
    *options: str,
  ) -> dict[str, Any]:
    """What a run ends with; code -1 where it hangs, or takes all down.

    "printed" is what it said, which a log that fails does not have.
    """
    self.runs += 1
    before = self._said.stat().st_size
    calls = None if fault is None else dataclasses.asdict(fault)
    job = {"run": str(run), "options": options, "fault": calls}
    said, heard = self._process.stdin, self._process.stdout
    assert said is not None and heard is not None
    said.write(json.dumps(job).encode() + b"\n")
    said.flush()
    ready, _, _ = select.select([heard], [], [], _PATIENCE_SECONDS)
    line = heard.readline() if ready else b""
    if not line:
      why = "ended" if ready else f"hung for {_PATIENCE_SECONDS} s"
      return {"code": -1, "said": f"the process {why}", "printed": ""}
    printed = self._said.read_bytes()[before:].decode(errors="replace")
    return json.loads(line) | {"printed": printed}

  def end(self) -> str:
    """Ends the process; why it should not have ended so, or ""."""
    said, heard = self._process.stdin, self._process.stdout
    assert said is not None and heard is not None
    said.close()
    try:
      code = self._process.wait(_END_SECONDS)
      return f"the process ended with {code}" if code else ""
    except subprocess.TimeoutExpired:
      return f"the process has not ended {_END_SECONDS} s after its last run"
    finally:
      self._process.kill()
      self._process.wait()
      heard.close()
      self._log.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.end()


def draw(rng: random.Random, counts: dict[str, int]) -> failing_calls.Fault:
  """A place of a run that makes so many calls of each kind."""
  kind = rng.choice([kind for kind in failing_calls.KINDS if counts[kind]])
  return failing_calls.Fault(
    kind,
    rng.randint(1, counts[kind]),
    rng.choice(_COUNTS),
    rng.choice(_ERRORS),
  )


def _whole(result: dict[str, Any]) -> dict[str, Any]:
  """Raises a RuntimeError where a run without faults did not end well."""
  if result["code"]:
    raise RuntimeError(f"without any fault: {result['said']}")
  return result


def wrong(
  worker: Worker,
  run: pathlib.Path,
  unbroken: pathlib.Path,
  fault: failing_calls.Fault,
) -> list[str]:
  """What should not be, of a run in which calls fail."""
  result = worker.train(run, fault)
  printed = result["printed"]
  if result["code"] == 1:
    said = result["said"]
    if not said.startswith("error: ") or "\n" in said:
      return [f"ended with more than a line: {said}"]
    result = worker.train(run)
    if result["code"]:
      return [f"did not go on after {said!r}: {result['said']}"]
  if result["code"]:
    return [f"ended with {result['code']}: {result['said']}"]
  return [
    text
    for text in comparison.differences(run, unbroken)
    if not _told(text, printed, fault)
  ]


def _told(difference: str, said: str, fault: failing_calls.Fault) -> bool:
  """Whether a difference is what the run said, and could not help."""
  if difference.endswith(" is missing"):  # a save that failed
    step = difference.removesuffix(" is missing")
    return f"the {step.replace(' ', ' of step ')} was NOT written" in said
  # For ever means: when the run ended, too.
  forever = fault.count == failing_calls.FOREVER
  return difference.startswith("metrics: ") and forever and "are lost" in said


def prove(
  work: pathlib.Path, places: int, seed: int, only: int | None = None
) -> list[str]:
  """Tries the places; what went wrong, by place."""
  attempt_lib.make_work(work)
  unbroken, half = work / "unbroken", work / "half"
  failures: list[str] = []
  worker = Worker(work)
  fresh = _whole(worker.train(unbroken))
  _whole(worker.train(half, None, "--stop-at=3"))
  copy = work / "resumed"
  shutil.copytree(half, copy)
  resumed = _whole(worker.train(copy))
  failures += comparison.differences(copy, unbroken)
  rng = random.Random(seed)
  for i in range(places):
    resumes = i % 2 == 1
    fault = draw(rng, (resumed if resumes else fresh)["counts"])
    if only not in (None, i):
      continue
    run = work / f"place_{i}"
    if resumes:
      shutil.copytree(half, run)
    begun_at = time.monotonic()
    found = wrong(worker, run, unbroken, fault)
    what = f"{'resumed' if resumes else 'fresh'}, {fault}"
    print(
      f"{i:3} {time.monotonic() - begun_at:5.1f} s | {what}"
      f"{' | FAILED' if found else ''}",
      flush=True,
    )
    failures += [f"place {i} ({what}): {text}" for text in found]
    if not found:
      shutil.rmtree(run)
    if worker.runs >= _RUNS_A_WORKER or any("the process" in x for x in found):
      failures += [
        f"after place {i}: {text}" for text in [worker.end()] if text
      ]
      worker = Worker(work)
  failures += [f"at the end: {text}" for text in [worker.end()] if text]
  return failures


def main() -> None:
  args = tyro.cli(Places, description=__doc__)
  jax.config.update("jax_platforms", "cpu")
  attempt_lib.judge(
    args.work, lambda work: prove(work, args.places, args.seed, args.only)
  )


if __name__ == "__main__":
  main()
