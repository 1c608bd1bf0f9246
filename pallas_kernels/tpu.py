"""The TPUs that kernels are made for, and what each has."""

import dataclasses
from typing import Final

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """A device as JAX counts them: of a tpu7x, one of the two in a chip.

  VMEM as the compiler counts it; peaks as in the data sheets; the clock is that
  at which the systolic arrays reach the peak.
  """

  name: str
  cores: int
  """TensorCores. A parallel dimension of a grid is cut over them."""
  vmem: int
  """Bytes a core."""
  flops: float
  """FLOP/s in bfloat16, of all cores."""
  bandwidth: float
  """Bytes/s of HBM, of all cores."""
  clock: float
  """Cycles a second."""


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
# By the start of what a device calls itself; the first that fits.
CHIPS: Final = {
  "TPU7x": TPU7X,
  "TPU v6": V6E,
  "TPU v5 lite": None,
  "TPU v5": V5P,
}


def chip() -> Chip:
  """Of the mesh in context, or of the default device; on a CPU, a v5p.

  Raises:
    NotImplementedError: Kernels are not made for this TPU.
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
  """How `pallas_call` is to run: on no TPU, interpreted, finding errors."""
  if dispatch.platform() == "tpu":
    return False
  return pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
  )
