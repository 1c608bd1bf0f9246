"""Plan of the rows that a block of neighbouring queries reads on a TPU.

Neighbours select nearly the same keys. A block of `bQ` of them reads the union
of their keys, each once, as a list of codes: the key, and in the bits below it
the queries that selected it. Where they have too little in common, the list
holds each query's own keys, one query after another. A key that a query
selected twice is in the list twice.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.tpu import lanes

# Queries whose lists are sorted at once: bounds the memory of sorting.
_SORTED_QUERIES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """Tile sizes."""

  bQ: int
  """Queries per block: a power of two, but not 1."""
  bK: int
  """Rows that are read and multiplied at once."""
  longest_union: int
  """Largest size of a union, in multiples of one query's keys."""


def pick_tiles(K: int, N: int) -> Tiles:
  """Tiles that suit every chip, as far as static schedules tell.

  A block of 8 exploits most of the sharing, and is the smallest that lse can be
  written for: fewer queries are padded with some that read nothing. The longer
  a tile, the less often are running sums scaled; one longer than a query's keys
  would be mostly empty. Beyond its largest size, a union's products of all
  queries with keys that few of them selected cost more than reading a key for
  each: with few heads, reading takes the time.
  """
  return Tiles(
    bQ=8,
    bK=min(512, max(128, 1 << max(K - 1, 0).bit_length())),
    longest_union=3 if N > 32 else 7,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Lists of the rows that blocks of queries read."""

  codes: Int[Array, "B nQ nK bK"]
  """Codes of each tile of rows, `key << bQ | queries`. A key of S or more is no
  key, and no two of them in a tile are the same row."""
  blocks: Int[Array, "B nQ 1 3"]
  """For each block, its number of tiles, whether they are a union, and whether
  a key may occur twice in a tile."""


def plan(indices: Int[Array, "B T K"], S: int, tiles: Tiles) -> Plan:
  """Sorts the selected keys of each block: O(T K) work and memory."""
  bQ, bK = tiles.bQ, tiles.bK
  B, _, K = indices.shape
  indices = lanes.pad(indices, bQ, bK, fill=-1)
  blocks_XL = indices.reshape(-1, bQ * indices.shape[2])
  codes_XL, blocks_X3 = jax.lax.map(
    lambda chosen_L: _block(chosen_L, K, S, tiles),
    blocks_XL,
    batch_size=min(max(_SORTED_QUERIES // bQ, 1), blocks_XL.shape[0]),
  )
  return Plan(
    codes=codes_XL.reshape(B, -1, codes_XL.shape[1] // bK, bK),
    blocks=blocks_X3.reshape(B, -1, 1, 3),
  )


def _block(
  chosen_L: Int[Array, " L"], K: int, S: int, tiles: Tiles
) -> tuple[Int[Array, " L"], Int[Array, " 3"]]:
  """Makes one block's list and its entry in `Plan.blocks`."""
  bQ, bK = tiles.bQ, tiles.bK
  last = jnp.iinfo(jnp.int32).max
  L = chosen_L.shape[0]
  place_L = jnp.arange(L, dtype=jnp.int32)
  no_key_L = S + place_L % bK << bQ
  query_L = place_L // (L // bQ)
  valid_L = (chosen_L >= 0) & (chosen_L < S)

  pairs_L = jax.lax.sort(jnp.where(valid_L, chosen_L * bQ + query_L, last))
  before_L = jnp.pad(pairs_L, (1, 0), constant_values=-1)[:-1]
  twice_L = (pairs_L == before_L) & (pairs_L != last)
  first_L = (pairs_L // bQ != before_L // bQ) | twice_L
  first_L &= pairs_L != last
  # A first one is followed by the other queries that selected the same key.
  queries_L = jnp.zeros_like(pairs_L)
  same_L = jnp.full_like(first_L, True)
  for distance in range(bQ):
    pairs = jnp.pad(pairs_L, (0, distance), constant_values=last)[distance:]
    if distance:
      begins = jnp.pad(first_L, (0, distance), constant_values=True)[distance:]
      same_L &= ~begins & (pairs != last)
    queries_L |= jnp.where(same_L, 1 << pairs % bQ, 0)
  union_L = jax.lax.sort(
    jnp.where(first_L, pairs_L // bQ << bQ | queries_L, last)
  )
  length = jnp.sum(first_L, dtype=jnp.int32)
  union_L = jnp.where(place_L < length, union_L, no_key_L)

  apart_L = jnp.where(valid_L, chosen_L << bQ | 1 << query_L, no_key_L)
  is_union = length <= tiles.longest_union * K
  n_tiles = jnp.where(is_union, -(-length // bK), L // bK)
  return (
    jnp.where(is_union, union_L, apart_L),
    jnp.stack([n_tiles, is_union, jnp.any(twice_L)]).astype(jnp.int32),
  )
