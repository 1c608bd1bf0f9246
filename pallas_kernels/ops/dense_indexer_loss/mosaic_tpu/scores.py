"""Index scores of a chunk of queries on TPUs, and their logsumexp."""

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
from pallas_kernels.tpu import products


def scores(
  q_index: Float[Array, "B M T I"],
  k_index: Float[Array, "B S I"],
  w: Float[Array, "B M T"],
  chunk: chunks_lib.Chunk,
  tiles: chunks_lib.Tiles,
) -> tuple[Float[Array, "S chunk"], Float[Array, "1 chunk"]]:
  """Computes index scores, -inf unseen, and logsumexp, 0 for no keys."""
  (_, M, _, I), S = q_index.shape, k_index.shape[1]
  bT, bS = tiles.bT, tiles.bS
  place, seen = chunk.walk(bS)
  return chunks_lib.call(
    f"scores_q{bT}_k{bS}",
    _kernel,
    (tiles.cores, seen),
    in_specs=[
      _Inputs(
        q=tiles.queries(M, bT, I),
        k=tiles.keys(I),
        w=tiles.queries(M, bT),
        start=tiles.row(),
        end=tiles.row(),
      )
    ],
    out_specs=[tiles.pairs(bS), tiles.row()],
    out_shape=[
      jax.ShapeDtypeStruct((S, tiles.chunk), jnp.float32),
      jax.ShapeDtypeStruct((1, tiles.chunk), jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((1, bT), jnp.float32)] * 2,
  )(place, _Inputs(q_index, k_index, w, chunk.start, chunk.end))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
  """What a step of the grid reads."""

  q: Any
  k: Any
  w: Any
  start: Any
  end: Any


def _kernel(place, given, scores, lse, top, total):
  """Computes a tile's scores, and the logsumexp up to it."""
  (_, M, _, _), bS = given.q.shape, given.k.shape[1]

  @pl.when(pl.program_id(1) == 0)
  def _():
    top[...] = jnp.full_like(top, -jnp.inf)
    total[...] = jnp.zeros_like(total)

  scores[...] = jnp.zeros_like(scores)

  @pl.loop(0, M)
  def _(m):
    similarity_ST = products.dot(given.k[0], given.q[0, m], products.NT)
    scores[...] += jnp.maximum(similarity_ST, 0.0) * given.w[0, pl.ds(m, 1)]

  visible_ST = chunks_lib.visible(place, given.start, given.end, bS)
  scores[...] = jnp.where(visible_ST, scores[...], -jnp.inf)
  new_top = jnp.maximum(top[...], scores[...].max(0, keepdims=True))
  finite = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
  part = jnp.exp(scores[...] - finite).sum(0, keepdims=True)
  total[...] = jnp.exp(top[...] - finite) * total[...] + part
  top[...] = new_top
  lse[...] = jnp.where(total[...] > 0, finite + jnp.log(total[...]), 0.0)
