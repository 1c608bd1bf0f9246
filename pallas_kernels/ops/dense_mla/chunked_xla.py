"""Online softmax over tiles of bT queries and bS keys, on any backend.

Key tiles outside every range of a query tile are skipped: causal attention
costs half, packed documents less. The backward pass recomputes the weights from
lse.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checkpoint_names
from pallas_kernels import contraction
from pallas_kernels import softmax
from pallas_kernels import tiles
from pallas_kernels.ops.dense_mla import mask_bits as mask_bits_lib


@functools.partial(
  jax.custom_vjp, nondiff_argnames=("scale", "query_tile", "key_tile")
)
def dense_mla(
  q: Float[Array, "B T N HR"],
  k: Float[Array, "B S N HR"],
  v: Float[Array, "B S N U"],
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  indices: Int[Array, "B T K"] | None = None,
  query_tile: int | None = None,
  key_tile: int | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
  """See `api.dense_mla`. The tiles bound the memory, not the result."""
  args = q, k, v, start, end, scale, indices, query_tile, key_tile
  return _vjp_forward(*args)[0]


def _tile_sizes(q, k, query_tile, key_tile):
  bT, bS = tiles.pair_tiles(q.shape[1], k.shape[1], 4 * q.shape[2])
  return query_tile or bT, key_tile or bS


def _logits(q, k, start, end, mask_bits, i, scale):
  """Logits [N, bT, bS] of key tile i, -inf where masked."""
  logits_NTS = scale * contraction.einsum("TND,SND->NTS", q, k)
  key = i * k.shape[0] + jnp.arange(k.shape[0], dtype=start.dtype)[None]
  visible_TS = (key >= start[:, None]) & (key < end[:, None])
  if mask_bits is not None:
    visible_TS &= mask_bits_lib.unpack(mask_bits, key[0])
  return jnp.where(visible_TS[None], logits_NTS, -jnp.inf)


def _slice(x, i, bS):
  return jax.lax.dynamic_slice_in_dim(x, i * bS, bS)


def _vjp_forward(q, k, v, start, end, scale, indices, query_tile, key_tile):
  T, S = q.shape[1], k.shape[1]
  mask_bits = (
    None if indices is None else mask_bits_lib.from_indices(indices, S)
  )
  bT, bS = _tile_sizes(q, k, query_tile, key_tile)

  def tile(q, start, end, mask_bits, k, v):
    def key_tile(i, carry):
      out_NTU, top_NT1, sum_NT1 = carry
      k_tile = _slice(k, i, bS)
      logits = _logits(q, k_tile, start, end, mask_bits, i, scale)
      new_top = jnp.maximum(top_NT1, jnp.max(logits, -1, keepdims=True))
      finite_top = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
      weights = jnp.exp(logits - finite_top)
      keep = jnp.exp(top_NT1 - finite_top)
      out = contraction.einsum(
        "NTS,SNU->NTU",
        weights.astype(v.dtype),
        _slice(v, i, bS),
      )
      sum_NT1 = keep * sum_NT1 + jnp.sum(weights, -1, keepdims=True)
      return keep * out_NTU + out, new_top, sum_NT1

    N, U = v.shape[1:]
    first, last = tiles.seen_keys(start, end, bS)
    out_NTU, top_NT1, sum_NT1 = jax.lax.fori_loop(
      first,
      last,
      key_tile,
      (
        jnp.zeros((N, bT, U), jnp.float32),
        jnp.full((N, bT, 1), -jnp.inf, jnp.float32),
        jnp.zeros((N, bT, 1), jnp.float32),
      ),
    )
    out_NTU = out_NTU / jnp.where(sum_NT1 > 0, sum_NT1, 1.0)
    top_NT1 = jnp.where(sum_NT1 > 0, top_NT1, 0.0)
    lse_NT = (top_NT1 + jnp.log(sum_NT1))[..., 0]
    return out_NTU.swapaxes(0, 1).astype(q.dtype), lse_NT.T

  def row(q, k, v, *queries):
    k, v = tiles.pad_keys(k, bS), tiles.pad_keys(v, bS)
    tiled = jax.tree.map(lambda x: tiles.split(x, bT), (q, *queries))
    out, lse = jax.lax.map(lambda xs: tile(*xs, k, v), tiled)
    return tiles.join(out, T), tiles.join(lse, T)

  start, end = jnp.clip(start, 0, S), jnp.clip(end, 0, S)
  out, lse = tiles.map_rows(
    row, *(q, k, v, start, end, mask_bits), tile_bytes=4 * bT * bS * q.shape[2]
  )
  # Named, so that a remat policy may keep them instead of computing them again.
  out, lse = checkpoint_name((out, lse), checkpoint_names.DENSE_MLA)
  return (out, lse), (q, k, v, start, end, mask_bits, out, lse)


def _vjp_backward(scale, query_tile, key_tile, residuals, cotangents):
  q, k, v, start, end, mask_bits, out, lse = residuals
  d_out, d_lse = cotangents
  T, S = q.shape[1], k.shape[1]
  bT, bS = _tile_sizes(q, k, query_tile, key_tile)
  lse, delta = softmax.lse_and_delta(out, lse, d_out, d_lse)

  def tile(d_keys, xs, k, v):
    q, start, end, mask_bits, d_out, lse, delta = xs
    lse_NT1, delta_NT1 = lse.T[..., None], delta.T[..., None]
    f32 = jnp.float32

    def key_tile(i, carry):
      d_q, d_k, d_v = carry
      k_tile, v_tile = _slice(k, i, bS), _slice(v, i, bS)
      logits_NTS = _logits(q, k_tile, start, end, mask_bits, i, scale)
      weights_NTS = jnp.exp(logits_NTS - lse_NT1)
      d_weights_NTS = contraction.einsum("TNU,SNU->NTS", d_out, v_tile)
      d_logits_NTS = scale * weights_NTS * (d_weights_NTS - delta_NT1)
      d_logits_NTS = d_logits_NTS.astype(q.dtype)
      weights_NTS = weights_NTS.astype(d_out.dtype)

      def product(subscripts, x, y):
        return contraction.einsum(subscripts, x, y)

      def add(total, part):
        part = _slice(total, i, bS) + part
        return jax.lax.dynamic_update_slice_in_dim(total, part, i * bS, 0)

      d_q = d_q + product("NTS,SND->TND", d_logits_NTS, k_tile)
      d_k = add(d_k, product("NTS,TND->SND", d_logits_NTS, q))
      d_v = add(d_v, product("NTS,TNU->SNU", weights_NTS, d_out))
      return d_q, d_k, d_v

    first, last = tiles.seen_keys(start, end, bS)
    d_q, d_k, d_v = jax.lax.fori_loop(
      first, last, key_tile, (jnp.zeros(q.shape, f32), *d_keys)
    )
    return (d_k, d_v), d_q.astype(q.dtype)

  def row(q, k, v, *queries):
    k, v = tiles.pad_keys(k, bS), tiles.pad_keys(v, bS)
    tiled = jax.tree.map(lambda x: tiles.split(x, bT), (q, *queries))
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (d_k, d_v), d_q = jax.lax.scan(
      lambda d_keys, xs: tile(d_keys, xs, k, v), zeros, tiled
    )
    return tiles.join(d_q, T), d_k[:S].astype(k.dtype), d_v[:S].astype(v.dtype)

  d_q, d_k, d_v = tiles.map_rows(
    row,
    *(q, k, v, start, end, mask_bits, d_out, lse, delta),
    tile_bytes=4 * bT * bS * q.shape[2],
  )
  return d_q, d_k, d_v, None, None, None


dense_mla.defvjp(_vjp_forward, _vjp_backward)
