"""Gathers the selected keys for one tile of queries at a time: O(T K) work.

Only the loss's value needs the forward pass, and only if it is measured. The
backward pass recomputes both distributions from the inputs, and from

  d scores = (softmax(I) - p) * d loss

the gradients of the index queries, keys and weights.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import contraction
from pallas_kernels import operands
from pallas_kernels import tiles


def sparse_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  indices: Int[Array, "B T K"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
  query_tile: int | None = None,
) -> Float[Array, "B T"]:
  """See `api.sparse_indexer_loss`. `query_tile`: queries held at once."""
  (_, T, N, D), K = attended.q.shape, indices.shape[2]
  M, I = index.q.shape[2:]
  bytes_per_query = 4 * K * (D + I + 2 * N + 2 * M)
  bT = query_tile or tiles.tile_size(T, bytes_per_query, largest=128)
  attended = jax.lax.stop_gradient(attended)
  return _loss(
    *(index.q, index.k, index.w.astype(jnp.float32), indices),
    *(attended.q, attended.kv, attended.lse, jnp.asarray(measure)),
    *(scale, heads_axis, bT, bytes_per_query * bT),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11))
def _loss(*args):
  return _vjp_forward(*args)[0]


def _compare(indices, q_index, w, q, lse, k_index, kv, scale, heads_axis):
  """Computes both distributions of a tile of queries and their inputs."""
  valid_TK = (indices >= 0) & (indices < kv.shape[0])
  safe_TK = jnp.where(valid_TK, indices, 0)
  take = lambda x: x.at[safe_TK].get(mode="promise_in_bounds")

  logits_TNK = scale * contraction.einsum("TND,TKD->TNK", q, take(kv))
  weights_TNK = jnp.where(
    valid_TK[:, None], jnp.exp(logits_TNK - lse[..., None]), 0.0
  )
  target_TK = weights_TNK.sum(1)
  if heads_axis is not None:
    target_TK = jax.lax.psum(target_TK, heads_axis)
  mass_T1 = target_TK.sum(-1, keepdims=True)
  target_TK = target_TK / jnp.where(mass_T1 > 0, mass_T1, 1.0)

  keys_TKI = take(k_index)
  similarity_TMK = contraction.einsum("TMI,TKI->TMK", q_index, keys_TKI)
  scores_TK = contraction.einsum("TMK,TM->TK", jax.nn.relu(similarity_TMK), w)
  scores_TK = jnp.where(valid_TK, scores_TK, -jnp.inf)
  dead_T1 = ~valid_TK.any(-1, keepdims=True)
  log_index_TK = jax.nn.log_softmax(jnp.where(dead_T1, 0.0, scores_TK))
  return target_TK, log_index_TK, valid_TK, safe_TK, keys_TKI, similarity_TMK


def _tiles(bT, indices, *per_query):
  return tiles.split(indices, bT, -1), *(tiles.split(x, bT) for x in per_query)


def _vjp_forward(
  q_index,
  k_index,
  w,
  indices,
  q,
  kv,
  lse,
  measure,
  scale,
  heads_axis,
  bT,
  tile_bytes,
):
  def tile(*inputs):
    target_TK, log_index_TK, valid_TK, *_ = _compare(*inputs, scale, heads_axis)
    # A key of zero target adds nothing, whatever its score.
    used_TK = valid_TK & (target_TK > 0)
    gap_TK = jnp.log(jnp.where(used_TK, target_TK, 1.0))
    gap_TK -= jnp.where(used_TK, log_index_TK, 0.0)
    return jnp.where(used_TK, target_TK * gap_TK, 0.0).sum(-1)

  def row(q_index, k_index, w, indices, q, kv, lse):
    tiled = _tiles(bT, indices, q_index, w, q, lse)
    loss = jax.lax.map(lambda xs: tile(*xs, k_index, kv), tiled)
    return tiles.join(loss, q.shape[0])

  inputs = q_index, k_index, w, indices, q, kv, lse
  loss_BT = jax.lax.cond(
    measure,
    lambda: tiles.map_rows(row, *inputs, tile_bytes=tile_bytes),
    lambda: jnp.zeros(w.shape[:2], jnp.float32),
  )
  return loss_BT, inputs


def _vjp_backward(scale, heads_axis, bT, tile_bytes, inputs, d_loss):
  q_index, k_index, w, *_ = inputs
  f32 = jnp.float32

  def tile(d_k, queries, k_index, kv):
    indices, q_index, w, q, lse, d_loss = queries
    target_TK, log_index_TK, valid_TK, safe_TK, keys_TKI, similarity_TMK = (
      _compare(indices, q_index, w, q, lse, k_index, kv, scale, heads_axis)
    )
    d_scores_TK = (jnp.exp(log_index_TK) - target_TK) * d_loss[:, None]
    d_scores_TK = jnp.where(valid_TK, d_scores_TK, 0.0)
    d_w = contraction.einsum(
      "TMK,TK->TM", jax.nn.relu(similarity_TMK), d_scores_TK
    )
    d_similarity_TMK = jnp.where(
      similarity_TMK > 0, w[..., None] * d_scores_TK[:, None], 0.0
    ).astype(q_index.dtype)
    d_q = contraction.einsum("TMK,TKI->TMI", d_similarity_TMK, keys_TKI)
    d_keys_TKI = contraction.einsum("TMK,TMI->TKI", d_similarity_TMK, q_index)
    d_k = d_k.at[safe_TK].add(d_keys_TKI, mode="promise_in_bounds")
    return d_k, (d_q.astype(q_index.dtype), d_w)

  def row(q_index, k_index, w, indices, q, kv, lse, d_loss):
    T = q.shape[0]
    tiled = _tiles(bT, indices, q_index, w, q, lse, d_loss)
    d_k, d_queries = jax.lax.scan(
      lambda d_k, queries: tile(d_k, queries, k_index, kv),
      jnp.zeros(k_index.shape, f32),  # summed over tiles: in fp32
      tiled,
    )
    d_q, d_w = (tiles.join(x, T) for x in d_queries)
    return d_q, d_k.astype(k_index.dtype), d_w

  gradients = tiles.map_rows(row, *inputs, d_loss, tile_bytes=tile_bytes)
  return *gradients, *[None] * 5


_loss.defvjp(_vjp_forward, _vjp_backward)
