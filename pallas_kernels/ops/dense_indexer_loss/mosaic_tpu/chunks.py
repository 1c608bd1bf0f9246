"""Chunks of queries, and the grid of the kernels that compute one.

Keys are the leading dimension of their arrays: per-query values (weights,
logsumexp, range) then form a row, which broadcasts over the keys for free, and
a sum over keys or heads adds whole registers. No product transposes an operand
in a kernel.

A grid is cores x tiles of keys: each core has `bT` of the chunk's queries. Only
the tiles that a query of the chunk sees are visited; the others are not
written.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.tpu import chip as tpu


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Tile sizes.

  Attributes:
    cores: Cores that share a chunk.
    bT: Queries per core.
    bS: Keys per tile.
    target_bS: Keys per tile in `target`, which reads them for each head.
    bN: Attention heads read at once.
  """

  cores: int
  bT: int
  bS: int
  target_bS: int
  bN: int

  @property
  def chunk(self) -> int:
    return self.cores * self.bT

  def queries(self, *shape: int, pipeline_mode: Any = None) -> pl.BlockSpec:
    """Block of a core's queries, `shape`, of an array [B, heads, T, ...]."""
    tail = (0,) * (len(shape) - 2)

    def index_map(i, j, *place):
      *_, place = place
      return place[0], 0, place[1] * self.cores + i, *tail

    return pl.BlockSpec((1, *shape), index_map, pipeline_mode=pipeline_mode)

  def row(self) -> pl.BlockSpec:
    """Block of a core's queries of an array [1, chunk]."""
    return pl.BlockSpec((1, self.bT), lambda i, *_: (0, i))

  def pairs(self, bS: int) -> pl.BlockSpec:
    """Block of a core's queries and bS keys of an array [S, chunk]."""
    return pl.BlockSpec(
      (bS, self.bT), lambda i, j, *place: (place[-1][2] + j, i)
    )

  def keys(self, width: int) -> pl.BlockSpec:
    """Block of keys of an array [B, S, width]."""
    return pl.BlockSpec(
      (1, self.bS, width), lambda i, j, place: (place[0], place[2] + j, 0)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Queries of a chunk, and the ranges of keys that they see.

  Attributes:
    place: Batch row, and index of the chunk.
    keys: First key that one of its queries sees, and one past the last.
    start: First key that each query sees.
    end: One past the last key.
  """

  place: Int[Array, "*n 2"]
  keys: Int[Array, "*n 2"]
  start: Int[Array, "*n 1 chunk"]
  end: Int[Array, "*n 1 chunk"]

  def walk(self, bS: int) -> tuple[Int[Array, " 3"], Int[Array, ""]]:
    """Place with the first tile of keys; number of tiles that are seen."""
    first, last = self.keys[0] // bS, -(-self.keys[1] // bS)
    place = jnp.concatenate([self.place, first[None]])
    return place, jnp.maximum(last - first, 1)


def split(
  start: Int[Array, "B T"], end: Int[Array, "B T"], tiles: Tiles
) -> Chunk:
  """Splits the queries into chunks [B, n]; `end` must not exceed S."""
  B, T = start.shape
  start, end = (x.reshape(B, -1, 1, tiles.chunk) for x in (start, end))
  alive = start < end
  last = jnp.where(alive, end, 0).max((2, 3))
  first = jnp.where(alive, start, jnp.iinfo(start.dtype).max).min((2, 3))
  keys = jnp.stack([jnp.minimum(first, last), last], -1)
  place = jnp.stack(jnp.indices(last.shape, last.dtype), -1)
  return Chunk(place, keys, start, end)


def call(
  name: str,
  kernel: Callable[..., None],
  grid: tuple[Any, ...],
  *,
  in_specs: Sequence[Any],
  out_specs: Any,
  scratch_shapes: Sequence[Any] = (),
  **kwargs: Any,
) -> Callable[..., Any]:
  """Makes a `pallas_call` of a chunk's place and arrays.

  Args:
    name: The kernel's name, with its tiles.
    kernel: The kernel; it gets the place as scalars.
    grid: Cores, tiles of keys, and more.
    in_specs: Blocks of the arrays.
    out_specs: Blocks of the results.
    scratch_shapes: Scratch memory.
    **kwargs: More arguments of `pallas_call`.
  """
  order = pltpu.PARALLEL, *[pltpu.ARBITRARY] * (len(grid) - 1)
  return pl.pallas_call(
    kernel,
    name=f"dense_indexer_loss_{name}",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch_shapes,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=order, vmem_limit_bytes=tpu.chip().vmem
    ),
    interpret=tpu.interpret(),
    **kwargs,
  )


def visible(place: Any, start: Any, end: Any, bS: int) -> Bool[Array, "bS bT"]:
  """Mask of the keys of this tile that each query sees, inside a kernel."""
  first = (place[2] + pl.program_id(1)) * bS
  shape = bS, start.shape[1]
  key_ST = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return (key_ST >= start[...]) & (key_ST < end[...])
