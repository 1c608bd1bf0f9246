"""The mesh of a run's devices."""

from collections.abc import Sequence
import dataclasses

import jax

from dsa_jax import ranges
from dsa_jax import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis of the mesh; their product is what is used."""

  data: ranges.Count = 1
  """Copies of the model."""
  fsdp: ranges.Count = 1
  """Devices that share each copy's weights."""
  expert: ranges.Count = 1
  """Devices that share the experts, and exchange tokens."""
  context: ranges.Count = 1
  """Devices that share a sequence."""
  tensor: ranges.Count = 1
  """Devices that share heads, ffn and vocabulary."""

  def __post_init__(self):
    ranges.check(self, "mesh.")

  def make(
    self, devices: Sequence[jax.Device] | None = None
  ) -> jax.sharding.Mesh:
    """Returns the mesh, by default of this run's devices.

    Raises:
      ValueError: There are too few devices.
    """
    return sharding.make_mesh(**dataclasses.asdict(self), devices=devices)
