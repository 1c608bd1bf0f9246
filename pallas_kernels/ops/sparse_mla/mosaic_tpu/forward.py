"""Sparse attention on a TPU: out and lse, a block of queries at a time.

While tiles of rows are attended to, the next ones are prefetched, also those of
the next block. All queries of the block, with all their heads, are multiplied
with a tile of the union; the bits of its codes mask the queries that did not
select the key. A tile that is one query's own is multiplied with its heads
alone.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import row_copies as rows_lib
from pallas_kernels.tpu import row_plan as plan_lib

# Most rows of logits (queries x heads) that are computed at once.
_LOGIT_ROWS = 512
_LOWEST = (
  -1e30
)  # initial running maximum: finite, so that differences are not NaN


def vmem_bytes(
  N: int, D: int, C: int, n_tiles: int, itemsize: int, tiles: plan_lib.Tiles
) -> int:
  """Bytes of VMEM of the kernel, with double-buffered inputs and outputs."""
  bQ, bK, lanes = tiles.bQ, tiles.bK, rows_lib.LANES
  wide = pl.cdiv(D, lanes) * lanes
  rows = bQ * N
  blocks = itemsize * rows * (wide + C) + 4 * bK * n_tiles + 4 * rows
  row = rows_lib.parts(D, itemsize) * lanes * 4
  scratch = 2 * bK * row + bK * wide * itemsize + 4 * rows * (C + 2 * lanes)
  logits = 3 * 4 * bK * min(rows, max(_LOGIT_ROWS, N))
  return 2 * blocks + scratch + logits


def queries_at_once(bQ: int, N: int) -> int:
  """Queries of a union that are multiplied at once: a divisor of bQ."""
  return min(bQ, 1 << max(_LOGIT_ROWS // N, 1).bit_length() - 1)


def forward(
  q: Float[Array, "B T N D"],
  kv: Float[Array, "B S D"],
  plan: plan_lib.Plan,
  latent_rank: int,
  scale: float,
  tiles: plan_lib.Tiles,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """Computes out and lse, with the plan's `tiles`; cores x bQ divides T."""
  (B, T, N, D), C, (bQ, bK) = q.shape, latent_rank, (tiles.bQ, tiles.bK)
  nK, cores = plan.codes.shape[2], tpu.chip().cores
  steps = T // bQ // cores
  W = rows_lib.parts(D, kv.dtype.itemsize)
  here = lambda c, b, i: (b, c * steps + i, 0, 0)
  listed = lambda rows, columns, space: pl.BlockSpec(
    (None, None, rows, columns), here, memory_space=space
  )
  block = lambda *shape: pl.BlockSpec(
    (None, bQ, *shape), lambda *step: here(*step)[: len(shape) + 2]
  )
  interpret = tpu.interpret()
  return pl.pallas_call(
    functools.partial(
      _kernel, scale=scale, group=queries_at_once(bQ, N), interpret=interpret
    ),
    grid=(cores, B, steps),
    in_specs=[
      listed(1, 3, pltpu.SMEM),
      listed(nK + rows_lib.PREFETCHED, bK, pltpu.SMEM),
      listed(nK, bK, pltpu.VMEM),
      block(N, D),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=[block(N, C), block(N)],
    out_shape=[
      jax.ShapeDtypeStruct((B, T, N, C), q.dtype),
      jax.ShapeDtypeStruct((B, T, N), jnp.float32),
    ],
    scratch_shapes=[
      *rows_lib.scratch(D, kv.dtype, bK),
      pltpu.VMEM((bQ, N, C), jnp.float32),
      pltpu.VMEM((bQ, N, 1), jnp.float32),
      pltpu.VMEM((bQ, N, 1), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tpu.chip().vmem,
      # A check for each copy would cost more than the copies.
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name=f"sparse_mla_forward_q{bQ}_k{bK}",
  )(
    plan.blocks,
    rows_lib.listed(plan, kv.shape[1], tiles, cores, W),
    *(plan.codes, q, rows_lib.pack(kv, bK, W)),
  )


def _kernel(
  block_ref,
  pieces_ref,
  codes_ref,
  q_ref,
  rows_ref,
  out_ref,
  lse_ref,
  buffers,
  semaphores,
  turn,
  keys,
  sums,
  top,
  total,
  *,
  scale,
  group,
  interpret,
):
  bQ, N, D = q_ref.shape
  C, bK = out_ref.shape[2], keys.shape[0]
  is_union = block_ref[0, 1]
  tiles_apart = codes_ref.shape[0] // bQ
  stream = rows_lib.Stream(
    *(block_ref, pieces_ref, rows_ref, buffers, semaphores, turn, keys),
    interpret,
  )
  precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
  dot = functools.partial(
    jax.lax.dot_general,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  sums[...] = jnp.zeros_like(sums)
  top[...] = jnp.full_like(top, _LOWEST)
  total[...] = jnp.zeros_like(total)

  def attend(tile, first, n):
    """Attends with `n` queries from `first` on to the tile's keys."""
    some = pl.ds(first, n)
    q = q_ref[some].reshape(n * N, D)
    # The hardware computes powers of two.
    logits = dot(q, keys[:, :D], (((1,), (1,)), ((), ())))
    logits = logits.reshape(n, N, bK) * (scale * math.log2(math.e))
    shift = first + jax.lax.broadcasted_iota(jnp.int32, (n, 1, bK), 0)
    chosen = codes_ref[pl.ds(tile, 1)].reshape(1, 1, bK) >> shift & 1
    logits = jnp.where(chosen == 1, logits, -jnp.inf)
    old = top[some]
    new = jnp.maximum(old, jnp.max(logits, -1, keepdims=True))
    weights = jnp.exp2(logits - new)
    decay = jnp.exp2(old - new)
    top[some] = new
    total[some] = decay * total[some] + jnp.sum(weights, -1, keepdims=True)
    weights = weights.astype(keys.dtype).reshape(n * N, bK)
    mixed = dot(weights, keys[:, :C], (((1,), (0,)), ((), ())))
    sums[some] = decay * sums[some] + mixed.reshape(n, N, C)

  stream.open()

  @pl.loop(0, stream.n_tiles)
  def _(tile):
    stream.read(tile)

    @pl.when(is_union == 1)
    def _():
      @pl.loop(0, bQ // group)
      def _(i):
        stream.start(tile, i, bQ // group)
        attend(tile, i * group, group)

    @pl.when(is_union == 0)
    def _():
      stream.start(tile)
      attend(tile, tile // tiles_apart, 1)

  stream.close()

  alive = total[...] > 0
  whole = jnp.where(alive, total[...], 1.0)
  out_ref[...] = (sums[...] / whole).astype(out_ref.dtype)
  lse = (top[...] + jnp.log2(whole)) * math.log(2)
  lse_ref[...] = jnp.where(alive, lse, -jnp.inf).reshape(bQ, N)
