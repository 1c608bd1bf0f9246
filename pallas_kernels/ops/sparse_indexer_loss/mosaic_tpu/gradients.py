"""Gradients of the index on TPUs, from those of its scores.

Heads lie along sublanes and keys along lanes, as in `distributions`.
"""

import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import (
  distributions as distributions_lib,
)
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products
from pallas_kernels.tpu import row_copies
from pallas_kernels.tpu import row_plan
from pallas_kernels.tpu import row_sums
from pallas_kernels.tpu import row_walk


def vmem_bytes(
  M: int, I: int, K: int, itemsize: int, tiles: row_plan.Tiles
) -> int:
  """Bytes of VMEM of the kernel, with double-buffered inputs and outputs."""
  bQ, bK = tiles.bQ, tiles.bK
  codes = 4 * bQ * -(-K // bK) * bK
  index = bQ * M * lanes.whole(I)
  d_scores = 4 * distributions_lib.places(K, tiles) * bQ * bK
  given = (2 * itemsize + 4) * index + d_scores
  rows = 3 * 4 * bK * lanes.whole(2 * I)
  dots = 3 * 4 * bK * M * row_walk.queries_at_once(bQ, M)
  return 2 * (codes + given) + 4 * index + rows + dots


def gradients(
  walk: row_walk.Walk,
  q_index: Float[Array, "B T M I"],
  weighted_q: Float[Array, "B T M I"],
  k_index: Float[Array, "B S I"],
  d_scores: Float[Array, "B nQ P bQ bK"],
) -> tuple[Float[Array, "B T M I"], Float[Array, "B S I"]]:
  """Computes the sums over keys and over queries, of active heads.

  With d scores rounded as q_index is:

    the sum over keys of d scores k_index
    the sum over queries and heads of d scores weighted_q
  """
  (B, S, I), bK = k_index.shape, walk.tiles.bK
  pitch = lanes.whole(I) // lanes.LANES
  queries = _Queries(walk.split(q_index), walk.split(weighted_q), d_scores)
  lists = walk.lists(S, pitch)
  rows = row_copies.pack(k_index, bK, pitch)
  operands = lists, rows, queries, row_sums.zeros(rows, walk.cores)
  hbm = pl.BlockSpec(memory_space=pl.ANY)
  sums, d_k = walk.call(
    "sparse_indexer_loss_gradients",
    _kernel,
    in_specs=[walk.list_specs(), hbm, walk.specs(queries), hbm],
    out_specs=[walk.specs(queries.q), hbm],
    out_shape=[
      jax.ShapeDtypeStruct(queries.q.shape, jnp.float32),
      jax.ShapeDtypeStruct(operands[-1].shape, jnp.float32),
    ],
    input_output_aliases={len(jax.tree.leaves(operands)) - 1: 1},
    scratch_shapes=[
      row_sums.scratch(I, bK),
      row_copies.scratch(I, k_index.dtype, bK),
    ],
  )(*operands)
  d_k = row_sums.total(d_k, B, S, I)
  return sums.reshape(q_index.shape), d_k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Queries:
  """A block of queries, and what their gradients are computed from."""

  q: Any
  weighted_q: Any
  d_scores: Any


def _kernel(
  lists, rows, queries, _, sums, d_k_ref, sums_scratch, scratch, *, interpret
):
  bQ, M, I = queries.q.shape
  stream = row_copies.Stream(lists, rows, scratch, interpret)
  d_k = row_sums.Sums(stream, d_k_ref, pl.program_id(0), sums_scratch)
  added = sums_scratch.added
  sums[...] = jnp.zeros_like(sums)
  is_union = lists.block[0, 1]
  stream.open()

  @pl.loop(0, stream.n_tiles)
  def _(tile):
    stream.read(tile)
    d_k.settle(tile)
    added[...] = jnp.zeros_like(added)
    row_walk.visit(
      *(tile, stream, is_union, bQ, M),
      lambda *at: _add(queries, stream.keys, sums, added, *at),
      d_k.start,
    )
    d_k.add(tile)

  stream.close()
  d_k.close()


def _add(queries, keys, sums, d_rows, place, first, n):
  """Adds the gradients of `n` queries from `first` on, and of their keys."""
  (_, M, I), some = queries.q.shape, pl.ds(first, n)
  keys = keys[:, :I]
  q = queries.q[some].reshape(n * M, I)
  similarity = products.dot(q, keys, products.NT)
  d = queries.d_scores[place, some].reshape(n, 1, -1)
  g = jnp.where(similarity.reshape(n, M, -1) > 0, d, 0.0)
  g = g.reshape(n * M, -1).astype(q.dtype)
  sums[some] += products.dot(g, keys, products.NN).reshape(n, M, I)
  d_rows[:, :I] += products.dot(
    g, queries.weighted_q[some].reshape(n * M, I), products.TN
  )
