"""TPU that kernels are compiled for, and how they run without one."""

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import devices
from pallas_kernels import dispatch


def chip() -> devices.Tpu:
  """TPU of the mesh in context, or else the default device; v5p on a CPU.

  Raises:
    NotImplementedError: The kernels do not support this TPU.
  """
  if dispatch.platform() != "tpu":
    return devices.V5P
  kind = dispatch.device_kind()
  found = devices.of(kind)
  if not isinstance(found, devices.Tpu):
    made_for = [x.name for x in devices.DEVICES if isinstance(x, devices.Tpu)]
    raise NotImplementedError(
      f"{kind!r} is none of the TPUs that kernels are made for: "
      + ", ".join(made_for)
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
