"""Dense attention on Hopper: prepares the kernels' inputs and runs them."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import checkpoint_names
from pallas_kernels import softmax
from pallas_kernels.hopper import widths
from pallas_kernels.ops.dense_mla import mask_bits as mask_bits_lib
from pallas_kernels.ops.dense_mla.mosaic_gpu import backward as backward_lib
from pallas_kernels.ops.dense_mla.mosaic_gpu import forward as forward_lib
from pallas_kernels.ops.dense_mla.mosaic_gpu import walks


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
  check(q, k, v, scale)
  return _dense_mla(q, k, v, start, end, scale, indices)


def check(
  q: Float[Array, "B T N HR"],
  k: Float[Array, "B S N HR"],
  v: Float[Array, "B S N U"],
  scale: float,
) -> None:
  """Raises NotImplementedError for inputs that the kernels do not support."""
  for name, x in dict(q=q, k=k, v=v).items():
    if x.dtype != jnp.bfloat16:
      raise NotImplementedError(f"{name}.dtype={x.dtype} is not bfloat16.")
  HR, U = q.shape[-1], v.shape[-1]
  if (HR, U) != (widths.HR, widths.U):
    raise NotImplementedError(
      f"Queries of width {HR=} and values of {U=}: only {widths.HR} and"
      f" {widths.U} can be done."
    )
  if not scale > 0:
    raise NotImplementedError(f"{scale=} is not positive.")


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale",))
def _dense_mla(q, k, v, start, end, scale, indices):
  return _vjp_forward(q, k, v, start, end, scale, indices)[0]


def _pad(x, length, fill=0):
  padding = [(0, 0)] * x.ndim
  padding[1] = 0, length - x.shape[1]
  return jnp.pad(x, padding, constant_values=fill)


def tileable(x: jax.Array, tile: int) -> jax.Array:
  """[B, T, ...] -> padded for TMA: a multiple of 8 rows, at least one tile."""
  return _pad(x, max(-(-x.shape[1] // 8) * 8, tile))


def whole_tiles(x: jax.Array, tile: int, fill: float = 0) -> jax.Array:
  """[B, T, ...] -> [B, nT tile, ...]"""
  return _pad(x, -(-x.shape[1] // tile) * tile, fill)


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
    walks.over_keys(padded_start, padded_end, bT, bS),
    scale,
    None if mask_bits is None else bits_of_tiles(mask_bits, bT, bS),
  )
  out, lse = out[:, :T], lse_BNT[..., :T].swapaxes(1, 2)
  # Named, so that a remat policy can save them instead of recomputing them.
  out, lse = checkpoint_name((out, lse), checkpoint_names.DENSE_MLA)
  return (out, lse), (q, k, v, start, end, mask_bits, out, lse)


def _vjp_backward(scale, residuals, cotangents):
  q, k, v, start, end, mask_bits, out, lse = residuals
  d_out, d_lse = cotangents
  T, S = q.shape[1], k.shape[1]
  bT, bS = forward_lib.bT, backward_lib.bS
  lse, delta = softmax.lse_and_delta(out, lse, d_out, d_lse, base2=True)
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
    walks.over_queries(start, end, backward_lib.bT, bS, pl.cdiv(S, bS)),
    scale,
    mask_bits,
  )
  d_q = (d_q[:, :T] * scale).astype(q.dtype)
  return d_q, d_k[:, :S], d_v[:, :S], None, None, None


_dense_mla.defvjp(_vjp_forward, _vjp_backward)
