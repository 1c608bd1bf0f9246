"""Chunks of queries: what is computed of one has arrays of [chunk, S]."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
  """Queries of a chunk, as arrays or as a kernel's refs.

  Attributes:
    place: Batch row and first query: [2].
    start: First key that each query sees: [chunk].
    end: One past the last key: [chunk].
  """

  place: Any
  start: Any
  end: Any

  def visible(self, width: int) -> Bool[Array, "chunk width"]:
    """Whether each query sees each key."""
    key = jnp.arange(width)[None]
    return (key >= self.start[:, None]) & (key < self.end[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Queries of a chunk, and the keys that tiles of each kind see.

  Attributes:
    queries: The queries.
    seen_target: For each tile of queries, the first key that one of them sees,
      and one past the last, interleaved.
    seen_scores: Likewise.
    seen_keys: Likewise.
  """

  queries: Queries
  seen_target: Int[Array, "*n target"]
  seen_scores: Int[Array, "*n scores"]
  seen_keys: Int[Array, "*n keys"]


def split(
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  size: int,
  *,
  target: int,
  scores: int,
  keys: int,
) -> Chunk:
  """Splits the queries into chunks [B, n].

  Args:
    start: First key that each query sees.
    end: One past the last key.
    size: Queries of a chunk.
    target: Queries of a tile of `Chunk.seen_target`.
    scores: Queries of a tile of `Chunk.seen_scores`.
    keys: Queries of a tile of `Chunk.seen_keys`.
  """
  B, T = start.shape
  rows, queries = jnp.arange(B), jnp.arange(0, T, size)
  start, end = (x.reshape(B, -1, size) for x in (start, end))
  place = jnp.stack(jnp.meshgrid(rows, queries, indexing="ij"), -1)
  return Chunk(
    Queries(place.astype(jnp.int32), start, end),
    *(_seen(start, end, tile) for tile in (target, scores, keys)),
  )


def _seen(start, end, tile):
  start, end = (x.reshape(*x.shape[:2], -1, tile) for x in (start, end))
  alive = start < end
  first = jnp.where(alive, start, jnp.iinfo(start.dtype).max).min(-1)
  last = jnp.where(alive, end, 0).max(-1)
  return jnp.stack([first, last], -1).reshape(*start.shape[:2], -1)


def sees(seen: Any, tile: Any, first: Any, last: Any) -> Any:
  """Whether a tile of queries may see one of the keys in [first, last).

  Args:
    seen: Ref of one of the `Chunk.seen_...`.
    tile: Index of the tile.
    first: First key.
    last: One past the last.
  """
  return (first < seen[2 * tile + 1]) & (last > seen[2 * tile])
