"""Streams over tiles of bT queries and bS keys, on any backend.

Only the loss's value needs the forward pass, and only if it is measured. For
each tile of queries the backward pass loops twice over the key tiles that it
sees: once for the logsumexp of the index scores, once for

  d scores = (softmax(I) - p) * d loss

and the gradients of the inputs. Both terms are recomputed from the inputs, so
that nothing of size T x S is saved.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import contraction
from pallas_kernels import operands
from pallas_kernels import tiles


def dense_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
  query_tile: int | None = None,
  key_tile: int | None = None,
) -> Float[Array, "B T"]:
  """See `api.dense_indexer_loss`. Tiles bound the memory, not the result."""
  attended = jax.lax.stop_gradient(attended)
  q, k, lse = attended.q, attended.kv, attended.lse
  (_, T, N, _), S, M = q.shape, k.shape[1], index.q.shape[2]
  bT, bS = tiles.pair_tiles(T, S, 4 * max(M, N))
  op = _Op(scale, heads_axis, query_tile or bT, key_tile or bS)
  start, end = jnp.clip(start, 0, S), jnp.clip(end, 0, S)
  w, measure = index.w.astype(jnp.float32), jnp.asarray(measure)
  return _loss(index.q, index.k, w, start, end, q, k, lse, measure, op)


@dataclasses.dataclass(frozen=True)
class _Op:
  """Context shared by the loops over tiles."""

  scale: float
  heads_axis: str | tuple[str, ...] | None
  bT: int
  bS: int

  def rows(self, tile, init, q_index, k_index, w, start, end, q, k, lse, *more):
    """Scans `tile(carry, queries, keys)` over each batch row's query tiles."""
    # A dead row weighs nothing: exp(logits - inf) is 0, where it sees no key.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)

    def row(k_index, k, *per_query):
      keys = tiles.pad_keys(k_index, self.bS), tiles.pad_keys(k, self.bS)
      tiled = [tiles.split(x, self.bT) for x in per_query]
      carry, ys = jax.lax.scan(
        lambda carry, queries: tile(carry, queries, keys), init(keys), tiled
      )
      T = per_query[0].shape[0]
      return carry, jax.tree.map(lambda y: tiles.join(y, T), ys)

    tile_bytes = 4 * self.bT * self.bS * max(q_index.shape[2], q.shape[2])
    return tiles.map_rows(
      row,
      *(k_index, k, q_index, w, start, end, q, lse, *more),
      tile_bytes=tile_bytes,
    )

  def scores(self, i, q_index, w, start, end, k_index):
    """Index scores [bT, bS] of key tile i, -inf unseen, and q.k [bT, M, bS]."""
    keys = jax.lax.dynamic_slice_in_dim(k_index, i * self.bS, self.bS)
    similarity_TMS = contraction.einsum("TMI,SI->TMS", q_index, keys)
    scores_TS = contraction.einsum("TMS,TM->TS", jax.nn.relu(similarity_TMS), w)
    key = i * self.bS + jnp.arange(self.bS, dtype=start.dtype)[None]
    visible_TS = (key >= start[:, None]) & (key < end[:, None])
    return jnp.where(visible_TS, scores_TS, -jnp.inf), similarity_TMS, keys

  def target(self, i, scores_TS, q, lse, k):
    """Mean over heads of the attention's weights on key tile i: [bT, bS]."""
    k = jax.lax.dynamic_slice_in_dim(k, i * self.bS, self.bS)
    logits_NTS = self.scale * contraction.einsum("TND,SND->NTS", q, k)
    target_TS = jnp.exp(logits_NTS - lse.T[..., None]).mean(0)
    if self.heads_axis is not None:
      target_TS = jax.lax.pmean(target_TS, self.heads_axis)
    return jnp.where(jnp.isneginf(scores_TS), 0.0, target_TS)

  def index_lse(self, seen, q_index, w, start, end, k_index):
    """Logsumexp [bT, 1] of the index scores; 0 for a query without a key."""

    def key_tile(i, carry):
      top_T1, sum_T1 = carry
      scores_TS, *_ = self.scores(i, q_index, w, start, end, k_index)
      new_top = jnp.maximum(top_T1, scores_TS.max(-1, keepdims=True))
      finite = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
      part_T1 = jnp.exp(scores_TS - finite).sum(-1, keepdims=True)
      return new_top, jnp.exp(top_T1 - finite) * sum_T1 + part_T1

    top_T1, sum_T1 = jax.lax.fori_loop(
      *seen,
      key_tile,
      (
        jnp.full((self.bT, 1), -jnp.inf, jnp.float32),
        jnp.zeros((self.bT, 1), jnp.float32),
      ),
    )
    return jnp.where(sum_T1 > 0, top_T1 + jnp.log(sum_T1), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnames=("op",))
def _loss(q_index, k_index, w, start, end, q, k, lse, measure, op):
  return _vjp_forward(q_index, k_index, w, start, end, q, k, lse, measure, op)[
    0
  ]


def _vjp_forward(q_index, k_index, w, start, end, q, k, lse, measure, op):
  def tile(carry, queries, keys):
    q_index, w, start, end, q, lse = queries
    k_index, k = keys
    seen = tiles.seen_keys(start, end, op.bS)
    index = q_index, w, start, end, k_index
    index_lse_T1 = op.index_lse(seen, *index)

    def key_tile(i, loss_T):
      scores_TS, *_ = op.scores(i, *index)
      target_TS = op.target(i, scores_TS, q, lse, k)
      used_TS = target_TS > 0  # others add nothing, whatever their score
      gap_TS = jnp.log(jnp.where(used_TS, target_TS, 1.0))
      gap_TS -= jnp.where(used_TS, scores_TS - index_lse_T1, 0.0)
      return loss_T + (target_TS * gap_TS).sum(-1)

    zeros = jnp.zeros((op.bT,), jnp.float32)
    return carry, jax.lax.fori_loop(*seen, key_tile, zeros)

  inputs = q_index, k_index, w, start, end, q, k, lse
  loss_BT = jax.lax.cond(
    measure,
    lambda: op.rows(tile, lambda keys: None, *inputs)[1],
    lambda: jnp.zeros(w.shape[:2], jnp.float32),
  )
  return loss_BT, inputs


def _vjp_backward(op, inputs, d_loss):
  q_index, k_index, w, *_ = inputs
  S, f32 = k_index.shape[1], jnp.float32

  def tile(d_k, queries, keys):
    q_index, w, start, end, q, lse, d_loss = queries
    k_index, k = keys
    seen = tiles.seen_keys(start, end, op.bS)
    index = q_index, w, start, end, k_index
    index_lse_T1 = op.index_lse(seen, *index)

    def key_tile(i, carry):
      d_q, d_k, d_w = carry
      scores_TS, similarity_TMS, k_tile = op.scores(i, *index)
      target_TS = op.target(i, scores_TS, q, lse, k)
      d_scores_TS = jnp.exp(scores_TS - index_lse_T1) - target_TS
      d_scores_TS *= d_loss[:, None]
      d_w += contraction.einsum(
        "TMS,TS->TM", jax.nn.relu(similarity_TMS), d_scores_TS
      )
      d_similarity_TMS = jnp.where(
        similarity_TMS > 0, w[..., None] * d_scores_TS[:, None], 0.0
      ).astype(q_index.dtype)
      d_q += contraction.einsum("TMS,SI->TMI", d_similarity_TMS, k_tile)
      d_k_tile = contraction.einsum("TMS,TMI->SI", d_similarity_TMS, q_index)
      d_k_tile += jax.lax.dynamic_slice_in_dim(d_k, i * op.bS, op.bS)
      d_k = jax.lax.dynamic_update_slice_in_dim(d_k, d_k_tile, i * op.bS, 0)
      return d_q, d_k, d_w

    zeros = jnp.zeros(q_index.shape, f32), d_k, jnp.zeros(w.shape, f32)
    d_q, d_k, d_w = jax.lax.fori_loop(*seen, key_tile, zeros)
    return d_k, (d_q.astype(q_index.dtype), d_w)

  d_k, (d_q, d_w) = op.rows(
    tile, lambda keys: jnp.zeros(keys[0].shape, f32), *inputs, d_loss
  )
  return d_q, d_k[:, :S].astype(k_index.dtype), d_w, *[None] * 6


_loss.defvjp(_vjp_forward, _vjp_backward)
