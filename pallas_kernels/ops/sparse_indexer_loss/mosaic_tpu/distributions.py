"""Target and scores of the selected keys on TPUs, before they are normalised.

Heads lie along sublanes and keys along lanes: a sum over heads adds whole
registers.

A block of queries writes `places` tiles [bQ, bK], one for each tile of a union.
Without a union, a query's tiles are its rows of the first ones.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import softmax
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products
from pallas_kernels.tpu import row_copies
from pallas_kernels.tpu import row_plan
from pallas_kernels.tpu import row_walk


def places(K: int, tiles: row_plan.Tiles) -> int:
  """Number of tiles that a block writes."""
  longest = min(tiles.longest_union, tiles.bQ)
  return max(-(-longest * K // tiles.bK), row_copies.PREFETCHED)


def vmem_bytes(
  N: int,
  D: int,
  M: int,
  I: int,
  K: int,
  itemsize: int,
  tiles: row_plan.Tiles,
) -> int:
  """Bytes of VMEM of the kernel, with double-buffered inputs and outputs."""
  bQ, bK = tiles.bQ, tiles.bK
  codes = 4 * bQ * -(-K // bK) * bK
  given = itemsize * bQ * (N * lanes.whole(D) + M * lanes.whole(I))
  results = 2 * 4 * places(K, tiles) * bQ * bK
  columns = 4 * bQ * (N + M) * lanes.LANES
  rows = 3 * 4 * bK * lanes.whole(D + lanes.LANES + I)
  heads = max(N, M)
  dots = 3 * 4 * bK * heads * row_walk.queries_at_once(bQ, heads)
  return 2 * (codes + given + results) + columns + rows + dots


def distributions(
  walk: row_walk.Walk,
  n_places: int,
  q_index: Float[Array, "B T M I"],
  k_index: Float[Array, "B S I"],
  w: Float[Array, "B T M"],
  q: Float[Array, "B T N D"],
  kv: Float[Array, "B S D"],
  bias: Float[Array, "B T N"],
  scale: float,
) -> tuple[Float[Array, "B nQ P bQ bK"], Float[Array, "B nQ P bQ bK"]]:
  """Computes target and scores of the selected keys; 0 and -inf elsewhere.

  The target is the sum over heads of exp2(scale log2(e) q.kv + bias).
  """
  (B, _, N, D), S, M = q.shape, k_index.shape[1], q_index.shape[2]
  bQ, bK = walk.tiles.bQ, walk.tiles.bK
  # One row has both: copying it takes as long as copying one of them.
  kv = jnp.pad(kv, [(0, 0), (0, 0), (0, lanes.whole(D) - D)])
  keys = jnp.concatenate([kv, k_index], -1)
  width, dtype = keys.shape[2], keys.dtype
  pitch = row_copies.parts(width, dtype.itemsize)
  queries = _Queries(*map(walk.split, (q, bias, q_index, w)))
  shape = B, queries.q.shape[1], n_places, bQ, bK
  target, scores = walk.call(
    "sparse_indexer_loss_distributions",
    functools.partial(_kernel, scale=scale),
    in_specs=[
      walk.list_specs(),
      pl.BlockSpec(memory_space=pl.ANY),
      walk.specs(queries),
    ],
    out_specs=[walk.block(None, n_places, bQ, bK)] * 2,
    out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2,
    scratch_shapes=[
      _Scratch(
        bias=pltpu.VMEM((bQ, N, 1), jnp.float32),
        w=pltpu.VMEM((bQ, M, 1), jnp.float32),
        stream=row_copies.scratch(width, dtype, bK),
      )
    ],
  )(walk.lists(S, pitch), row_copies.pack(keys, bK, pitch), queries)
  return target, scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scratch:
  """Scratch memory of the kernel."""

  bias: Any
  """The queries', with heads along sublanes."""
  w: Any
  """Likewise."""
  stream: row_copies.Scratch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Queries:
  """A block of queries, of the attention and of the index."""

  q: Any
  bias: Any
  q_index: Any
  w: Any


def _kernel(lists, rows, queries, target, scores, scratch, *, scale, interpret):
  bQ, N, _ = queries.q.shape
  M = queries.q_index.shape[1]
  stream = row_copies.Stream(lists, rows, scratch.stream, interpret)
  target[...] = jnp.zeros_like(target)
  scores[...] = jnp.full_like(scores, -jnp.inf)
  scratch.bias[...] = queries.bias[...].reshape(scratch.bias.shape)
  scratch.w[...] = queries.w[...].reshape(scratch.w.shape)
  is_union = lists.block[0, 1]
  stream.open()

  @pl.loop(0, stream.n_tiles)
  def _(tile):
    stream.read(tile)

    def compare(place, first, n):
      some = pl.ds(first, n)
      chosen = _chosen(lists.codes, tile, first, n)
      weights = _weights(queries, scratch, some, scale)
      target[place, some] = jnp.where(chosen, weights, 0.0)
      sums = _scores(queries, scratch, some)
      scores[place, some] = jnp.where(chosen, sums, -jnp.inf)

    row_walk.visit(tile, stream, is_union, bQ, max(N, M), compare, stream.start)

  stream.close()


def _chosen(codes, tile, first, n):
  """Mask [n, bK] of the tile's keys that each of `n` queries selected."""
  shape = n, codes.shape[1]
  query = first + jax.lax.broadcasted_iota(codes.dtype, shape, 0)
  return (codes[pl.ds(tile, 1)] >> query & 1) == 1


def _weights(queries, scratch, some, scale):
  """Weights [n, bK], summed over heads."""
  (_, N, D), keys = queries.q.shape, scratch.stream.keys
  q = queries.q[some].reshape(-1, D)
  logits = products.dot(q, keys[:, :D], products.NT)
  logits = scale * softmax.LOG2E * logits.reshape(-1, N, keys.shape[0])
  return jnp.exp2(logits + scratch.bias[some]).sum(1)


def _scores(queries, scratch, some):
  """Index scores [n, bK]."""
  _, M, I = queries.q_index.shape
  first = lanes.whole(queries.q.shape[2])  # in a row
  keys = scratch.stream.keys[:, first : first + I]
  q = queries.q_index[some].reshape(-1, I)
  similarity = products.dot(q, keys, products.NT)
  active = jnp.maximum(similarity, 0.0).reshape(-1, M, keys.shape[0])
  return (active * scratch.w[some]).sum(1)
