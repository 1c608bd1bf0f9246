"""Kernels of the sparse loss on TPUs.

Heads lie along sublanes and keys along lanes: a sum over heads adds whole
registers.
"""

import math
from typing import Final

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import walk as walk_lib
from pallas_kernels.tpu import row_copies as rows_lib
from pallas_kernels.tpu import row_plan as plan_lib

_f32: Final = jnp.float32
_LANES: Final = rows_lib.LANES
_NT: Final = ((1,), (1,)), ((), ())
_NN: Final = ((1,), (0,)), ((), ())
_TN: Final = ((0,), (0,)), ((), ())


def vmem_bytes(
  N: int, D: int, M: int, I: int, K: int, tiles: plan_lib.Tiles
) -> int:
  """Bytes of VMEM of the largest kernel, in bf16, with double buffering."""
  bQ, bK = tiles.bQ, tiles.bK
  places = 4 * walk_lib.places(K, tiles) * bQ * bK
  codes = 4 * bQ * -(-K // bK) * bK
  index = bQ * M * _whole(I)
  rows = lambda width: (8 + 4) * bK * _whole(width)
  products = 3 * 4 * bK * max(min(bQ * max(N, M), 512), N, M)
  columns = 4 * bQ * (N + M) * _LANES
  given = 2 * bQ * N * _whole(D) + 2 * index
  distributions = 2 * (given + 2 * places) + columns + rows(D + _LANES + I)
  gradients = 2 * ((2 + 2 + 4) * index + places) + 4 * index + rows(2 * I)
  return 2 * codes + products + max(distributions, gradients)


def distributions(
  walk: walk_lib.Walk,
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
  (B, _, N, D), (M, I) = q.shape, q_index.shape[2:]
  bQ, bK = walk.tiles.bQ, walk.tiles.bK
  scale *= math.log2(math.e)
  # One row has both: copying it takes as long as copying one of them.
  first_I = _whole(D)
  kv = jnp.pad(kv, [(0, 0), (0, 0), (0, first_I - D)])
  keys = jnp.concatenate([kv, k_index], -1)

  def body(tiles, q, bias, q_index, w, target, scores, bias_column, w_column):
    target[...] = jnp.zeros_like(target)
    scores[...] = jnp.full_like(scores, -jnp.inf)
    bias_column[...] = bias[...].reshape(bias_column.shape)
    w_column[...] = w[...].reshape(w_column.shape)

    def compute(tile, place, first, n):
      some = pl.ds(first, n)
      chosen = tiles.chosen(tile, first, n)
      logits = _dot(q[some].reshape(n * N, D), tiles.stream.keys[:, :D], _NT)
      logits = scale * logits.reshape(n, N, bK) + bias_column[some]
      weights = jnp.exp2(logits).sum(1)
      target[place, some] = jnp.where(chosen, weights, 0.0)
      index_keys = tiles.stream.keys[:, first_I : first_I + I]
      similarity = _dot(q_index[some].reshape(n * M, I), index_keys, _NT)
      active = jnp.maximum(similarity, 0.0).reshape(n, M, bK)
      sums = (active * w_column[some]).sum(1)
      scores[place, some] = jnp.where(chosen, sums, -jnp.inf)

    tiles.visit(max(N, M), bQ, compute)

  blocks = [walk.split(x) for x in (q, bias, q_index, w)]
  shape = B, blocks[0].shape[1], walk.places, bQ, bK
  target, scores = walk.run(
    *("distributions", body, keys, blocks),
    [jax.ShapeDtypeStruct(shape, _f32)] * 2,
    [pltpu.VMEM((bQ, N, 1), _f32), pltpu.VMEM((bQ, M, 1), _f32)],
  )
  return target, scores


def gradients(
  walk: walk_lib.Walk,
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
  (_, _, M, I), bK = q_index.shape, walk.tiles.bK
  bQ, dtype, W = walk.tiles.bQ, q_index.dtype, -(-I // _LANES)

  def body(
    tiles, q, weighted_q, d_scores, sums, d_k, d_rows, before, semaphores
  ):
    core = pl.program_id(0)
    sums[...] = jnp.zeros_like(sums)

    def copy_rows(write):
      def copy(piece, place):
        row, part = d_k.at[core, pl.ds(piece, W)], before.at[:, place]
        source, to = (part, row) if write else (row, part)
        return pltpu.make_async_copy(source, to, semaphores.at[int(write)])

      return copy

    def wait_rows(write):
      rows_lib.wait(before, semaphores.at[int(write)])

    def read(tile):
      # A row may have been changed by the previous tile.
      pl.when(tile > 0)(lambda: wait_rows(write=True))
      d_rows[...] = jnp.zeros_like(d_rows)

    def start(tile, part, n_parts):
      pieces = tiles.stream.pieces.at[tile]
      rows_lib.start(copy_rows(write=False), pieces, 4, part, n_parts)

    def compute(tile, place, first, n):
      some = pl.ds(first, n)
      keys = tiles.stream.keys[:, :I]
      similarity = _dot(q[some].reshape(n * M, I), keys, _NT)
      d = d_scores[place, some].reshape(n, 1, bK)
      g = jnp.where(similarity.reshape(n, M, bK) > 0, d, 0.0)
      g = g.reshape(n * M, bK).astype(dtype)
      sums[some] += _dot(g, keys, _NN).reshape(n, M, I)
      d_rows[:, :I] += _dot(g, weighted_q[some].reshape(n * M, I), _TN)

    def end(tile):
      wait_rows(write=False)
      parts = rows_lib.planes(before, tiles.stream.interpret)
      for i in range(W):
        parts[i] += d_rows[:, i * _LANES : (i + 1) * _LANES]
      pieces = tiles.stream.pieces.at[tile]
      rows_lib.start_all(copy_rows(write=True), pieces, 4)

    tiles.visit(M, bQ, compute, read, start, end)
    wait_rows(write=True)

  blocks = walk.split(q_index), walk.split(weighted_q), d_scores
  sums, d_k = walk.run(
    *("gradients", body, k_index, blocks),
    [jax.ShapeDtypeStruct(blocks[0].shape, _f32)],
    [
      pltpu.VMEM((bK, W * _LANES), _f32),
      pltpu.VMEM((W, bK, 1, _LANES), _f32),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    sums=True,
  )
  return sums.reshape(q_index.shape), d_k


def _dot(x, y, dimensions):
  exact = x.dtype == _f32
  return jax.lax.dot_general(
    x,
    y,
    dimensions,
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=_f32,
  )


def _whole(width):
  return -(-width // _LANES) * _LANES
