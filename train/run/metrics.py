"""Numbers of a run: to the terminal, to JSONL, TensorBoard and wandb."""

from collections.abc import Callable
import dataclasses
import importlib
import json
import math
import pathlib
import secrets
import sys
from typing import Annotated, Any

import jax

from dsa_jax import ranges
from pallas_kernels import devices
from train.host import atomic_files
from train.host import outputs
from train.host import processes
from train.run import lines as lines_lib
from train.run import tensorboard as tensorboard_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  """When to print, evaluate and sample, and where to write metrics."""

  every: ranges.Count = 10
  """Steps between progress lines, and between measurements of the indexer."""
  eval_every: ranges.Count = 1000
  """Steps between evaluations on held-out text, and of retrieval if that is
  trained. At the end of a stage, in both ways of attending."""
  eval_batches: ranges.Count = 8
  """Batches of an evaluation."""
  sample_every: ranges.Count = 1000
  """Steps between samples of text; also at the end of the run."""
  sample_prompt: ranges.Text = "def "
  """Prompt of the samples."""
  sample_tokens: Annotated[int, ranges.Interval(1, 2**16)] = 128
  """Tokens of a sample."""
  sample_temperature: Annotated[float, ranges.Interval(0, 100)] = 0.7
  """0 takes the likeliest token each time."""
  tensorboard: bool = False
  """Also write TensorBoard events, to RUN_DIR/tensorboard."""
  wandb: ranges.Text | None = None
  """Also send them to this project at Weights & Biases."""

  def __post_init__(self):
    ranges.check(self)


def peak_flops(device: jax.Device) -> float | None:
  """Peak bf16 FLOP/s of a device, None if not known (a CPU's is not)."""
  known = devices.of(device.device_kind)
  return known.flops if known else None


def memory_peak() -> int | None:
  """Bytes that the fullest device of this process has held at once.

  None if not known (a CPU's is not). Waits for nothing.
  """
  peaks = []
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
      peaks.append(stats["peak_bytes_in_use"])
  return max(peaks, default=None)


def bits_per_byte(nats: float, num_bytes: float) -> float:
  """Bits per byte of text, which do not depend on the tokenizer."""
  return nats / math.log(2) / max(num_bytes, 1)


class Writer:
  """RUN_DIR/metrics.jsonl, one object a line; TensorBoard, wandb if asked for.

  Of several processes, only the first one writes.
  """

  def __init__(
    self,
    run_dir: str,
    first_step: int,
    *,
    again: bool,
    tensorboard: bool,
    wandb: str | None,
  ):
    """Goes on from `first_step`: drops what was written of it and later.

    Args:
      run_dir: The run's folder.
      first_step: The next one.
      again: Whether what comes after the step before, such as its evaluation,
        has yet to come.
      tensorboard: Whether to write events, to RUN_DIR/tensorboard.
      wandb: The project at Weights & Biases, if numbers go there.

    Raises:
      Damaged: What is no line stands in the file before one that stays.
      OSError: The file cannot be read.
    """
    self._lines: lines_lib.Lines | None = None
    self._board: tensorboard_lib.Board | None = None
    self._wandb = None
    self.file = pathlib.Path(run_dir) / "metrics.jsonl"
    self._board_dir = None
    if tensorboard:
      self._board_dir = pathlib.Path(run_dir) / "tensorboard"
    if processes.is_first():
      self._lines = lines_lib.Lines(self.file, _before(first_step, again))
      self._open_board(first_step)
      if wandb is not None:
        self._wandb = _Wandb(pathlib.Path(run_dir), wandb)

  def go_back(self, first_step: int) -> None:
    """Drops what was written of `first_step` and later: it will come again."""
    if self._lines is None:
      return
    self._lines.keep(_before(first_step, again=False))
    self._open_board(first_step)

  def _open_board(self, first_step: int) -> None:
    if self._board is not None:
      self._board.close()
    if self._board_dir is not None:
      self._board = tensorboard_lib.Board(self._board_dir, first_step)

  def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    """Writes what was measured after `step`.

    Args:
      step: Over all stages.
      kind: "train", "eval", "retrieval", "sample", "goodput" or "incident".
      values: Numbers or texts by name; None where a number is not finite.
    """
    if self._lines is None:
      return
    self._lines.add({"step": step, "kind": kind, **values})
    if self._board is not None:
      self._board.write(step, kind, values)
    if self._wandb is not None:
      self._wandb.write(step, kind, values)

  def sync(self) -> None:
    """Has the lines survive a power cut."""
    if self._lines is not None:
      self._lines.sync()

  def close(self) -> None:
    """Ends the files."""
    if self._lines is not None:
      self._lines.close()
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.close()


def _before(first_step: int, again: bool) -> Callable[[dict[str, Any]], bool]:
  """Tells lines that stay from those that will come again.

  With `again`, all of the step before will, but its training.
  """
  return lambda line: (
    line["step"] < first_step - (again and line["kind"] != "train")
  )


def check_wandb(project: str | None) -> None:
  """Raises an ImportError if a project is given and wandb is not there."""
  if project is None:
    return
  try:
    importlib.import_module("wandb")
  except ImportError as e:
    raise ImportError(
      f"--log.wandb={project} needs the package `wandb`: pip install wandb, or"
      " leave it out."
    ) from e


class _Wandb:
  """The run at Weights & Biases; the same one when the run is resumed.

  metrics.jsonl has all that goes there. So what fails there is told, and ends
  no run: from then on nothing goes there until the next attempt.
  """

  def __init__(self, folder: pathlib.Path, project: str):
    wandb: Any = importlib.import_module("wandb")
    file = folder / "wandb_id.txt"
    known = file.read_text(encoding="utf-8") if file.exists() else ""
    if not known:
      known = secrets.token_hex(8)
      with outputs.Output(str(file)).attempt():
        atomic_files.write(file, known)
    self._run = None
    try:
      self._run = wandb.init(
        project=project,
        id=known,
        name=folder.resolve().name,
        dir=str(folder),
        config=json.loads((folder / "config.json").read_bytes()),
        resume="allow",
      )
      # Its own count must grow; after a resume some steps come again.
      self._run.define_metric("*", step_metric="step")
    except Exception as e:  # of many kinds: the network, the account
      self._lose(e)

  def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    if self._run is None:
      return
    named = {f"{kind}/{name}": value for name, value in values.items()}
    try:
      self._run.log({"step": step, **named})
    except Exception as e:
      self._lose(e)

  def close(self) -> None:
    if self._run is None:
      return
    try:
      self._run.finish()
    except Exception as e:
      self._lose(e)

  def _lose(self, e: Exception) -> None:
    self._run = None
    print(f"wandb gets no more of this attempt: {e!r}", file=sys.stderr)


def duration(seconds: int | float) -> str:
  """65 -> "1m05s"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02}m"
  return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def size(num_bytes: int | float) -> str:
  """12345678 -> "12.3 MB"."""
  for unit in ("B", "kB", "MB", "GB"):
    if abs(num_bytes) < 1000:
      return f"{num_bytes:.3g} {unit}"
    num_bytes /= 1000
  return f"{num_bytes:.3g} TB"


def count(number: int | float) -> str:
  """1234567 -> "1.23M"."""
  for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if abs(number) >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"
