"""Launches the two kernels of a chunk of queries, each with two kinds of tiles.

Tiles of one kind are few and long, and alone would leave most of the chip idle
in their last wave; the short ones of the other kind fill the tail.
"""

import dataclasses
import math
from typing import Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  gradients as gradient,
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Queries of a chunk, and the ranges of keys that they see.

  Attributes:
    place: Batch row and first query.
    start: First key that each query sees.
    end: One past the last key.
    seen_target: For each `bT` queries, the first key that one of them sees, and
      one past the last, interleaved.
    seen_scores: For each tile of `scores`, likewise.
    seen_keys: For each tile of `gradients.key_sums`, likewise.
  """

  place: Int[Array, "*n 2"]
  start: Int[Array, "*n chunk"]
  end: Int[Array, "*n chunk"]
  seen_target: Int[Array, "*n target"]
  seen_scores: Int[Array, "*n scores"]
  seen_keys: Int[Array, "*n keys"]


def chunks(
  start: Int[Array, "B T"], end: Int[Array, "B T"], chunk: int
) -> Chunk:
  """Splits the queries into chunks [B, n]."""
  B, T = start.shape
  rows, queries = jnp.arange(B), jnp.arange(0, T, chunk)
  start, end = (x.reshape(B, -1, chunk) for x in (start, end))
  blocks = bT, scores_lib.bT, gradient.key_bT
  return Chunk(
    jnp.stack(jnp.meshgrid(rows, queries, indexing="ij"), -1).astype(jnp.int32),
    *(start, end),
    *(_seen(start, end, block) for block in blocks),
  )


def _seen(start, end, block):
  """Ranges of keys that blocks of queries see: [B, n, 2 chunk / block]."""
  start, end = (x.reshape(*x.shape[:2], -1, block) for x in (start, end))
  alive = start < end
  first = jnp.where(alive, start, jnp.iinfo(start.dtype).max).min(-1)
  last = jnp.where(alive, end, 0).max(-1)
  return jnp.stack([first, last], -1).reshape(*start.shape[:2], -1)


def distributions(
  q_index: Float[Array, "B T 64 128"],
  k_index: Float[Array, "B S 128"],
  half_w: Float[Array, "B 64 T"],
  q: Float[Array, "B T N HR"],
  k: Float[Array, "B S N HR"],
  bias: Float[Array, "B N T"],
  where: Chunk,
  scale: float,
  width: int,
) -> tuple[
  Float[Array, "chunk width"],
  Int[Array, "2 chunk width"],
  Float[Array, "nS chunk"],
  Float[Array, "nS chunk"],
  Float[Array, "chunk wider"],
]:
  """Computes index scores and target of a chunk of queries.

  Args:
    q_index: Index queries of all chunks.
    k_index: Index keys.
    half_w: Half of the head weights.
    q: Queries.
    k: Keys.
    bias: -lse, in base 2.
    where: The chunk.
    scale: Scale of q.k.
    width: S, rounded up to a multiple of `bS`.

  Returns:
    Scores, bits of active heads, and for each tile of keys the maximum score
    and the sum of exponentials relative to it: see `scores.tile`.
    The attention weights summed over heads; arbitrary at keys that are not
    seen. In tiles that no query sees, only the maxima and the sums of
    exponentials are written.
  """
  chunk = where.start.shape[0]
  target_T, target_S = target_lib.n_tiles(chunk, width)
  scores_T, scores_S = scores_lib.n_tiles(chunk, width)
  n_target = target_T * target_S // _CLUSTER

  def body(
    q_index,
    k_index,
    half_w,
    q,
    k,
    bias,
    place,
    start,
    end,
    seen,
    rows,
    *outputs,
  ):
    *outputs, target = outputs
    cluster = lax.axis_index("cluster")
    i = lax.axis_index("tile")

    @pl.when(i < n_target)
    def _():
      pair = lax.rem(i, target_T // _CLUSTER)
      key = lax.div(i, target_T // _CLUSTER) * target_lib.bS

      @pl.when(
        (key < seen[2 * pair + 1]) & (key + target_lib.bS > seen[2 * pair])
      )
      def _():
        pl.run_scoped(
          lambda *scratch: target_lib.tile(
            (q, k, bias, place),
            target,
            (pair * _CLUSTER + cluster) * target_lib.bT,
            key,
            scale,
            *scratch,
          ),
          *target_lib.scratch(q.dtype),
          collective_axes="wg",
        )

    @pl.when(i >= n_target)
    def _():
      i_t = lax.rem(i - n_target, scores_T)
      pair = lax.div(i - n_target, scores_T)
      tile = i_t * scores_lib.bT, pair * _CLUSTER + cluster
      visible = (pair * bS < rows[2 * i_t + 1]) & (
        (pair + 1) * bS > rows[2 * i_t]
      )
      pl.when(~visible)(lambda: scores_lib.no_tile(outputs, *tile))

      @pl.when(visible)
      def _():
        pl.run_scoped(
          lambda *scratch: scores_lib.tile(
            (q_index, k_index, half_w, place, start, end),
            outputs,
            *tile,
            *scratch,
          ),
          *scores_lib.scratch(q_index.dtype),
          collective_axes="wg",
        )

  f32 = jnp.float32
  words = scores_lib.HEADS // scores_lib.WORD
  return plgpu.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct((chunk, width), f32),
      jax.ShapeDtypeStruct((words, chunk, width), jnp.int32),
      jax.ShapeDtypeStruct((scores_S, chunk), f32),
      jax.ShapeDtypeStruct((scores_S, chunk), f32),
      jax.ShapeDtypeStruct((chunk, target_S * target_lib.bS), f32),
    ),
    grid=(n_target + scores_T * scores_S // _CLUSTER,),
    grid_names=("tile",),
    cluster=(_CLUSTER,),
    cluster_names=("cluster",),
    num_threads=3,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(
    *(
      q_index,
      k_index,
      half_w,
      q,
      k,
      bias,
      where.place,
      where.start,
      where.end,
    ),
    *(where.seen_target, where.seen_scores),
  )


def gradients(
  d_scores: BFloat16[Array, "chunk width"],
  active: Int[Array, "2 chunk width"],
  k_index: Float[Array, "B S 128"],
  weighted_q: Float[Array, "chunk 64 128"],
  where: Chunk,
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
  n_query = chunk // gradient.query_bT
  n_key = chunk // gradient.key_bT, width // gradient.key_bS

  def body(d_scores, active, k_index, q, place, start, end, seen, d_k, sums):
    i = lax.axis_index("tile")

    @pl.when(i < n_query)
    def _():
      pl.run_scoped(
        lambda *scratch: gradient.query_sums(
          (d_scores, active, k_index, place, start, end),
          sums,
          i * gradient.query_bT,
          *scratch,
        ),
        *gradient.query_scratch(k_index.dtype),
        collective_axes="wg",
      )

    @pl.when(i >= n_query)
    def _():
      i_t = lax.rem(i - n_query, n_key[0])
      key = lax.div(i - n_query, n_key[0]) * gradient.key_bS

      @pl.when(
        (key < seen[2 * i_t + 1]) & (key + gradient.key_bS > seen[2 * i_t])
      )
      def _():
        pl.run_scoped(
          lambda *scratch: gradient.key_sums(
            (d_scores, active, q),
            d_k,
            i_t * gradient.key_bT,
            key,
            *scratch,
          ),
          *gradient.key_scratch(q.dtype),
          collective_axes="wg",
        )

  d_k_ref = jax.new_ref(d_k)
  sums = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((chunk, *weighted_q.shape[1:]), jnp.float32),
    grid=(n_query + math.prod(n_key),),
    grid_names=("tile",),
    num_threads=3,
    thread_name="wg",
  )(
    *(d_scores, active, k_index, weighted_q),
    *(where.place, where.start, where.end, where.seen_keys, d_k_ref),
  )
  return sums, d_k_ref[...]
