"""Arrays of the backward kernel in a block's shared memory."""

import dataclasses
from typing import Any, Final

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper.memory import Place
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans

_SIGNALS: Final = len(plans.Signal) * barriers.BYTES // 4  # words of barriers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedMemory:
  """Arrays of a block: their types, references, or `Place`s.

  The heads that the block owns come first. "wide" has its share of the columns
  without RoPE, "narrow" of the rotated ones.
  """

  q_wide: Any  # [heads, columns]
  q_narrow: Any
  do_wide: Any
  kv_wide: Any  # [keys, columns]
  kv_narrow: Any
  p: Any  # P^T [keys, 64], of the heads that it owns, then of the others
  ds: Any  # dS^T, likewise; in a cluster the other block's part of dP^T first
  indices: Any  # [keys], then the barriers: another array has no room
  per_head: Any  # [2, 64]: a logit's bias, in powers of two; and -scale delta
  products: Any  # the other block's part of S^T; without one, None

  @classmethod
  def types(cls, plan: plans.Plan) -> Any:
    """A `SharedMemory` of types, as `plgpu.kernel` takes them."""
    wide = lambda rows: tiles.shared((rows, plan.wide))
    narrow = lambda rows: plgpu.SMEM(
      (rows, plan.narrow), jnp.bfloat16, transforms=tiles.NARROW
    )
    weights = tiles.shared((plan.blocks * plans.KEYS, plans.HEADS))
    numbers = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    return cls(
      q_wide=wide(plan.heads),
      q_narrow=narrow(plan.heads),
      do_wide=wide(plan.heads),
      kv_wide=wide(plans.KEYS),
      kv_narrow=narrow(plans.KEYS),
      p=weights,
      ds=weights,
      indices=plgpu.SMEM((plans.KEYS + _SIGNALS,), jnp.int32),
      per_head=numbers(2, plans.HEADS),
      products=numbers(plans.KEYS, plans.HEADS) if plan.is_pair else None,
    )

  @classmethod
  def arguments(cls, plan: plans.Plan) -> "SharedMemory":
    """Types of the references, as `threads.code` takes them."""
    of = lambda array: plgpu.RefType(tuple(array.transforms))
    return jax.tree.map(of, cls.types(plan))

  def places(self) -> "SharedMemory":
    """Places of the references, in code of single threads."""
    return jax.tree.map(Place.of, self)

  def signals(self) -> barriers.Barriers:
    """All barriers, of references."""
    words = pl.ds(plans.KEYS, _SIGNALS)
    return barriers.Barriers(self.indices.at[words])

  def signal(self, which: plans.Signal) -> Place:
    """Place of a barrier, of places."""
    return self.indices + (4 * plans.KEYS + barriers.BYTES * which.index)
