"""Numbers of a run: to the terminal, to JSONL, and to TensorBoard."""

import json
import math
import os
import pathlib
from typing import Any, Final

import jax
import tensorboardX

from pallas_kernels import tpu
from train import processes

# Peak dense bf16 FLOP/s of a device, by the start of its kind; data sheets.
_PEAK: Final = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": tpu.V5P.flops,
  "TPU v6 lite": tpu.V6E.flops,
  "TPU7x": tpu.TPU7X.flops,  # a chip is two devices
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """Peak bf16 FLOP/s of a device, None if not known (a CPU's is not)."""
  for kind, flops in _PEAK.items():
    if device.device_kind.startswith(kind):
      return flops
  return None


def bits_per_byte(nats: float, num_bytes: float) -> float:
  """What the text costs, whatever the tokenizer."""
  return nats / math.log(2) / max(num_bytes, 1)


class Writer:
  """RUN_DIR/metrics.jsonl, one object a line, and TensorBoard if asked for."""

  def __init__(
    self, run_dir: str, first_step: int, *, again: bool, tensorboard: bool
  ):
    """Goes on from `first_step`, see `go_back`.

    Of several processes, only the first one writes.
    """
    self._out: Any = None
    self._board: Any = None
    self._board_dir = None
    self.file = pathlib.Path(run_dir) / "metrics.jsonl"
    if tensorboard:
      self._board_dir = str(pathlib.Path(run_dir) / "tensorboard")
    self.go_back(first_step, again=again)

  def go_back(self, first_step: int, *, again: bool = False) -> None:
    """Drops what was written of `first_step` and later: it will come again.

    With `again`, so will all of the step before but its training.
    """
    self.close()
    if not processes.is_first():
      return
    kept = []
    if self.file.exists():
      for line in self.file.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        if said["step"] < first_step - again or (
          said["step"] < first_step and said["kind"] == "train"
        ):
          kept.append(line + "\n")
    partial = self.file.with_name(self.file.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, self.file)
    self._out = self.file.open("a", encoding="utf-8", buffering=1)
    if self._board_dir is not None:
      self._board = tensorboardX.SummaryWriter(
        self._board_dir, purge_step=first_step
      )

  def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    """Writes what was measured after `step`.

    Args:
      step: Over all stages.
      kind: "train", "eval", "retrieval", "sample" or "incident".
      values: Numbers or texts by name.
    """
    if self._out is None:
      return
    line = {"step": step, "kind": kind, **values}
    self._out.write(json.dumps(line) + "\n")
    if self._board is not None:
      for name, value in values.items():
        if isinstance(value, (int, float)):
          self._board.add_scalar(f"{kind}/{name}", value, step)
        else:
          self._board.add_text(f"{kind}/{name}", str(value), step)

  def close(self) -> None:
    if self._out is not None:
      self._out.close()
    if self._board is not None:
      self._board.close()


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
