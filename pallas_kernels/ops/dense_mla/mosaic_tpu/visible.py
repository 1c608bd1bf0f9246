"""Keys that queries see: as arrays, and as masks inside the kernels."""

import dataclasses
from typing import Any, Final

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.ops.dense_mla.mosaic_tpu import mask_bits as mask_bits_lib
from pallas_kernels.tpu import lanes

_LEAST: Final = jnp.iinfo(jnp.int32).min


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
  """Keys of each query: those in [start, end), or those with a bit.

  As arrays, or as their blocks or references.
  """

  start: Any = None
  """First key, [B, 1, paddedT]."""
  end: Any = None
  """One past the last key."""
  mask_bits: Any = None
  """Words of `mask_bits`, in whole tiles of queries."""

  @property
  def is_range(self) -> bool:
    return self.mask_bits is None

  def blocks(self, row: Any, words: Any) -> "Visible":
    """Blocks of these arrays: rows of numbers, or words."""
    return Visible(row, row) if self.is_range else Visible(mask_bits=words)

  def by_query(self, first_key: Any, keys: int) -> Bool[Array, "bT keys"]:
    """Mask of the `keys` keys from `first_key` on, with rows of keys."""
    if not self.is_range:
      return mask_bits_lib.unpack(self.mask_bits[...], first_key, keys, axis=1)
    before = _to_rows(self.start[...] - first_key)
    length = _to_rows(jnp.maximum(self.end[...] - self.start[...], 0))
    lane = lax.broadcasted_iota(jnp.int32, before.shape, 1)
    # Compared as unsigned: keys before the start exceed any length.
    key = lane - before + _LEAST
    firsts = range(0, keys, lanes.LANES)
    return jnp.concatenate([key + x < length + _LEAST for x in firsts], 1)

  def by_key(self, first_key: Any, keys: int) -> Bool[Array, "keys bT"]:
    """Mask of the `keys` keys from `first_key` on, with rows of queries."""
    if not self.is_range:
      return mask_bits_lib.unpack(self.mask_bits[...], first_key, keys, axis=0)
    shape = keys, self.start.shape[1]
    key = lax.broadcasted_iota(jnp.int32, shape, 0)
    key += first_key - self.start[...] + _LEAST
    return key < jnp.maximum(self.end[...] - self.start[...], 0) + _LEAST


def _to_rows(x: jax.Array) -> jax.Array:
  """[1, bT] -> [bT, 128]: broadcasts the number of lane i over row i."""
  return jnp.broadcast_to(x, (lanes.LANES, x.shape[1])).T


def bounds(
  start: Int[Array, "B paddedT"], end: Int[Array, "B paddedT"], bT: int
) -> Int[Array, "B nT 4"]:
  """Least and largest start, least and largest end of tiles of queries.

  Keys in [first, fourth) are seen by some query, keys in [second, third) by
  all. The former ignores queries without keys; the latter is empty in a tile
  with such a query.
  """
  start, end = (x.reshape(x.shape[0], -1, bT) for x in (start, end))
  alive, largest = start < end, jnp.iinfo(jnp.int32).max
  least_start = jnp.min(jnp.where(alive, start, largest), -1)
  largest_start = jnp.max(jnp.where(alive, start, largest), -1)
  least_end = jnp.min(jnp.where(alive, end, 0), -1)
  largest_end = jnp.max(jnp.where(alive, end, 0), -1)
  least_start = jnp.where(alive.any(-1), least_start, 0)
  return jnp.stack([least_start, largest_start, least_end, largest_end], -1)


def walks(
  bounds: Int[Array, "B nT 4"], nS: int, bS: int
) -> Int[Array, "B nS 2"]:
  """Range of query tiles that see each tile of keys: first, one past the last;
  0 and 0 if none does."""
  nT = bounds.shape[1]
  key = bS * jnp.arange(nS, dtype=jnp.int32)[None, :, None]
  least_start, largest_end = bounds[:, None, :, 0], bounds[:, None, :, 3]
  seen = (least_start < key + bS) & (largest_end > key)
  i = jnp.arange(nT, dtype=jnp.int32)[None, None]
  last = jnp.max(jnp.where(seen, i + 1, 0), -1)
  first = jnp.min(jnp.where(seen, i, nT), -1)
  return jnp.stack([jnp.minimum(first, last), last], -1)
