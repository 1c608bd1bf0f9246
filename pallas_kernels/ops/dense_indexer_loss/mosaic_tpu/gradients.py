"""Gradients of the index on TPUs, from a chunk's scores and target."""

import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import (
  chunks as chunks_lib,
)
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products


def vmem_bytes(tiles: chunks_lib.Tiles, M: int, I: int, itemsize: int) -> int:
  """Bytes of VMEM of the kernel."""
  bT, bS, wide = tiles.bT, tiles.bS, lanes.whole(I)
  of_queries = M * bT * (2 * itemsize * wide + 4 * I)
  of_keys = 2 * bS * (itemsize * (wide + I) + 2 * 4 * wide)
  exact = products.exact_bytes(bS * bT + (bS + bT) * wide, itemsize)
  return of_queries + of_keys + (4 + 3) * 4 * bS * bT + exact


def gradients(
  q_index: Float[Array, "B M T I"],
  weighted_q: Float[Array, "B M T I"],
  k_index: Float[Array, "B S I"],
  scores: Float[Array, "S chunk"],
  lse: Float[Array, "1 chunk"],
  target: Float[Array, "S chunk"],
  d_loss: Float[Array, "1 chunk"],
  d_k: Float[Array, "cores S I"],
  chunk: chunks_lib.Chunk,
  tiles: chunks_lib.Tiles,
) -> tuple[Float[Array, "M I chunk"], Float[Array, "cores S I"]]:
  """Computes the sums over keys and over queries, of active heads.

  With d scores = (exp(scores - lse) - target) d_loss, rounded as q_index is:

    the sum over keys of d scores k_index
    d_k + the sum over queries and heads of d scores weighted_q
  """
  _, M, _, I = q_index.shape
  bT, bS, row = tiles.bT, tiles.bS, tiles.row()
  place, seen = chunk.walk(bS)
  queries = tiles.queries(M, bT, I, pipeline_mode=pl.Buffered(1))
  key_sums = pl.BlockSpec((1, bS, I), lambda i, j, place: (i, place[2] + j, 0))
  operands = (
    place,
    _Inputs(
      *(q_index, weighted_q, k_index, k_index.swapaxes(1, 2)),
      *(scores, lse, target, d_loss, chunk.start, chunk.end, d_k),
    ),
  )
  return chunks_lib.call(
    f"gradients_q{bT}_k{bS}",
    _kernel,
    (tiles.cores, seen),
    in_specs=[
      _Inputs(
        q=queries,
        weighted_q=queries,
        k=tiles.keys(I),
        k_turned=pl.BlockSpec(
          (1, I, bS), lambda i, j, place: (place[0], 0, place[2] + j)
        ),
        scores=tiles.pairs(bS),
        lse=row,
        target=tiles.pairs(bS),
        d_loss=row,
        start=row,
        end=row,
        d_k=key_sums,
      )
    ],
    out_specs=[
      pl.BlockSpec(
        (M, I, bT), lambda i, *_: (0, 0, i), pipeline_mode=pl.Buffered(1)
      ),
      key_sums,
    ],
    out_shape=[
      jax.ShapeDtypeStruct((M, I, tiles.chunk), jnp.float32),
      jax.ShapeDtypeStruct(d_k.shape, jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((bS, bT), jnp.float32)],
    input_output_aliases={len(jax.tree.leaves(operands)) - 1: 1},
  )(*operands)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
  """What a step of the grid reads."""

  q: Any
  weighted_q: Any
  k: Any
  k_turned: Any
  scores: Any
  lse: Any
  target: Any
  d_loss: Any
  start: Any
  end: Any
  d_k: Any


def _kernel(place, given, sums, d_k, d_scores):
  """Adds a tile of keys to the queries' sums, and the queries to its own."""
  _, M, _, _ = given.q.shape

  @pl.when(pl.program_id(1) == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  visible_ST = chunks_lib.visible(
    place, given.start, given.end, d_scores.shape[0]
  )
  gap_ST = jnp.exp(given.scores[...] - given.lse[...]) - given.target[...]
  d_scores[...] = jnp.where(visible_ST, gap_ST * given.d_loss[...], 0.0)
  d_k[...] = given.d_k[...]

  @pl.loop(0, M)
  def _(m):
    similarity_ST = products.dot(given.k[0], given.q[0, m], products.NT)
    g_ST = jnp.where(similarity_ST > 0, d_scores[...], 0.0).astype(
      given.q.dtype
    )
    d_k[0] += products.dot(g_ST, given.weighted_q[0, m], products.NN)
    sums[m] += products.dot(given.k_turned[0], g_ST, products.NN)
