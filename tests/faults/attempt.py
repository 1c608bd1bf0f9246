"""A launch of the tiny run: one process, or two as one."""

from collections.abc import Callable
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Final

ROOT: Final = pathlib.Path(__file__).parents[2]
STAGES: Final = ("pretrain", "warmup", "sparse")

# What is left of an attempt after one of its processes died gets so long to
# end by itself, as a scheduler would give it.
_GRACE_SECONDS: Final = 3
# A process that was asked to stop may be compiling, and must still save.
_PATIENCE_SECONDS: Final = 180


def make_work(work: pathlib.Path) -> None:
  """The folder of a harness: text for its runs, the same on every machine."""
  (work / "text").mkdir(parents=True, exist_ok=True)
  rng = random.Random(0)
  words = "the a of to sparse dense key query index token layer expert".split()
  for i in range(12):
    text = " ".join(rng.choice(words) for _ in range(20))
    (work / "text" / f"{i}.txt").write_text(text, encoding="utf-8")


def judge(
  work: pathlib.Path | None, prove: Callable[[pathlib.Path], list[str]]
) -> None:
  """Proves something, says what went wrong, and exits with 1 if anything did.

  Args:
    work: Where runs go, and stay; None takes a temporary folder, which stays
      where something failed.
    prove: Returns what went wrong there.
  """
  folder = work or pathlib.Path(tempfile.mkdtemp(prefix="faults_"))
  failures = prove(folder)
  for failure in failures:
    print(f"FAILED {failure}")
  if failures:
    sys.exit(f"Something failed; all of it is in {folder}.")
  if work is None:
    shutil.rmtree(folder)


class Attempt:
  """Processes that go on with WORK/RUN, or begin it.

  Attributes:
    run_dir: WORK/RUN.
    newest: The step of the newest checkpoint there at launch.
    seconds: How long it lived; set by `end`.
  """

  def __init__(
    self,
    work: pathlib.Path,
    run: str,
    number: int,
    processes: int = 1,
    stages: tuple[str, ...] = STAGES,
    options: tuple[str, ...] = (),
  ):
    self.run_dir = work / run
    self.newest = newest_checkpoint(self.run_dir)
    self._begun = time.monotonic()
    self.seconds = 0.0
    logs = work / f"{run}.logs"
    logs.mkdir(exist_ok=True)
    names = [f"{number:03}.{i}" for i in range(processes)]
    self._outputs = [logs / f"{name}.txt" for name in names]
    self._batches = [logs / f"{name}.batches" for name in names]
    # All that a scheduler's one command can tell: whether a run has begun.
    if (self.run_dir / "config.json").exists():
      options = (*options, "--resume")
    together = _together(processes)
    self.processes = []
    for output, batches, own in zip(self._outputs, self._batches, together):
      command = [
        *(sys.executable, "-m", "tests.faults.program"),
        *(str(work), str(batches), ",".join(stages)),
        *(f"--run-dir={self.run_dir}", *options, *own),
      ]
      with output.open("w") as out:
        process = subprocess.Popen(
          command,
          cwd=ROOT,
          env={**os.environ, "PYTHONPATH": str(ROOT)},
          stdout=out,
          stderr=subprocess.STDOUT,
        )
      self.processes.append(process)

  @property
  def age(self) -> float:
    """Seconds since launch."""
    return time.monotonic() - self._begun

  def lives(self) -> bool:
    """Whether no process has ended yet."""
    return all(process.poll() is None for process in self.processes)

  def send(self, kind: signal.Signals, victims: list[int]) -> None:
    for i in victims:
      self.processes[i].send_signal(kind)

  def end_by_itself(self) -> list[int]:
    """Waits until all have ended, however long it takes: their exit codes."""
    codes = [process.wait() for process in self.processes]
    self.seconds = self.age
    return codes

  def end(self) -> list[int]:
    """Waits until all have ended, and returns their exit codes.

    Those that outlive one that died, or do not stop in time, are killed.
    """
    deadline = self.age + _PATIENCE_SECONDS
    while any(process.poll() is None for process in self.processes):
      if any(process.poll() for process in self.processes):
        deadline = min(deadline, self.age + _GRACE_SECONDS)
      if self.age > deadline:
        for process in self.processes:
          process.kill()
      time.sleep(0.05)
    self.seconds = self.age
    return [process.wait() for process in self.processes]

  def said(self) -> list[str]:
    """All lines of all processes."""
    texts = (
      file.read_text(encoding="utf-8", errors="replace")
      for file in self._outputs
    )
    return [line for text in texts for line in text.splitlines()]

  def tail(self) -> str:
    """The last lines of each process, to show."""
    texts = (
      file.read_text(encoding="utf-8", errors="replace")
      for file in self._outputs
    )
    last = [line for text in texts for line in text.splitlines()[-12:]]
    return "\n".join(f"  | {line}" for line in last)

  def batches(self) -> list[tuple[str, ...]]:
    """What was read for each step, a checksum from each process."""
    noted = [
      file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
      for file in self._batches
    ]
    return list(zip(*noted))

  def phase(self) -> str:
    """What it is doing, as far as its files tell."""
    if not self.run_dir.exists():
      return "before the folder"
    if not (self.run_dir / "config.json").exists():
      return "before config.json"
    if saving(self.run_dir):
      return "during a save"
    return "training" if self.batches() else "starting"


def newest_checkpoint(run_dir: pathlib.Path) -> int:
  """Its step; 0 if there is none."""
  steps = (p.name for p in run_dir.glob("checkpoints/*") if p.name.isdigit())
  return max(map(int, steps), default=0)


def saving(run_dir: pathlib.Path) -> set[str]:
  """The checkpoints that are being written: Orbax's temporary folders."""
  try:
    names = os.listdir(run_dir / "checkpoints")
  except FileNotFoundError:
    return set()
  return {name for name in names if "orbax-checkpoint-tmp" in name}


def _together(processes: int) -> list[tuple[str, ...]]:
  """Options of each process by which they find each other; one device each."""
  if processes == 1:
    return [()]
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    (
      f"--distributed.coordinator=localhost:{port}",
      f"--distributed.processes={processes}",
      f"--distributed.process={i}",
      f"--mesh.fsdp={processes}",
    )
    for i in range(processes)
  ]
