"""Dense attention on TPUs: prepares the kernels' inputs and runs them."""

import dataclasses
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checkpoint_names
from pallas_kernels import softmax
from pallas_kernels.ops.dense_mla.mosaic_tpu import backward as backward_lib
from pallas_kernels.ops.dense_mla.mosaic_tpu import forward as forward_lib
from pallas_kernels.ops.dense_mla.mosaic_tpu import mask_bits as mask_bits_lib
from pallas_kernels.ops.dense_mla.mosaic_tpu import visible as visible_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import heads
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products


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
  S, tiles = k.shape[1], tiles or pick_tiles(q, k, v)
  check(q, k, v, scale, tiles)
  start, end = (jnp.clip(x, 0, S).astype(jnp.int32) for x in (start, end))
  mask_bits = None
  if indices is not None:
    mask_bits = mask_bits_lib.from_indices(indices, start, end, S)
  return _dense_mla(q, k, v, start, end, mask_bits, scale, tiles)


def check(
  q: Float[Array, "B T N HR"],
  k: Float[Array, "B S N HR"],
  v: Float[Array, "B S N U"],
  scale: float,
  tiles: Tiles,
) -> None:
  """Raises NotImplementedError for inputs that the kernels do not support."""
  products.check(q=q, k=k, v=v)
  HR, U = q.shape[-1], v.shape[-1]
  if HR % 64 or U % lanes.LANES:
    raise NotImplementedError(
      f"Queries of width {HR=} and values of {U=}: only multiples of 64 and "
      f"{lanes.LANES} can be done."
    )
  if not scale > 0:
    raise NotImplementedError(f"{scale=} is not positive.")
  needed = max(vmem_bytes(tiles, HR, U, q.dtype.itemsize))
  if needed > tpu.chip().vmem:
    raise NotImplementedError(
      f"{tiles} of widths {HR=}, {U=} want {needed} bytes of VMEM, of which "
      f"there are {tpu.chip().vmem}."
    )


def vmem_bytes(tiles: Tiles, HR: int, U: int, itemsize: int) -> tuple[int, int]:
  """Bytes of VMEM that the kernels need, forward and backward.

  Windows are double-buffered, widths fill whole lanes, and logits and weights
  exist in float32 and in the dtype of the product; forward, of two chunks.
  """
  bT, bS = tiles.bT, tiles.bS
  HR = heads.width(HR)
  width = HR + heads.width(U)
  mask = 4 * bT * lanes.LANES
  rows = 4 * 8 * bT * 4
  forward = 2 * (itemsize * width * (bT + bS) + mask + rows)
  forward += 4 * bT * (U + 2 * lanes.LANES)
  forward += bT * 2 * tiles.chunk * (2 * 4 + itemsize)
  exact = products.exact_bytes((bT + tiles.chunk) * width, itemsize)
  forward += exact
  T, bS = tiles.group * bT, tiles.backward_bS
  # The keys' gradients may be in float32.
  backward = 2 * (itemsize * width * (bT + bS) + 4 * width * bS + mask + rows)
  backward += 2 * itemsize * HR * T + 4 * (HR * T + width * bS)
  backward += bT * tiles.chunk * (3 * 4 + 2 * itemsize) + exact
  return forward, backward


def pick_tiles(q: jax.Array, k: jax.Array, v: jax.Array) -> Tiles:
  """Tiles for these inputs on this chip.

  With 1024 queries the traffic of keys is small compared to the products. A
  chunk of 512 keys is short enough to compile fast, and long enough to amortise
  its prologue and epilogue. As many queries' gradients as fit stay in VMEM.
  """
  T, S, HR, U = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
  at_least = lambda x: max(1 << (x - 1).bit_length(), lanes.LANES)
  bT, bS = min(at_least(T), 1024), min(at_least(S), 4096)
  tiles = Tiles(
    bT=bT,
    bS=bS,
    backward_bS=min(bS, 2048),
    chunk=min(bS, 512),
    group=-(-T // bT),
  )
  needed = lambda x: max(vmem_bytes(x, HR, U, q.dtype.itemsize))
  while needed(tiles) > tpu.chip().vmem and tiles.group > 1:
    tiles = dataclasses.replace(tiles, group=-(-tiles.group // 2))
  return tiles


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "tiles"))
def _dense_mla(q, k, v, start, end, mask_bits, scale, tiles):
  return _vjp_forward(q, k, v, start, end, mask_bits, scale, tiles)[0]


def _by_head(x: jax.Array, tile: int) -> jax.Array:
  """[B, T, N, D] -> [B, N, nT tile, D]"""
  return lanes.pad(x, tile).swapaxes(1, 2)


def _vjp_forward(q, k, v, start, end, mask_bits, scale, tiles):
  T, bT, bS = q.shape[1], tiles.bT, tiles.bS
  padded_start, padded_end = (lanes.pad(x, bT) for x in (start, end))
  inputs = (
    _by_head(q, bT),
    heads.side_by_side(lanes.pad(k, bS)),
    _by_head(v, bS),
  )
  visible = visible_lib.Visible(padded_start[:, None], padded_end[:, None])
  bounds = visible_lib.bounds(padded_start, padded_end, bT)
  if mask_bits is not None:
    words = lanes.pad(mask_bits, bT).swapaxes(1, 2)
    visible = visible_lib.Visible(mask_bits=words)
  out_BNTU, lse_BN1T = forward_lib.forward(
    *inputs, visible, bounds, scale, bS=bS, chunk=tiles.chunk
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
    bounds = visible_lib.bounds(start, end, tiles.bT)
    q, d_out = q.swapaxes(1, 2), d_out.swapaxes(1, 2)
    lse, delta = (x.swapaxes(1, 2)[:, :, None] for x in (lse, delta))
    visible = visible_lib.Visible(start[:, None], end[:, None])
    walks = visible_lib.walks(bounds, k_BNSD.shape[2] // bS, bS)
    if mask_bits is not None:
      visible = visible_lib.Visible(mask_bits=jnp.moveaxis(mask_bits, 1, 3))
    return backward_lib.backward(
      backward_lib.Inputs(q, k_BNSD, v_BNSU, d_out, lse, delta, visible),
      *(bounds, walks, scale),
      chunk=tiles.chunk,
      dtype=dtype,
    )

  # Queries that pad the last tile see no key: their values do not matter.
  queries = jax.tree.map(
    lambda x: lanes.pad(x, length),
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
