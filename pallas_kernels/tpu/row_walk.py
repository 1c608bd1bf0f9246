"""Walk of a TPU's kernels over blocks of queries and the rows that they read.

Each core has consecutive blocks of each batch row, one after another. A block
visits the tiles of its list: of a union, all of its queries may have selected
the keys; without one, a tile is one query's own.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Final

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import row_copies
from pallas_kernels.tpu import row_plan

# Most rows of a product with a tile of keys (queries x heads).
_AT_ONCE: Final = 512
_SMEM: Final = 3 << 18  # bytes for lists, of 1 MiB


@dataclasses.dataclass(frozen=True)
class Walk:
  """What the kernels of a plan have in common."""

  plan: row_plan.Plan
  tiles: row_plan.Tiles
  cores: int

  @property
  def grid(self) -> tuple[int, int, int]:
    """Cores, batch rows, and a core's blocks of a batch row."""
    B, nQ = self.plan.codes.shape[:2]
    return self.cores, B, nQ // self.cores

  def call(
    self, name: str, kernel: Callable[..., None], **kwargs: Any
  ) -> Callable[..., Any]:
    """Makes a `pallas_call` of a kernel, which also gets `interpret`.

    Args:
      name: The kernel's name, without its tiles.
      kernel: The kernel.
      **kwargs: Arguments of `pallas_call`.
    """
    interpret = tpu.interpret()
    return pl.pallas_call(
      functools.partial(kernel, interpret=interpret),
      name=f"{name}_q{self.tiles.bQ}_k{self.tiles.bK}",
      grid=self.grid,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=tpu.chip().vmem,
        # A check for each copy would cost more than the copies.
        disable_bounds_checks=True,
      ),
      interpret=interpret,
      **kwargs,
    )

  def split(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B nQ bQ ..."]:
    """Splits queries into blocks."""
    return x.reshape(x.shape[0], -1, self.tiles.bQ, *x.shape[2:])

  def block(self, *shape: int | None, space: Any = None) -> pl.BlockSpec:
    """Block of queries of an array [B, T, ...] or [B, nQ, ...].

    Args:
      *shape: Size of the block along the axes after the first: bQ along T, None
        along nQ.
      space: Memory space of the block.
    """
    steps, zeros = self.grid[2], (0,) * (len(shape) - 1)
    return pl.BlockSpec(
      (None, *shape),
      lambda c, b, i: (b, c * steps + i, *zeros),
      memory_space=space,
    )

  def specs(self, arrays: Any) -> Any:
    """Blocks of arrays [B, nQ, ...]."""
    return jax.tree.map(lambda x: self.block(None, *x.shape[2:]), arrays)

  def list_specs(self) -> row_copies.Lists:
    """Blocks of `lists`."""
    nK, bK = self.plan.codes.shape[2:]
    listed = nK + row_copies.PREFETCHED
    return row_copies.Lists(
      block=self.block(None, 1, 3, space=pltpu.SMEM),
      pieces=self.block(None, listed, bK, space=pltpu.SMEM),
      codes=self.block(None, nK, bK, space=pltpu.VMEM),
    )

  def lists(self, S: int, pitch: int) -> row_copies.Lists:
    """Lists of all blocks, for rows that are packed `pitch` pieces apart."""
    pieces = row_copies.listed(self.plan, S, self.tiles, self.cores, pitch)
    return row_copies.Lists(self.plan.blocks, pieces, self.plan.codes)


def check(S: int, K: int, tiles: row_plan.Tiles) -> None:
  """Raises NotImplementedError for sizes of which there are no lists."""
  if not K:
    raise NotImplementedError(f"{K=} keys of a query; at least 1 can be done.")
  largest = jnp.iinfo(jnp.int32).max >> tiles.bQ
  if S + tiles.bK > largest:
    raise NotImplementedError(f"{S=} keys; {largest - tiles.bK} at most.")
  listed = tiles.bQ * -(-K // tiles.bK) + row_copies.PREFETCHED
  if (scalars := 2 * 4 * listed * tiles.bK) > _SMEM:
    raise NotImplementedError(
      f"{K=} keys of a query take {scalars} bytes of SMEM; {_SMEM} at most."
    )


def walk(indices: Int[Array, "B T K"], S: int, tiles: row_plan.Tiles) -> Walk:
  """Plans the walk; T is a multiple of bQ times the cores."""
  plan = row_plan.plan(indices, S, tiles)
  return Walk(plan, tiles, tpu.chip().cores)


def queries_at_once(bQ: int, heads: int) -> int:
  """Queries of a union that are multiplied at once: a divisor of bQ."""
  return min(bQ, 1 << max(_AT_ONCE // heads, 1).bit_length() - 1)


def visit(
  tile: Any,
  stream: row_copies.Stream,
  is_union: Any,
  bQ: int,
  heads: int,
  compute: Callable[[Any, Any, int], None],
  start: Callable[[Any, Any, int], None],
  loop: bool = False,
) -> None:
  """Calls `compute(place, first, n)` for all queries that may read a tile.

  Args:
    tile: The tile, of all that the block reads.
    stream: The block's tiles.
    is_union: Whether the block reads a union.
    bQ: Queries of the block.
    heads: Heads of a query.
    compute: Computes for `n` queries from `first` on, which are multiplied at
      once; `place` is the tile, of all that these queries read.
    start: `start(tile, part, n_parts)` is called before each `compute`, to
      start copies that take as long.
    loop: Whether to call them in a loop, or else in straight-line code.
  """
  tiles_apart = stream.lists.codes.shape[0] // bQ
  group = queries_at_once(bQ, heads)
  n_parts = bQ // group

  def of_union(part):
    start(tile, part, n_parts)
    compute(tile, part * group, group)

  @pl.when(is_union == 1)
  def _():
    if loop:
      pl.loop(0, n_parts)(of_union)
    else:
      for part in range(n_parts):
        of_union(part)

  @pl.when(is_union == 0)
  def _():
    start(tile, 0, 1)
    compute(tile % tiles_apart, tile // tiles_apart, 1)
