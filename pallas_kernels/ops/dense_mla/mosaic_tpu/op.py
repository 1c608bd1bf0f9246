"""Dense attention on TPUs: prepares the kernels' inputs and runs them."""

import dataclasses
import functools
from typing import Final

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checkpoint_names
from pallas_kernels import softmax
from pallas_kernels.ops.dense_mla.mosaic_tpu import backward as backward_lib
from pallas_kernels.ops.dense_mla.mosaic_tpu import forward as forward_lib
from pallas_kernels.ops.dense_mla.mosaic_tpu import mask_bits as mask_bits_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import heads

_LANES: Final = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """Tile sizes of the kernels; powers of two, 128 or more."""

  bT: int
  """Queries per grid step."""
  bS: int
  """Keys per grid step; at most 4096."""
  backward_bS: int
  """Keys per grid step of the backward kernel; at most bS."""
  chunk: int
  """Keys per matrix product."""
  group: int
  """Tiles of queries whose gradients stay in VMEM."""


def dense_mla(
  q: Float[Array, "B T N HR"],
  k: Float[Array, "B S N HR"],
  v: Float[Array, "B S N U"],
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  indices: Int[Array, "B T K"] | None = None,
  tiles: Tiles | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
  """See `api.dense_mla`. The tiles bound the memory, not the result."""
  _check(q, k, v, scale)
  S = k.shape[1]
  tiles = tiles or heuristic_tiles(q, k, v)
  start, end = (jnp.clip(x, 0, S).astype(jnp.int32) for x in (start, end))
  mask_bits = None
  if indices is not None:
    mask_bits = mask_bits_lib.from_indices(indices, start, end, S)
  return _dense_mla(q, k, v, start, end, mask_bits, scale, tiles)


def _check(q, k, v, scale):
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f"{q.dtype=} is neither bfloat16 nor float32.")
  for name, x in dict(k=k, v=v).items():
    if x.dtype != q.dtype:
      raise NotImplementedError(f"{name}.dtype={x.dtype} is not {q.dtype=}.")
  HR, U = q.shape[-1], v.shape[-1]
  if HR % 64 or U % _LANES:
    raise NotImplementedError(
      f"Queries of width {HR=} and values of {U=}: only multiples of 64 and "
      f"{_LANES} can be done."
    )
  if not scale > 0:
    raise NotImplementedError(f"{scale=} is not positive.")


def vmem_bytes(tiles: Tiles, HR: int, U: int, itemsize: int) -> tuple[int, int]:
  """Bytes of VMEM that the kernels need, forward and backward.

  Windows are double-buffered, widths fill whole lanes, and logits and weights
  exist in float32 and in the dtype of the product; forward, of two chunks.
  """
  bT, bS = tiles.bT, tiles.bS
  HR = heads.width(HR)
  lanes = HR + heads.width(U)
  mask = 4 * bT * _LANES
  rows = 4 * 8 * bT * 4
  forward = 2 * (itemsize * lanes * (bT + bS) + mask + rows)
  forward += 4 * bT * (U + 2 * _LANES)
  forward += bT * 2 * tiles.chunk * (2 * 4 + itemsize)
  T, bS = tiles.group * bT, tiles.backward_bS
  # The keys' gradients may be in float32.
  backward = 2 * (itemsize * lanes * (bT + bS) + 4 * lanes * bS + mask + rows)
  backward += 2 * itemsize * HR * T + 4 * (HR * T + lanes * bS)
  backward += bT * tiles.chunk * (3 * 4 + 2 * itemsize)
  return forward, backward


def heuristic_tiles(q, k, v) -> Tiles:
  """Tiles for these inputs on this chip.

  With 1024 queries the traffic of keys is small compared to the products. A
  chunk of 512 keys is short enough to compile fast, and long enough to amortise
  its prologue and epilogue. As many queries' gradients as fit stay in VMEM.

  Raises:
    NotImplementedError: The tiles do not fit in VMEM.
  """
  T, S, HR, U = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
  at_least = lambda x: max(1 << (x - 1).bit_length(), _LANES)
  bT, bS = min(at_least(T), 1024), min(at_least(S), 4096)
  tiles = Tiles(
    bT=bT,
    bS=bS,
    backward_bS=min(bS, 2048),
    chunk=min(bS, 512),
    group=-(-T // bT),
  )
  vmem = tpu.chip().vmem
  bytes_of = lambda x: max(vmem_bytes(x, HR, U, q.dtype.itemsize))
  while bytes_of(tiles) > vmem and tiles.group > 1:
    tiles = dataclasses.replace(tiles, group=-(-tiles.group // 2))
  if bytes_of(tiles) > vmem:
    raise NotImplementedError(
      f"{tiles} of widths {HR=}, {U=} want {bytes_of(tiles)} bytes of VMEM, of "
      f"which there are {vmem}."
    )
  return tiles


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "tiles"))
def _dense_mla(q, k, v, start, end, mask_bits, scale, tiles):
  return _vjp_forward(q, k, v, start, end, mask_bits, scale, tiles)[0]


def _whole_tiles(x: jax.Array, tile: int) -> jax.Array:
  """[B, T, ...] -> [B, nT tile, ...], padded with zeros."""
  widths = [(0, 0)] * x.ndim
  widths[1] = 0, -x.shape[1] % tile
  return jnp.pad(x, widths)


def _by_head(x: jax.Array, tile: int) -> jax.Array:
  """[B, T, N, D] -> [B, N, nT tile, D]"""
  return _whole_tiles(x, tile).swapaxes(1, 2)


def _bounds(start, end, bT):
  """Least and largest start, least and largest end of tiles of queries.

  The range that some query sees ignores queries without keys; the range that
  all queries see is empty in a tile with such a query.
  """
  start, end = (x.reshape(x.shape[0], -1, bT) for x in (start, end))
  alive, largest = start < end, jnp.iinfo(jnp.int32).max
  least_start = jnp.min(jnp.where(alive, start, largest), -1)
  largest_start = jnp.max(jnp.where(alive, start, largest), -1)
  least_end = jnp.min(jnp.where(alive, end, 0), -1)
  largest_end = jnp.max(jnp.where(alive, end, 0), -1)
  least_start = jnp.where(alive.any(-1), least_start, 0)
  return jnp.stack([least_start, largest_start, least_end, largest_end], -1)


def _walks(bounds, nS, bS):
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


def _vjp_forward(q, k, v, start, end, mask_bits, scale, tiles):
  T, bT, bS = q.shape[1], tiles.bT, tiles.bS
  padded_start, padded_end = (_whole_tiles(x, bT) for x in (start, end))
  out_BNTU, lse_BN1T = forward_lib.forward(
    _by_head(q, bT),
    heads.side_by_side(_whole_tiles(k, bS)),
    _by_head(v, bS),
    padded_start[:, None],
    padded_end[:, None],
    _bounds(padded_start, padded_end, bT),
    None if mask_bits is None else _whole_tiles(mask_bits, bT).swapaxes(1, 2),
    scale,
    bS=bS,
    chunk=tiles.chunk,
  )
  out = out_BNTU[:, :, :T].swapaxes(1, 2)
  lse = lse_BN1T[:, :, 0, :T].swapaxes(1, 2)
  # Named, so that a remat policy can save them instead of recomputing them.
  out, lse = checkpoint_name((out, lse), checkpoint_names.DENSE_MLA)
  return (out, lse), (q, k, v, start, end, mask_bits, out, lse)


def _vjp_backward(scale, tiles, residuals, cotangents):
  q, k, v, start, end, mask_bits, out, lse = residuals
  d_out, d_lse = cotangents
  (B, T, N, HR), S, bS = q.shape, k.shape[1], tiles.backward_bS
  lse, delta = softmax.lse_and_delta(out, lse, d_out, d_lse, base2=True)
  k_BNSD, v_BNSU = _by_head(k, bS), _by_head(v, bS)
  groups = -(-T // (tiles.group * tiles.bT))
  length = groups * tiles.group * tiles.bT
  dtype = k.dtype if groups == 1 else jnp.float32

  def group(queries):
    q, d_out, lse, delta, start, end, mask_bits = queries
    bounds = _bounds(start, end, tiles.bT)
    return backward_lib.backward(
      q.swapaxes(1, 2),
      k_BNSD,
      v_BNSU,
      d_out.swapaxes(1, 2),
      lse.swapaxes(1, 2)[:, :, None],
      delta.swapaxes(1, 2)[:, :, None],
      start[:, None],
      end[:, None],
      bounds,
      _walks(bounds, k_BNSD.shape[2] // bS, bS),
      None if mask_bits is None else jnp.moveaxis(mask_bits, 1, 3),
      scale,
      chunk=tiles.chunk,
      dtype=dtype,
    )

  # Queries that pad the last tile see no key: their values do not matter.
  queries = jax.tree.map(
    lambda x: _whole_tiles(x, length),
    (q, d_out, lse, delta, start, end, mask_bits),
  )
  if groups == 1:
    d_q, d_k, d_v = group(queries)
    d_q = d_q.swapaxes(1, 2)
  else:

    def add(totals, queries):
      d_q, *d_keys = group(queries)
      return jax.tree.map(jnp.add, totals, tuple(d_keys)), d_q.swapaxes(1, 2)

    split = lambda x: x.reshape(B, groups, -1, *x.shape[2:]).swapaxes(0, 1)
    totals = tuple(jnp.zeros(x.shape, dtype) for x in (k_BNSD, v_BNSU))
    (d_k, d_v), d_q = jax.lax.scan(add, totals, jax.tree.map(split, queries))
    d_q = d_q.swapaxes(0, 1).reshape(B, length, N, HR)
  d_k, d_v = (x[:, :, :S].swapaxes(1, 2).astype(k.dtype) for x in (d_k, d_v))
  return d_q[:, :T], d_k, d_v, None, None, None


_dense_mla.defvjp(_vjp_forward, _vjp_backward)
