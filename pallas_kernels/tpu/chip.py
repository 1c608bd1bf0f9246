"""Specifications of the TPUs that the kernels support."""

import dataclasses
from typing import Final

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Specification of a JAX device: on a tpu7x, one of the two in a chip.

  VMEM is as the compiler counts it, peaks are from the data sheets, and the
  clock is the one at which the systolic arrays reach the peak.
  """

  name: str
  cores: int
  """TensorCores. A parallel grid dimension is split over them."""
  vmem: int
  """Bytes per core."""
  flops: float
  """Peak bfloat16 FLOP/s of all cores."""
  bandwidth: float
  """HBM bytes/s of all cores."""
  clock: float
  """Cycles per second."""


V5P: Final = Chip(
  name="v5p",
  cores=2,
  vmem=64 << 20,
  flops=459e12,  # 2 cores x 4 arrays of 128 x 128
  bandwidth=2765e9,
  clock=1.75e9,
)
V6E: Final = Chip(
  name="v6e",
  cores=1,
  vmem=128 << 20,
  flops=918e12,  # 2 arrays of 256 x 256, twice a cycle
  bandwidth=1640e9,
  clock=1.75e9,
)
TPU7X: Final = Chip(
  name="tpu7x",
  cores=1,
  vmem=64 << 20,
  flops=1153e12,  # 2 arrays of 256 x 256, twice a cycle
  bandwidth=3690e9,
  clock=2.2e9,
)
# By prefix of device_kind; the first match counts.
CHIPS: Final = {
  "TPU7x": TPU7X,
  "TPU v6": V6E,
  "TPU v5 lite": None,
  "TPU v5": V5P,
}


def chip() -> Chip:
  """Chip of the mesh in context, or else of the default device; v5p on a CPU.

  Raises:
    NotImplementedError: The kernels do not support this TPU.
  """
  if dispatch.platform() != "tpu":
    return V5P
  kind = dispatch.device_kind()
  found = next((x for k, x in CHIPS.items() if kind.startswith(k)), None)
  if found is None:
    raise NotImplementedError(
      f"{kind!r} is none of the TPUs that kernels are made for: v5p, v6e, tpu7x"
    )
  return found


def interpret() -> pltpu.InterpretParams | bool:
  """Value of `pallas_call`'s `interpret`: off a TPU, with error detection."""
  if dispatch.platform() == "tpu":
    return False
  return pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
  )
