"""Who computes which scores: forms of a block, and its share of the tiles.

A tile is the scores of a group of neighbouring queries of one row of the batch
with `bS` keys. All visible tiles are split evenly over the blocks: each has one
contiguous range of them, ordered by queries, then keys.

Two warpgroups of a block compute. Of many queries, each takes its own, and
both read the same keys; few queries they share, and each reads its half of the
keys.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Final

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.hopper import tiles

HEADS: Final = (8, 16, 32, 64)
COLUMNS: Final = 128  # of an accumulator: queries x heads
ROWS: Final = tiles.ROWS  # of an accumulator: keys
HALVES: Final = 2  # of a tile of keys
bS: Final = HALVES * ROWS
WARPGROUPS: Final = 2  # that multiply
BLOCKS: Final = 132  # multiprocessors of an H100 or H200
_MOST_ACCUMULATORS: Final = 2  # that a warpgroup has registers for


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a block does with a tile."""

  accumulators: int
  """Of a warpgroup, for each of its halves of the keys."""
  readers: int
  """Warpgroups that have queries of their own; 1: they share them."""
  queries: int
  """Of a group."""

  @classmethod
  def of(cls, T: int, heads: int) -> "Plan":
    """The plan for T queries of each row of the batch."""
    each = COLUMNS // heads
    accumulators = min(-(-T // each), _MOST_ACCUMULATORS)
    readers = 1 if T <= accumulators * each else WARPGROUPS
    return cls(accumulators, readers, readers * accumulators * each)

  def columns(self, group: Any, reader: Any, heads: int) -> pl.Slice:
    """A reader's queries of a group, in all queries x heads."""
    size = self.queries * heads // self.readers
    return pl.ds((group * self.readers + reader) * size, size)

  def halves(self, warpgroup: Any) -> list[Any]:
    """Those of a tile's keys that a warpgroup multiplies."""
    return [warpgroup] if self.readers == 1 else list(range(HALVES))


def share_out(
  start: Int[Array, "G bT"], end: Int[Array, "G bT"], blocks: int = BLOCKS
) -> tuple[Int[Array, "blocks 4"], Int[Array, "G 3"]]:
  """Splits the visible tiles of G groups of queries over the blocks.

  All of them form one sequence, group by group.

  Returns:
    For each block its range of the sequence, first and one past the last, and
    the range of its groups. For each group its range of the sequence, and the
    offset from a position in it to the index of the tile of keys.
  """
  alive = start < end
  first = jnp.min(jnp.where(alive, start, jnp.iinfo(jnp.int32).max), 1) // bS
  last = -(-jnp.max(jnp.where(alive, end, 0), 1) // bS)
  tiles = jnp.maximum(last - first, 0)
  after = jnp.cumsum(tiles)
  before = after - tiles
  groups = jnp.stack([before, after, first - before], 1)

  block, total = jnp.arange(blocks + 1, dtype=jnp.int32), after[-1]
  bound = block * (total // blocks) + jnp.minimum(block, total % blocks)
  begin, stop = bound[:-1], bound[1:]
  # Groups that end before a position: comparing all takes one pass.
  ended = lambda x: jnp.sum(after[None] <= x[:, None], 1, dtype=jnp.int32)
  first_group = ended(begin)
  last_group = jnp.where(begin < stop, ended(stop - 1) + 1, first_group)
  return jnp.stack([begin, stop, first_group, last_group], 1), groups


@dataclasses.dataclass(frozen=True)
class Share:
  """What a block has of the sequence of tiles, see `share_out`."""

  begin: Int[Array, ""]
  stop: Int[Array, ""]
  first_group: Int[Array, ""]
  last_group: Int[Array, ""]
  groups: Any

  @classmethod
  def of_block(cls, shares: Any, groups: Any) -> "Share":
    first = 4 * lax.axis_index("block")
    return cls(*(shares[first + i] for i in range(4)), groups)

  def visit(self, body: Callable[[Int[Array, ""]], None]) -> None:
    """Calls `body(group)` for each group of queries."""
    lax.fori_loop(
      self.first_group, self.last_group, lambda group, _: body(group), None
    )

  def stretch(
    self, group: Int[Array, ""]
  ) -> tuple[
    Int[Array, ""], Int[Array, ""], Callable[[Int[Array, ""]], Int[Array, ""]]
  ]:
    """Range of the group's tiles in this block, and the first key of each."""
    before, after, shift = (self.groups[3 * group + i] for i in range(3))
    first, last = jnp.maximum(self.begin, before), jnp.minimum(self.stop, after)
    return first, last, lambda i: (i + shift) * bS

  def slot(self, i: Int[Array, ""], stages: int) -> Int[Array, ""]:
    """Slot of a tile of keys in a ring of so many."""
    return lax.rem(i - self.begin, stages)
