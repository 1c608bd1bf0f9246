"""Tiling of the chunked implementations into tiles of queries and keys.

The memory law: no array has T x S elements. An op therefore walks over the
batch, and for each row over tiles of `bT` queries (and `bS` keys); the letters
`b*` are tile sizes, `n*` numbers of tiles.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import dispatch

# Limits of a tile's largest temporary. A CPU's tile should stay in the cache of
# one core; an accelerator's must be large enough to fill the chip.
_CPU_BYTES = 4 << 20
_ACCELERATOR_BYTES = 128 << 20
_ACCELERATOR_TIMES = 16
_ROWS = "rows"  # axis of batch rows that run at once
# Even a small op has several tiles, so that memory grows with T + S.
_FEWEST_TILES = 4
# Largest side of a tile of queries x keys on a CPU.
_PAIR_SIDE = 256


def tile_size(length: int, bytes_per_item: int, largest: int = 1024) -> int:
  """Tile size, a power of two, for `length` queries (or keys).

  At most `largest` on a CPU. An accelerator takes many times that: below some
  millions of numbers, launching kernels dominates.
  """
  budget = _CPU_BYTES
  if dispatch.platform() != "cpu":
    budget, largest = _ACCELERATOR_BYTES, _ACCELERATOR_TIMES * largest
  size = min(budget // bytes_per_item, length // _FEWEST_TILES, largest)
  return 1 << max(size, 1).bit_length() - 1


def pair_tiles(T: int, S: int, bytes_per_pair: int) -> tuple[int, int]:
  """Tile sizes bT and bS, about square, of an op on pairs of query and key."""
  bT = tile_size(T, bytes_per_pair * _PAIR_SIDE, largest=_PAIR_SIDE)
  return bT, tile_size(S, bytes_per_pair * bT, largest=_PAIR_SIDE)


def seen_keys(
  start: Int[Array, " bT"], end: Int[Array, " bT"], bS: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
  """Range of key tiles that at least one of these queries sees.

  Inside `map_rows` the range covers all rows that run at once: they share one
  loop.
  """
  alive = start < end
  first = jnp.min(jnp.where(alive, start, jnp.iinfo(start.dtype).max))
  last = jnp.max(jnp.where(alive, end, 0))
  first, last = jax.lax.pmin(first, _ROWS), jax.lax.pmax(last, _ROWS)
  return first // bS, -(-last // bS)


def pad_keys(x: jax.Array, bS: int) -> jax.Array:
  """[S, ...] -> [nS bS, ...]: pads the last tile of keys with zeros."""
  return jnp.pad(x, [(0, -x.shape[0] % bS)] + [(0, 0)] * (x.ndim - 1))


def split(x: jax.Array, tile: int, fill: Any = 0) -> jax.Array:
  """[T, ...] -> [nT, bT, ...]: pads the last tile with `fill`."""
  length = x.shape[0]
  padding = [(0, -length % tile)] + [(0, 0)] * (x.ndim - 1)
  x = jnp.pad(x, padding, constant_values=fill)
  return x.reshape(-1, tile, *x.shape[1:])


def join(x: jax.Array, length: int) -> jax.Array:
  """[nT, bT, ...] -> [T, ...]: undoes `split`."""
  return x.reshape(-1, *x.shape[2:])[:length]


def map_rows(row: Callable[..., Any], *arrays: Any, tile_bytes: int) -> Any:
  """Applies `row` to each batch row: [B, ...] -> [B, ...]; None stays None.

  A CPU runs them one after another; an accelerator runs as many at once as its
  budget has room for tiles of `tile_bytes`.
  """
  B, group = arrays[0].shape[0], 1
  if dispatch.platform() != "cpu":
    fitting = max(_ACCELERATOR_BYTES // tile_bytes, 1)
    group = math.gcd(B, 1 << fitting.bit_length() - 1)
  rows = jax.vmap(row, axis_name=_ROWS)
  groups = jax.tree.map(
    lambda x: x.reshape(B // group, group, *x.shape[1:]), arrays
  )
  results = jax.lax.map(lambda xs: rows(*xs), groups)
  return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), results)
