"""Tiles that blocks walk over: planned outside the kernels, read in them."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Walk:
  """Tile of one head that a block works on, and those that it walks over."""

  batch: Int[Array, ""]
  head: Int[Array, ""]
  tile: Int[Array, ""]
  """The block's own."""
  first: Int[Array, ""]
  last: Int[Array, ""]
  """One past the last tile of the walk."""
  whole: Int[Array, ""]
  """First tile of those that need no mask."""
  unwhole: Int[Array, ""]
  """One past the last of them."""

  @classmethod
  def of_block(
    cls,
    block: Int[Array, ""],
    plan: Any,
    batches: int,
    heads: int,
    *,
    last_first: bool,
  ) -> "Walk":
    """Reads a block's walk.

    Args:
      block: Index of the block; those of a head are neighbours.
      plan: In device memory: the plan of a kernel, flat.
      batches: Number of sequences.
      heads: Number of heads.
      last_first: Whether a head's first block works on its last tile.
    """
    tiles = plan.shape[0] // (4 * batches)
    head, tile = lax.div(block, tiles), lax.rem(block, tiles)
    if last_first:
      tile = tiles - 1 - tile
    batch, head = lax.div(head, heads), lax.rem(head, heads)
    at = 4 * (batch * tiles + tile)
    return cls(batch, head, tile, *(plan[at + i] for i in range(4)))

  def slot(self, i: Int[Array, ""], stages: int) -> Int[Array, ""]:
    """Slot of tile `i` in a ring buffer."""
    return lax.rem(i - self.first, stages)

  def mask(
    self,
    logits: jax.Array,
    i: Int[Array, ""],
    masked: Callable[[jax.Array], jax.Array],
  ) -> jax.Array:
    """Masks the logits of tile `i`, if it needs it."""
    needless = (i >= self.whole) & (i < self.unwhole)
    return lax.cond(needless, lambda x: x, masked, logits)


def over_keys(
  start: Int[Array, "B paddedT"],
  end: Int[Array, "B paddedT"],
  bT: int,
  bS: int,
) -> Int[Array, "B nT 4"]:
  """Plans walks of tiles of queries over tiles of keys, of a tile or more.

  Returns:
    Tiles of keys: those in [first, second) are seen by some query, those in
    [third, fourth) in full by all.
  """
  least_start, start, end, largest_end = _bounds(start, end, bT)
  some = least_start < largest_end
  first = jnp.where(some, least_start // bS, 0)
  last = jnp.where(some, -(-largest_end // bS), 1)
  whole = jnp.where(some, -(-start // bS), 0)
  unwhole = jnp.where(some, end // bS, 0)
  return jnp.stack([first, last, whole, unwhole], -1)


def over_queries(
  start: Int[Array, "B paddedT"],
  end: Int[Array, "B paddedT"],
  bT: int,
  bS: int,
  nS: int,
) -> Int[Array, "B nS 4"]:
  """Plans walks of tiles of keys over tiles of queries, of a tile or more.

  Returns:
    Tiles of queries: in [first, second) some query sees some of the keys, in
    [third, fourth) all queries see all of them.
  """
  least_start, start, end, largest_end = (
    x[:, None] for x in _bounds(start, end, bT)
  )
  keys = bS * jnp.arange(nS, dtype=start.dtype)[None, :, None]
  seen = (least_start < keys + bS) & (largest_end > keys)
  whole = (start <= keys) & (end >= keys + bS)
  nT = seen.shape[-1]
  i = jnp.arange(nT, dtype=jnp.int32)[None, None]

  def past(condition: Bool[Array, "B nS nT"]) -> Int[Array, "B nS"]:
    """One past the last tile of queries where `condition` holds, or 0."""
    return jnp.max(jnp.where(condition, i + 1, 0), -1)

  first = jnp.min(jnp.where(seen, i, nT), -1)
  last = jnp.maximum(past(seen), 1)
  unwhole = past(seen & whole)
  # From `unwhole` back to the last tile that is not whole.
  begin = past(~(seen & whole) & (i < unwhole[..., None]))
  return jnp.stack([jnp.minimum(first, last - 1), last, begin, unwhole], -1)


def _bounds(start, end, tile):
  """Least and largest start, least and largest end of query tiles, [B, nT].

  Only queries that see a key count; a tile without any gets an empty range.
  """
  B = start.shape[0]
  start, end = (x.reshape(B, -1, tile) for x in (start, end))
  alive = start < end
  largest = jnp.iinfo(start.dtype).max
  return (
    jnp.min(start, -1, where=alive, initial=largest),
    jnp.max(start, -1, where=alive, initial=0),
    jnp.min(end, -1, where=alive, initial=largest),
    jnp.max(end, -1, where=alive, initial=0),
  )
