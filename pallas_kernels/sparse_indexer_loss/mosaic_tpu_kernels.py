"""The three kernels of a TPU.

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

from pallas_kernels.sparse_indexer_loss import mosaic_tpu_walk as walk_lib
from pallas_kernels.sparse_mla import mosaic_tpu_plan as plan_lib
from pallas_kernels.sparse_mla import mosaic_tpu_rows as rows_lib

_f32: Final = jnp.float32
_LANES: Final = rows_lib.LANES
_NT: Final = ((1,), (1,)), ((), ())
_NN: Final = ((1,), (0,)), ((), ())
_TN: Final = ((0,), (0,)), ((), ())


def vmem_bytes(
  N: int, D: int, M: int, I: int, K: int, tiles: plan_lib.Tiles
) -> int:
  """What the largest kernel takes, in bf16; inputs and outputs twice."""
  bQ, bK = tiles.bQ, tiles.bK
  whole = lambda width: -(-width // _LANES) * _LANES
  places = 4 * walk_lib.places(K, tiles) * bQ * bK
  codes = 4 * bQ * -(-K // bK) * bK
  rows = lambda width: (8 + 4) * bK * whole(width)
  products = lambda heads: 3 * 4 * bK * min(bQ * heads, max(512, heads))
  column = lambda heads: 4 * bQ * heads * _LANES
  target = 2 * (2 * bQ * N * whole(D) + places) + column(N)
  compare = 2 * (2 * bQ * M * whole(I) + 2 * places) + column(M) + 4 * places
  index = 2 * (bQ * M * whole(I) * (2 + 2 + 4) + places)
  gradients = index + 3 * 4 * bK * whole(I) + 4 * bQ * M * whole(I)
  return 2 * codes + max(
    target + rows(D) + products(N),
    max(compare, gradients) + rows(I) + products(M),
  )


def target(
  walk: walk_lib.Walk,
  q: Float[Array, "B T N D"],
  kv: Float[Array, "B S D"],
  bias: Float[Array, "B T N"],
  scale: float,
) -> Float[Array, "B nQ P bQ bK"]:
  """Sum over heads of exp2(scale log2(e) q.k + bias); 0 for keys not chosen."""
  (B, _, N, D), bQ, bK = q.shape, walk.tiles.bQ, walk.tiles.bK
  scale *= math.log2(math.e)

  def body(tiles, q, bias, target, column):
    target[...] = jnp.zeros_like(target)
    column[...] = bias[...].reshape(column.shape)

    def compute(tile, place, first, n):
      some = pl.ds(first, n)
      logits = _dot(q[some].reshape(n * N, D), tiles.keys[:, :D], _NT)
      logits = scale * logits.reshape(n, N, bK) + column[some]
      weights = jnp.exp2(logits).sum(1)
      chosen = tiles.chosen(tile, first, n)
      target[place, some] = jnp.where(chosen, weights, 0.0)

    tiles.visit(N, bQ, compute)

  blocks = walk.split(q), walk.split(bias)
  shape = B, blocks[0].shape[1], walk.places, bQ, bK
  (result,) = walk.run(
    *("target", body, kv, blocks, [jax.ShapeDtypeStruct(shape, _f32)]),
    [pltpu.VMEM((bQ, N, 1), _f32)],
  )
  return result


def compare(
  walk: walk_lib.Walk,
  q_index: Float[Array, "B T M I"],
  k_index: Float[Array, "B S I"],
  w: Float[Array, "B T M"],
  target: Float[Array, "B nQ P bQ bK"],
) -> tuple[Float[Array, "B T"], Float[Array, "B nQ P bQ bK"]]:
  """KL(p || softmax(scores)), and softmax(scores) - p; p: target over its sum.

  0 for a query without a key, and at places without one.
  """
  (B, T, M, I), bQ, bK = q_index.shape, walk.tiles.bQ, walk.tiles.bK

  def body(tiles, q, w, target, loss, gap, column):
    # At first, the scores stand where the gap will.
    gap[...] = jnp.full_like(gap, -jnp.inf)
    column[...] = w[...].reshape(column.shape)

    def compute(tile, place, first, n):
      some = pl.ds(first, n)
      similarity = _dot(q[some].reshape(n * M, I), tiles.keys[:, :I], _NT)
      active = jnp.maximum(similarity, 0.0).reshape(n, M, bK)
      scores = (active * column[some]).sum(1)
      chosen = tiles.chosen(tile, first, n)
      gap[place, some] = jnp.where(chosen, scores, -jnp.inf)

    tiles.visit(M, bQ, compute)
    total = lambda x: x.sum(0, keepdims=True).sum(2, keepdims=True)
    scores = gap[...]
    top = scores.max(0, keepdims=True).max(2, keepdims=True)
    scores -= jnp.where(jnp.isneginf(top), 0.0, top)
    powers = jnp.exp(scores)
    mass = total(powers)
    mass = jnp.where(mass > 0, mass, 1.0)
    target_mass = total(target[...])
    p = target[...] / jnp.where(target_mass > 0, target_mass, 1.0)
    used = p > 0
    divergence = jnp.log(jnp.where(used, p, 1.0))
    divergence -= jnp.where(used, scores - jnp.log(mass), 0.0)
    loss[...] = total(p * divergence)[0]
    gap[...] = powers / mass - p

  blocks = walk.split(q_index), walk.split(w), target
  nQ = target.shape[1]
  loss, gap = walk.run(
    *("compare", body, k_index, blocks),
    [
      jax.ShapeDtypeStruct((B, nQ, bQ, 1), _f32),
      jax.ShapeDtypeStruct(target.shape, _f32),
    ],
    [pltpu.VMEM((bQ, M, 1), _f32)],
  )
  return loss.reshape(B, T), gap


def gradients(
  walk: walk_lib.Walk,
  q_index: Float[Array, "B T M I"],
  weighted_q: Float[Array, "B T M I"],
  k_index: Float[Array, "B S I"],
  d_scores: Float[Array, "B nQ P bQ bK"],
) -> tuple[Float[Array, "B T M I"], Float[Array, "B S I"]]:
  """Sums over keys, of each head that is active there; and over queries.

  With d scores rounded as q_index is:

    the sum over keys of d scores k_index
    the sum over queries and heads of d scores weighted_q
  """
  (B, _, M, I), bQ, bK = q_index.shape, walk.tiles.bQ, walk.tiles.bK
  S, dtype, W = k_index.shape[1], q_index.dtype, -(-I // _LANES)

  def body(
    tiles, q, weighted_q, d_scores, sums, d_k, d_rows, before, semaphores
  ):
    core, batch = pl.program_id(0), pl.program_id(1)
    sums[...] = jnp.zeros_like(sums)

    def copy_rows(tile, write):
      def copy(key, place):
        row, part = d_k.at[core, batch, key], before.at[:, place]
        source, to = (part, row) if write else (row, part)
        return pltpu.make_async_copy(source, to, semaphores.at[int(write)])

      rows_lib.start(copy, tiles.codes.at[tile], bQ, 4)

    def wait_rows(write):
      rows_lib.wait(before, semaphores.at[int(write)])

    def begin(tile):
      # A row may be one that the tile before has changed.
      pl.when(tile > 0)(lambda: wait_rows(write=True))
      copy_rows(tile, write=False)
      d_rows[...] = jnp.zeros_like(d_rows)

    def compute(tile, place, first, n):
      some = pl.ds(first, n)
      keys = tiles.keys[:, :I]
      similarity = _dot(q[some].reshape(n * M, I), keys, _NT)
      d = d_scores[place, some].reshape(n, 1, bK)
      g = jnp.where(similarity.reshape(n, M, bK) > 0, d, 0.0)
      g = g.reshape(n * M, bK).astype(dtype)
      sums[some] += _dot(g, keys, _NN).reshape(n, M, I)
      d_rows[:, :I] += _dot(g, weighted_q[some].reshape(n * M, I), _TN)

    def end(tile):
      wait_rows(write=False)
      parts = rows_lib.planes(before, tiles.interpret)
      for i in range(W):
        parts[i] += d_rows[:, i * _LANES : (i + 1) * _LANES]
      copy_rows(tile, write=True)

    tiles.visit(M, bQ, compute, begin, end)
    pl.when(tiles.block[0, 0] > 0)(lambda: wait_rows(write=True))

  blocks = walk.split(q_index), walk.split(weighted_q), d_scores
  d_k = jnp.zeros((walk.cores, B, S + bK, W, 1, _LANES), _f32)
  sums, d_k = walk.run(
    *("gradients", body, k_index, blocks),
    [jax.ShapeDtypeStruct(blocks[0].shape, _f32)],
    [
      pltpu.VMEM((bK, W * _LANES), _f32),
      pltpu.VMEM((W, bK, 1, _LANES), _f32),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    [d_k],
  )
  d_k = d_k.sum(0).reshape(B, S + bK, W * _LANES)
  return sums.reshape(q_index.shape), d_k[:, :S, :I]


def _dot(x, y, dimensions):
  exact = x.dtype == _f32
  return jax.lax.dot_general(
    x,
    y,
    dimensions,
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=_f32,
  )
