"""Gathers the selected rows for one tile of queries at a time: O(T K) work.

Residuals of the backward pass are the inputs, the output and lse: the weights
are recomputed from lse, tile by tile.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checkpoint_names
from pallas_kernels import contraction
from pallas_kernels import latents
from pallas_kernels import operands
from pallas_kernels import softmax
from pallas_kernels import tiles


@functools.partial(
  jax.custom_vjp, nondiff_argnames=("latent_rank", "scale", "query_tile")
)
def sparse_mla(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"] | operands.QuantizedLatents,
  indices: Int[Array, "B T K"],
  latent_rank: int,
  scale: float,
  query_tile: int | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """See `api.sparse_mla`. `query_tile`: queries whose rows are held at once."""
  return _forward(q, kv, indices, latent_rank, scale, query_tile)[0]


def _bytes_per_query(q, indices):
  return 4 * indices.shape[2] * (q.shape[3] + 2 * q.shape[2])


def _query_tile(q, indices, query_tile):
  bytes_per_query = _bytes_per_query(q, indices)
  return query_tile or tiles.tile_size(q.shape[1], bytes_per_query, largest=128)


def _rows(kv, indices, dtype):
  """Gathers the selected rows [bT, K, C+R], and a mask of the valid ones.

  Those in 8 bits become numbers of `dtype`, once they are gathered.
  The others are 0: where a weight of 0 would not do, as for what is no number.
  """
  valid_TK = (indices >= 0) & (indices < kv.shape[0])
  safe_TK = jnp.where(valid_TK, indices, 0)
  take = lambda x: x.at[safe_TK].get(mode="promise_in_bounds")
  rows_TKD = latents.dequantize(jax.tree.map(take, kv), dtype)
  return jnp.where(valid_TK[..., None], rows_TKD, 0), valid_TK, safe_TK


def _forward(q, kv, indices, latent_rank, scale, query_tile):
  T = q.shape[1]
  bT = _query_tile(q, indices, query_tile)

  def tile(q, indices, kv):
    kv_TKD, valid_TK, _ = _rows(kv, indices, q.dtype)
    logits_TNK = scale * contraction.einsum("TND,TKD->TNK", q, kv_TKD)
    logits_TNK = jnp.where(valid_TK[:, None], logits_TNK, -jnp.inf)
    top_TN1 = jnp.max(logits_TNK, -1, keepdims=True)
    top_TN1 = jnp.where(jnp.isneginf(top_TN1), 0.0, top_TN1)  # a dead row
    weights_TNK = jnp.exp(logits_TNK - top_TN1)
    sum_TN1 = jnp.sum(weights_TNK, -1, keepdims=True)
    out_TNC = contraction.einsum(
      "TNK,TKC->TNC",
      weights_TNK.astype(q.dtype),
      kv_TKD[..., :latent_rank],
    )
    out_TNC = out_TNC / jnp.where(sum_TN1 > 0, sum_TN1, 1.0)
    lse_TN = (top_TN1 + jnp.log(sum_TN1))[..., 0]
    return out_TNC.astype(q.dtype), lse_TN

  def row(q, kv, indices):
    tiled = tiles.split(q, bT), tiles.split(indices, bT, -1)
    out, lse = jax.lax.map(lambda xs: tile(*xs, kv), tiled)
    return tiles.join(out, T), tiles.join(lse, T)

  out, lse = tiles.map_rows(
    row, *(q, kv, indices), tile_bytes=_bytes_per_query(q, indices) * bT
  )
  # Named, so that a remat policy can save them instead of recomputing them.
  out, lse = checkpoint_name((out, lse), checkpoint_names.SPARSE_MLA)
  return (out, lse), (q, kv, indices, out, lse)


def _vjp_forward(q, kv, indices, latent_rank, scale, query_tile):
  return _forward(q, kv, indices, latent_rank, scale, query_tile)


def _vjp_backward(latent_rank, scale, query_tile, residuals, cotangents):
  q, kv, indices, out, lse = residuals
  d_out, d_lse = cotangents
  T = q.shape[1]
  bT = _query_tile(q, indices, query_tile)
  lse, delta = softmax.lse_and_delta(out, lse, d_out, d_lse)

  def tile(d_kv, xs, kv):
    q, indices, d_out, lse, delta = xs
    kv_TKD, valid_TK, safe_TK = _rows(kv, indices, q.dtype)
    logits_TNK = scale * contraction.einsum("TND,TKD->TNK", q, kv_TKD)
    weights_TNK = jnp.where(
      valid_TK[:, None], jnp.exp(logits_TNK - lse[..., None]), 0.0
    )
    d_weights_TNK = contraction.einsum(
      "TNC,TKC->TNK",
      d_out,
      kv_TKD[..., :latent_rank],
    )
    d_logits_TNK = scale * weights_TNK * (d_weights_TNK - delta[..., None])
    d_logits_TNK = d_logits_TNK.astype(q.dtype)
    d_q = contraction.einsum("TNK,TKD->TND", d_logits_TNK, kv_TKD)
    # A row is key and value at once: both gradients in one product over 2N.
    rope = [(0, 0), (0, 0), (0, q.shape[-1] - latent_rank)]
    d_rows_TKD = contraction.einsum(
      "TNK,TND->TKD",
      jnp.concatenate([d_logits_TNK, weights_TNK.astype(q.dtype)], 1),
      jnp.concatenate([q, jnp.pad(d_out, rope)], 1),
    )
    d_kv = d_kv.at[safe_TK].add(d_rows_TKD, mode="promise_in_bounds")
    return d_kv, d_q.astype(q.dtype)

  def row(q, kv, indices, d_out, lse, delta):
    tiled = (
      tiles.split(q, bT),
      tiles.split(indices, bT, -1),
      tiles.split(d_out, bT),
      tiles.split(lse, bT, jnp.inf),
      tiles.split(delta, bT),
    )
    d_kv, d_q = jax.lax.scan(
      lambda d_kv, xs: tile(d_kv, xs, kv),
      jnp.zeros(kv.shape, jnp.float32),
      tiled,
    )
    return tiles.join(d_q, T), d_kv.astype(kv.dtype)

  d_q, d_kv = tiles.map_rows(
    row,
    *(q, kv, indices, d_out, lse, delta),
    tile_bytes=_bytes_per_query(q, indices) * bT,
  )
  return d_q, d_kv, None


sparse_mla.defvjp(_vjp_forward, _vjp_backward)
