"""The mesh of a run's devices."""

from collections.abc import Sequence
import dataclasses
from typing import Annotated

import jax

from dsa_jax import ranges
from dsa_jax import sharding

type Devices = Annotated[int, ranges.Interval(1, 2**20)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis of the mesh; their product is what is used."""

  data: Devices = 1
  """Copies of the model."""
  fsdp: Devices = 1
  """Devices that share each copy's weights."""
  expert: Devices = 1
  """Devices that share the experts, and exchange tokens."""
  context: Devices = 1
  """Devices that share a sequence."""
  tensor: Devices = 1
  """Devices that share heads, ffn and vocabulary."""

  def __post_init__(self):
    ranges.check(self)

  def make(
    self, devices: Sequence[jax.Device] | None = None
  ) -> jax.sharding.Mesh:
    """Returns the mesh, by default of this run's devices.

    Raises:
      ValueError: There are too few devices.
    """
    return sharding.make_mesh(**dataclasses.asdict(self), devices=devices)
