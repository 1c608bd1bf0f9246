"""Sparse attention on a TPU: out and lse, a block of queries at a time.

While a tile of rows is attended to, the next one is copied, be it the first of
the next block. All queries of the block, with all their heads, are multiplied
with a tile of the union; the bits of its codes say which of them chose the key.
A tile that is one query's own is multiplied with its heads alone.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tpu
from pallas_kernels.sparse_mla import mosaic_tpu_plan as plan_lib
from pallas_kernels.sparse_mla import mosaic_tpu_rows as rows_lib

# Rows of logits (queries x heads) that are computed at once, at most.
_LOGIT_ROWS = 512
_LOWEST = -1e30  # of a running maximum: finite, so that differences are numbers


def vmem_bytes(
  N: int, D: int, C: int, n_tiles: int, itemsize: int, tiles: plan_lib.Tiles
) -> int:
  """What the kernel holds in VMEM, inputs and outputs twice."""
  bQ, bK, lanes = tiles.bQ, tiles.bK, rows_lib.LANES
  wide = pl.cdiv(D, lanes) * lanes
  rows = bQ * N
  blocks = itemsize * rows * (wide + C) + 4 * bK * n_tiles + 4 * rows
  row = rows_lib.parts(D, itemsize) * lanes * 4
  scratch = 2 * bK * row + bK * wide * itemsize + 4 * rows * (C + 2 * lanes)
  logits = 3 * 4 * bK * min(rows, max(_LOGIT_ROWS, N))
  return 2 * blocks + scratch + logits


def queries_at_once(bQ: int, N: int) -> int:
  """How many queries of a union are multiplied at once: a divisor of bQ."""
  return min(bQ, 1 << max(_LOGIT_ROWS // N, 1).bit_length() - 1)


def forward(
  q: Float[Array, "B T N D"],
  kv: Float[Array, "B S D"],
  plan: plan_lib.Plan,
  latent_rank: int,
  scale: float,
  tiles: plan_lib.Tiles,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """`tiles` are what the plan was made with; T is a multiple of cores x bQ."""
  (B, T, N, D), C, (bQ, bK) = q.shape, latent_rank, (tiles.bQ, tiles.bK)
  nK, cores = plan.codes.shape[2], tpu.chip().cores
  steps = T // bQ // cores
  rows = rows_lib.pack(kv, bK)
  W, wide = rows.shape[2], pl.cdiv(D, rows_lib.LANES) * rows_lib.LANES
  here = lambda c, b, i: (b, c * steps + i, 0, 0)

  def following(c, b, i):
    b += i + 1 == steps
    return jnp.minimum(b, B - 1), c * steps + (i + 1) % steps, 0, 0

  def listed(index_map, rows, columns, space=pltpu.SMEM):
    shape = (None, None, rows, columns)
    return pl.BlockSpec(shape, index_map, memory_space=space)

  block = lambda *shape: pl.BlockSpec(
    (None, bQ, *shape), lambda *step: here(*step)[: len(shape) + 2]
  )
  # The scalar unit, which starts the copies, has no time to spare for shifts.
  keys = plan.codes >> bQ
  interpret = tpu.interpret()
  return pl.pallas_call(
    functools.partial(
      _kernel, scale=scale, group=queries_at_once(bQ, N), interpret=interpret
    ),
    grid=(cores, B, steps),
    in_specs=[
      listed(here, 1, 3),
      listed(here, nK, bK),
      listed(following, 1, 3),
      listed(following, 1, bK),
      listed(here, nK, bK, space=pltpu.VMEM),
      block(N, D),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=[block(N, C), block(N)],
    out_shape=[
      jax.ShapeDtypeStruct((B, T, N, C), q.dtype),
      jax.ShapeDtypeStruct((B, T, N), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((2, W, bK, 1, rows_lib.LANES), rows.dtype),
      pltpu.SemaphoreType.DMA((2,)),
      pltpu.SMEM((1,), jnp.int32),
      pltpu.VMEM((bK, wide), kv.dtype),
      pltpu.VMEM((bQ, N, C), jnp.float32),
      pltpu.VMEM((bQ, N, 1), jnp.float32),
      pltpu.VMEM((bQ, N, 1), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tpu.chip().vmem,
      # A check for each of the copies would cost more than the copies.
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name=f"sparse_mla_forward_q{bQ}_k{bK}",
  )(
    *(plan.blocks, keys, plan.blocks, keys[:, :, :1]),
    *(plan.codes, q, rows),
  )


def _kernel(
  block_ref,
  keys_ref,
  next_block_ref,
  next_keys_ref,
  codes_ref,
  q_ref,
  kv_ref,
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
  n_tiles, is_union = block_ref[0, 0], block_ref[0, 1]
  tiles_apart = keys_ref.shape[0] // bQ
  batch, i = pl.program_id(1), pl.program_id(2)
  ends_row = i == pl.num_programs(2) - 1
  ends = ends_row & (batch == pl.num_programs(1) - 1)
  has_next = ~ends & (next_block_ref[0, 0] > 0)
  precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
  dot = functools.partial(
    jax.lax.dot_general,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  sums[...] = jnp.zeros_like(sums)
  top[...] = jnp.full_like(top, _LOWEST)
  total[...] = jnp.zeros_like(total)

  def start(keys, batch, slot):
    rows_lib.start(
      lambda key, place: pltpu.make_async_copy(
        kv_ref.at[batch, key],
        buffers.at[slot, :, place],
        semaphores.at[slot],
      ),
      *(keys, q_ref.dtype.itemsize),
    )

  def start_next(slot):
    start(next_keys_ref.at[0], batch + ends_row.astype(jnp.int32), slot)

  def attend(tile, first, n):
    """The `n` queries from `first` on attend to the tile's keys."""
    some = pl.ds(first, n)
    q = q_ref[some].reshape(n * N, D)
    # Powers of two are what the hardware computes.
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

  @pl.when((batch == 0) & (i == 0))
  def _():
    turn[0] = 0

    @pl.when(n_tiles > 0)
    def _():
      start(keys_ref.at[0], batch, 0)

  first_slot = turn[0]

  @pl.loop(0, n_tiles)
  def _(tile):
    slot = (first_slot + tile) % 2

    @pl.when(tile + 1 < n_tiles)
    def _():
      start(keys_ref.at[tile + 1], batch, 1 - slot)

    @pl.when((tile + 1 == n_tiles) & has_next)
    def _():
      start_next(1 - slot)

    rows_lib.wait(buffers.at[slot], semaphores.at[slot])
    rows_lib.unpack(rows_lib.planes(buffers.at[slot], interpret), keys)

    @pl.when(is_union == 1)
    def _():
      @pl.loop(0, bQ // group)
      def _(i):
        attend(tile, i * group, group)

    @pl.when(is_union == 0)
    def _():
      attend(tile, tile // tiles_apart, 1)

  @pl.when((n_tiles == 0) & has_next)
  def _():
    start_next(first_slot)

  turn[0] = (first_slot + n_tiles) % 2

  alive = total[...] > 0
  whole = jnp.where(alive, total[...], 1.0)
  out_ref[...] = (sums[...] / whole).astype(out_ref.dtype)
  lse = (top[...] + jnp.log2(whole)) * math.log(2)
  lse_ref[...] = jnp.where(alive, lse, -jnp.inf).reshape(bQ, N)
