"""Dense attention on Hopper: prepares the kernels' inputs and runs them."""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import checkpoint_names
from pallas_kernels.ops.dense_mla import mask_bits as mask_bits_lib
from pallas_kernels.ops.dense_mla.mosaic_gpu import backward as backward_lib
from pallas_kernels.ops.dense_mla.mosaic_gpu import forward as forward_lib

_U = 128
_HR = 192


def dense_mla(
  q: Float[Array, "B T N HR"],
  k: Float[Array, "B S N HR"],
  v: Float[Array, "B S N U"],
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  indices: Int[Array, "B T K"] | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
  """See `api.dense_mla`."""
  _check(q, k, v, scale)
  return _dense_mla(q, k, v, start, end, scale, indices)


def _check(q, k, v, scale):
  for name, x in dict(q=q, k=k, v=v).items():
    if x.dtype != jnp.bfloat16:
      raise NotImplementedError(f"{name}.dtype={x.dtype} is not bfloat16.")
  HR, U = q.shape[-1], v.shape[-1]
  if (HR, U) != (_HR, _U):
    raise NotImplementedError(
      f"Queries of width {HR=} and values of {U=}: only {_HR} and {_U} can be "
      "done."
    )
  if not scale > 0:
    raise NotImplementedError(f"{scale=} is not positive.")


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale",))
def _dense_mla(q, k, v, start, end, scale, indices):
  return _vjp_forward(q, k, v, start, end, scale, indices)[0]


def _pad(x, length, fill=0):
  widths = [(0, 0)] * x.ndim
  widths[1] = 0, length - x.shape[1]
  return jnp.pad(x, widths, constant_values=fill)


def tileable(x: jax.Array, tile: int) -> jax.Array:
  """[B, T, ...] -> padded for TMA: a multiple of 8 rows, at least one tile."""
  return _pad(x, max(-(-x.shape[1] // 8) * 8, tile))


def whole_tiles(x: jax.Array, tile: int, fill: float = 0) -> jax.Array:
  """[B, T, ...] -> [B, nT tile, ...]"""
  return _pad(x, -(-x.shape[1] // tile) * tile, fill)


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


def forward_plan(
  start: Int[Array, "B paddedT"], end: Int[Array, "B paddedT"]
) -> Int[Array, "B nT 4"]:
  """Plan for `forward_lib.forward`; every walk has a tile or more."""
  bT, bS = forward_lib.bT, forward_lib.bS
  least_start, start, end, largest_end = _bounds(start, end, bT)
  some = least_start < largest_end
  first = jnp.where(some, least_start // bS, 0)
  last = jnp.where(some, -(-largest_end // bS), 1)
  whole = jnp.where(some, -(-start // bS), 0)
  unwhole = jnp.where(some, end // bS, 0)
  return jnp.stack([first, last, whole, unwhole], -1)


def bits_of_tiles(
  mask_bits: UInt32[Array, "B Y W"], row_tile: int, column_tile: int
) -> Int[Array, "B columns rows words"]:
  """Pads mask bits to whole tiles and groups the words by tile of columns."""
  n = column_tile // mask_bits_lib.BITS
  words = whole_tiles(mask_bits, row_tile)
  words = jnp.pad(words, [(0, 0), (0, 0), (0, -words.shape[-1] % n)])
  words = jax.lax.bitcast_convert_type(words, jnp.int32)
  return words.reshape(*words.shape[:2], -1, n).swapaxes(1, 2)


def _vjp_forward(q, k, v, start, end, scale, indices):
  T, S = q.shape[1], k.shape[1]
  bT, bS = forward_lib.bT, forward_lib.bS
  start, end = jnp.clip(start, 0, S), jnp.clip(end, 0, S)
  mask_bits = None
  if indices is not None:
    mask_bits = mask_bits_lib.from_indices(indices, S)
    mask_bits = mask_bits_lib.within(mask_bits, start, end)
    end = jnp.where(jnp.any(mask_bits != 0, -1), end, start)  # reads nothing
  padded_start, padded_end = (
    whole_tiles(x.astype(jnp.int32), bT) for x in (start, end)
  )
  out, lse_BNT = forward_lib.forward(
    tileable(q, bT),
    tileable(k, bS),
    tileable(v, bS),
    padded_start,
    padded_end,
    forward_plan(padded_start, padded_end),
    scale,
    None if mask_bits is None else bits_of_tiles(mask_bits, bT, bS),
  )
  out, lse = out[:, :T], lse_BNT[..., :T].swapaxes(1, 2)
  # Named, so that a remat policy can save them instead of recomputing them.
  out, lse = checkpoint_name((out, lse), checkpoint_names.DENSE_MLA)
  return (out, lse), (q, k, v, start, end, mask_bits, out, lse)


def backward_plan(
  start: Int[Array, "B paddedT"], end: Int[Array, "B paddedT"], nS: int
) -> Int[Array, "B nS 4"]:
  """Plan for `backward_lib.backward`; every walk has a tile or more."""
  bT, bS = backward_lib.bT, backward_lib.bS
  least_start, start, end, largest_end = (
    x[:, None] for x in _bounds(start, end, bT)
  )
  keys = bS * jnp.arange(nS, dtype=start.dtype)[None, :, None]
  seen = (least_start < keys + bS) & (largest_end > keys)
  whole = (start <= keys) & (end >= keys + bS)
  nT = seen.shape[-1]
  i = jnp.arange(nT, dtype=jnp.int32)[None, None]

  def past(condition):
    """One past the last tile of queries where `condition` holds, or 0."""
    return jnp.max(jnp.where(condition, i + 1, 0), -1)

  first = jnp.min(jnp.where(seen, i, nT), -1)
  last = jnp.maximum(past(seen), 1)
  unwhole = past(seen & whole)
  # From `unwhole` back to the last tile that is not whole.
  begin = past(~(seen & whole) & (i < unwhole[..., None]))
  return jnp.stack([jnp.minimum(first, last - 1), last, begin, unwhole], -1)


def _vjp_backward(scale, residuals, cotangents):
  q, k, v, start, end, mask_bits, out, lse = residuals
  d_out, d_lse = cotangents
  T, S = q.shape[1], k.shape[1]
  bT, bS = forward_lib.bT, backward_lib.bS
  # d logits = weights * (d weights - delta), where d lse enters as -delta does.
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
  # A dead row has weights of 0, whatever d_lse: lse is -inf there, so most
  # functions of it have no finite gradient.
  dead = jnp.isneginf(lse)
  delta = jnp.where(dead, 0.0, delta - d_lse)
  lse = jnp.where(dead, jnp.inf, lse * math.log2(math.e))
  lse_BNT, delta_BNT = (
    whole_tiles(x, bT, fill).swapaxes(1, 2)
    for x, fill in ((lse, jnp.inf), (delta, 0.0))
  )
  start, end = (whole_tiles(x.astype(jnp.int32), bT) for x in (start, end))
  if mask_bits is not None:
    mask_bits = whole_tiles(mask_bits, bT)  # as start and end
    mask_bits = mask_bits_lib.transpose(mask_bits)[:, :S]
    mask_bits = bits_of_tiles(mask_bits, bS, backward_lib.bT)
  d_q, d_k, d_v = backward_lib.backward(
    tileable(q, bT),
    tileable(k, bS),
    tileable(v, bS),
    tileable(d_out, bT),
    lse_BNT,
    delta_BNT,
    start,
    end,
    backward_plan(start, end, pl.cdiv(S, bS)),
    scale,
    mask_bits,
  )
  d_q = (d_q[:, :T] * scale).astype(q.dtype)
  return d_q, d_k[:, :S], d_v[:, :S], None, None, None


_dense_mla.defvjp(_vjp_forward, _vjp_backward)
