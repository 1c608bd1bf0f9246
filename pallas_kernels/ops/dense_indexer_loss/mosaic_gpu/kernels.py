"""The two kernels of a chunk of queries, each with two kinds of tiles.

Tiles of one kind are few and long, and alone would leave most of the chip idle
in their last wave; the short ones of the other kind fill the tail.
"""

import math
from typing import Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import chunks
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  gradients as gradients_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  scores as scores_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  target as target_lib,
)

_CLUSTER: Final = 2
# Divisors of the queries of a chunk, and of the width of its arrays.
bT: Final = _CLUSTER * target_lib.bT
bS: Final = _CLUSTER * scores_lib.bS


def distributions(
  index: scores_lib.Index,
  attended: target_lib.Attended,
  where: chunks.Chunk,
  scale: float,
  width: int,
) -> tuple[scores_lib.Scores, Float[Array, "chunk wider"]]:
  """Computes index scores and target of a chunk of queries.

  Args:
    index: Operands of the scores.
    attended: Operands of the target.
    where: The chunk.
    scale: Scale of q.k.
    width: S, rounded up to a multiple of `bS`.

  Returns:
    The scores; in tiles that no query sees, only their maxima and sums are
    written. The attention weights summed over heads; arbitrary at keys that are
    not seen, not written in tiles that no query sees.
  """
  [chunk] = where.queries.start.shape
  target_T, target_S = target_lib.n_tiles(chunk, width)
  scores_T, scores_S = scores_lib.n_tiles(chunk, width)
  n_target = target_T * target_S // _CLUSTER

  def body(index, attended, queries, seen_target, seen_scores, scores, target):
    cluster, i = lax.axis_index("cluster"), lax.axis_index("tile")

    @pl.when(i < n_target)
    def _():
      pair = lax.rem(i, target_T // _CLUSTER)
      key = lax.div(i, target_T // _CLUSTER) * target_lib.bS

      @pl.when(chunks.sees(seen_target, pair, key, key + target_lib.bS))
      def _():
        row = (pair * _CLUSTER + cluster) * target_lib.bT
        target_lib.tile(attended, queries, target, row, key, scale)

    @pl.when(i >= n_target)
    def _():
      i_t = lax.rem(i - n_target, scores_T)
      pair = lax.div(i - n_target, scores_T)
      at = i_t * scores_lib.bT, pair * _CLUSTER + cluster
      visible = chunks.sees(seen_scores, i_t, pair * bS, (pair + 1) * bS)
      pl.when(~visible)(lambda: scores_lib.no_tile(scores, *at))
      pl.when(visible)(lambda: scores_lib.tile(index, queries, scores, *at))

  wider = target_S * target_lib.bS
  return plgpu.kernel(
    body,
    out_type=(
      scores_lib.Scores.types(chunk, width),
      jax.ShapeDtypeStruct((chunk, wider), jnp.float32),
    ),
    grid=(n_target + scores_T * scores_S // _CLUSTER,),
    grid_names=("tile",),
    cluster=(_CLUSTER,),
    cluster_names=("cluster",),
    num_threads=3,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(index, attended, where.queries, where.seen_target, where.seen_scores)


def gradients(
  d_scores: BFloat16[Array, "chunk width"],
  active: Int[Array, "2 chunk width"],
  k_index: Float[Array, "B S 128"],
  weighted_q: Float[Array, "chunk 64 128"],
  where: chunks.Chunk,
  d_k: Float[Array, "width 128"],
) -> tuple[Float[Array, "chunk 64 128"], Float[Array, "width 128"]]:
  """Computes the gradients from d scores, in f32.

  Args:
    d_scores: Of the chunk; arbitrary where a query does not see a key.
    active: Bits of active heads.
    k_index: Index keys.
    weighted_q: w q_index, of the chunk.
    where: The chunk.
    d_k: Sum over the other chunks.

  Returns:
    The sums over keys; `d_k` plus the sums over queries and heads, in no fixed
    order: see `gradients`.
  """
  chunk, width = d_scores.shape
  n_query = chunk // gradients_lib.query_bT
  n_key = chunk // gradients_lib.key_bT, width // gradients_lib.key_bS

  def body(g, k_index, weighted_q, queries, seen, d_k, sums):
    i = lax.axis_index("tile")

    @pl.when(i < n_query)
    def _():
      row = i * gradients_lib.query_bT
      gradients_lib.query_sums(g, k_index, queries, sums, row)

    @pl.when(i >= n_query)
    def _():
      i_t = lax.rem(i - n_query, n_key[0])
      key = lax.div(i - n_query, n_key[0]) * gradients_lib.key_bS

      @pl.when(chunks.sees(seen, i_t, key, key + gradients_lib.key_bS))
      def _():
        row = i_t * gradients_lib.key_bT
        gradients_lib.key_sums(g, weighted_q, d_k, row, key)

  d_k_ref = jax.new_ref(d_k)
  sums = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((chunk, *weighted_q.shape[1:]), jnp.float32),
    grid=(n_query + math.prod(n_key),),
    grid_names=("tile",),
    num_threads=3,
    thread_name="wg",
  )(
    gradients_lib.DScores(d_scores, active),
    *(k_index, weighted_q, where.queries, where.seen_keys, d_k_ref),
  )
  return sums, d_k_ref[...]
