"""Sparse attention on a TPU: out and lse, a block of queries at a time.

While tiles of rows are attended to, the next ones are prefetched, also those of
the next block. All queries of the block, with all their heads, are multiplied
with a tile of the union; the bits of its codes mask the queries that did not
select the key. A tile that is one query's own is multiplied with its heads
alone.
"""

import dataclasses
import functools
import math
from typing import Any, Final

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

# Initial running maximum: finite, so that differences are not NaN.
_LOWEST: Final = -1e30


def vmem_bytes(
  N: int, D: int, C: int, n_tiles: int, itemsize: int, tiles: row_plan.Tiles
) -> int:
  """Bytes of VMEM of the kernel, with double-buffered inputs and outputs."""
  bQ, bK, wide = tiles.bQ, tiles.bK, lanes.whole(D)
  rows = bQ * N
  blocks = itemsize * rows * (wide + C) + 4 * bK * n_tiles + 4 * rows
  row = row_copies.parts(D, itemsize) * lanes.LANES * 4
  scratch = 2 * bK * row + bK * wide * itemsize
  scratch += 4 * rows * (C + 2 * lanes.LANES)
  logits = 3 * 4 * bK * N * row_walk.queries_at_once(bQ, N)
  return 2 * blocks + scratch + logits


def forward(
  q: Float[Array, "B T N D"],
  kv: Float[Array, "B S D"],
  walk: row_walk.Walk,
  latent_rank: int,
  scale: float,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """Computes out and lse."""
  (B, T, N, D), C = q.shape, latent_rank
  bQ, bK = walk.tiles.bQ, walk.tiles.bK
  pitch = row_copies.parts(D, kv.dtype.itemsize)
  return walk.call(
    "sparse_mla_forward",
    functools.partial(_kernel, scale=scale),
    in_specs=[
      walk.list_specs(),
      walk.block(bQ, N, D),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=[walk.block(bQ, N, C), walk.block(bQ, N)],
    out_shape=[
      jax.ShapeDtypeStruct((B, T, N, C), q.dtype),
      jax.ShapeDtypeStruct((B, T, N), jnp.float32),
    ],
    scratch_shapes=[
      row_copies.scratch(D, kv.dtype, bK),
      _Sums(
        out=pltpu.VMEM((bQ, N, C), jnp.float32),
        top=pltpu.VMEM((bQ, N, 1), jnp.float32),
        total=pltpu.VMEM((bQ, N, 1), jnp.float32),
      ),
    ],
  )(walk.lists(kv.shape[1], pitch), q, row_copies.pack(kv, bK, pitch))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
  """Running sums of a block's softmax, and its running maximum, in base 2."""

  out: Any
  top: Any
  total: Any


def _kernel(
  lists, q_ref, rows, out_ref, lse_ref, scratch, sums, *, scale, interpret
):
  bQ, N, _ = q_ref.shape
  is_union = lists.block[0, 1]
  stream = row_copies.Stream(lists, rows, scratch, interpret)
  sums.out[...] = jnp.zeros_like(sums.out)
  sums.top[...] = jnp.full_like(sums.top, _LOWEST)
  sums.total[...] = jnp.zeros_like(sums.total)
  stream.open()

  @pl.loop(0, stream.n_tiles)
  def _(tile):
    stream.read(tile)
    row_walk.visit(
      *(tile, stream, is_union, bQ, N),
      lambda _, first, n: _attend(stream, tile, q_ref, sums, first, n, scale),
      stream.start,
      loop=True,
    )

  stream.close()
  _write(sums, out_ref, lse_ref)


def _attend(stream, tile, q_ref, sums, first, n, scale):
  """Attends with `n` queries from `first` on to the tile's keys."""
  (_, N, D), keys, some = q_ref.shape, stream.keys, pl.ds(first, n)
  bK, C = keys.shape[0], sums.out.shape[2]
  q = q_ref[some].reshape(n * N, D)
  logits = products.dot(q, keys[:, :D], products.NT)
  logits = logits.reshape(n, N, bK) * (scale * softmax.LOG2E)
  shift = first + jax.lax.broadcasted_iota(jnp.int32, (n, 1, bK), 0)
  codes = stream.lists.codes[pl.ds(tile, 1)].reshape(1, 1, bK)
  logits = jnp.where(codes >> shift & 1 == 1, logits, -jnp.inf)
  old = sums.top[some]
  new = jnp.maximum(old, jnp.max(logits, -1, keepdims=True))
  weights = jnp.exp2(logits - new)
  decay = jnp.exp2(old - new)
  sums.top[some] = new
  sums.total[some] = decay * sums.total[some] + jnp.sum(
    weights, -1, keepdims=True
  )
  weights = weights.astype(keys.dtype).reshape(n * N, bK)
  out = products.dot(weights, keys[:, :C], products.NN)
  sums.out[some] = decay * sums.out[some] + out.reshape(n, N, C)


def _write(sums, out_ref, lse_ref):
  """Writes the block's results."""
  alive = sums.total[...] > 0
  whole = jnp.where(alive, sums.total[...], 1.0)
  out_ref[...] = (sums.out[...] / whole).astype(out_ref.dtype)
  lse = (sums.top[...] + jnp.log2(whole)) * math.log(2)
  lse_ref[...] = jnp.where(alive, lse, -jnp.inf).reshape(lse_ref.shape)
