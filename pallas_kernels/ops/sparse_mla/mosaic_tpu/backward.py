"""Sparse attention's gradients on a TPU, over the same tiles as forward.

Weights are recomputed from lse, keys along sublanes, so that only dq takes a
transposed operand. The gradients that all queries of a block send to a row are
summed before they are added to the row's sum in HBM: those rows are read while
the products are computed, added to, and written back before the next tile reads
its own. One core does so for all of its blocks in turn: without atomics, in a
fixed order. Each core has its own sums.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.ops.sparse_mla.mosaic_tpu import forward as forward_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import row_copies as rows_lib
from pallas_kernels.tpu import row_plan as plan_lib


def vmem_bytes(
  N: int, D: int, C: int, n_tiles: int, itemsize: int, tiles: plan_lib.Tiles
) -> int:
  """Bytes of VMEM of the kernel, with double-buffered inputs and outputs."""
  bQ, bK, lanes = tiles.bQ, tiles.bK, rows_lib.LANES
  wide = pl.cdiv(D, lanes) * lanes
  rows = bQ * N
  given = itemsize * rows * (wide + C)
  given += 2 * 4 * 8 * bQ * pl.cdiv(N, lanes) * lanes
  blocks = given + itemsize * rows * wide + 4 * bK * n_tiles
  row = rows_lib.parts(D, itemsize) * lanes * 4
  scratch = bK * (2 * row + wide * itemsize + 2 * 4 * wide + 4 * lanes)
  scratch += given + 4 * rows * wide
  at_once = forward_lib.queries_at_once(bQ, N) * N
  products = 4 * (6 * bK * at_once + bK * wide + at_once * wide)
  return 2 * blocks + scratch + products


def backward(
  q: Float[Array, "B T N D"],
  kv: Float[Array, "B S D"],
  plan: plan_lib.Plan,
  lse: Float[Array, "B T N"],
  delta: Float[Array, "B T N"],
  d_out: Float[Array, "B T N C"],
  scale: float,
  tiles: plan_lib.Tiles,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B S D"]]:
  """Computes the gradients of q and kv; kv's is float32.

  `tiles` are those of the plan; T is a multiple of cores x bQ. lse is inf for
  queries without a gradient.
  """
  (B, T, N, D), C, (bQ, bK) = q.shape, d_out.shape[3], (tiles.bQ, tiles.bK)
  S, nK, cores = kv.shape[1], plan.codes.shape[2], tpu.chip().cores
  n_chunks, lanes = pl.cdiv(D, rows_lib.LANES), rows_lib.LANES
  # A key's row and its sum have the same place, so one list serves both.
  rows = rows_lib.pack(kv, bK, n_chunks)
  steps = T // bQ // cores
  listed = lambda rows, columns, space: pl.BlockSpec(
    (None, None, rows, columns),
    lambda c, b, i: (b, c * steps + i, 0, 0),
    memory_space=space,
  )
  block = lambda *shape: pl.BlockSpec(
    (None, bQ, *shape), lambda c, b, i: (b, c * steps + i, 0, 0)
  )
  hbm = pl.BlockSpec(memory_space=pl.ANY)
  interpret = tpu.interpret()
  zeros = jnp.zeros((cores, *rows.shape), jnp.float32)
  d_q, d_rows = pl.pallas_call(
    functools.partial(
      _kernel,
      scale=scale,
      group=forward_lib.queries_at_once(bQ, N),
      interpret=interpret,
    ),
    grid=(cores, B, steps),
    in_specs=[
      listed(1, 3, pltpu.SMEM),
      listed(nK + rows_lib.PREFETCHED, bK, pltpu.SMEM),
      listed(nK, bK, pltpu.VMEM),
      block(N, D),
      block(N, C),
      block(1, N),
      block(1, N),
      hbm,
      hbm,
    ],
    out_specs=[block(N, D), hbm],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
    ],
    input_output_aliases={8: 1},
    scratch_shapes=[
      *rows_lib.scratch(D, kv.dtype, bK),
      pltpu.VMEM((bQ, N, D), q.dtype),
      pltpu.VMEM((bQ, N, C), q.dtype),
      pltpu.VMEM((bQ, 1, N), jnp.float32),
      pltpu.VMEM((bQ, 1, N), jnp.float32),
      pltpu.VMEM((bK, lanes), jnp.int32),
      pltpu.VMEM((bQ, N, D), jnp.float32),
      pltpu.VMEM((bK, n_chunks * lanes), jnp.float32),
      pltpu.VMEM((n_chunks, bK, 1, lanes), jnp.float32),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tpu.chip().vmem,
      # A check for each of the copies would cost more than the copies.
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name=f"sparse_mla_backward_q{bQ}_k{bK}",
  )(
    plan.blocks,
    rows_lib.listed(plan, S, tiles, cores, n_chunks),
    *(plan.codes, q, d_out),
    *(lse[:, :, None], delta[:, :, None], rows, zeros),
  )
  d_kv = d_rows.sum(0).reshape(B, S + bK, n_chunks * lanes)
  return d_q, d_kv[:, :S, :D]


def _kernel(
  block_ref,
  pieces_ref,
  codes_ref,
  q_window,
  d_out_window,
  lse_window,
  delta_window,
  rows_ref,
  _,
  d_q_ref,
  d_kv_ref,
  buffers,
  semaphores,
  turn,
  keys,
  q_ref,
  d_out_ref,
  lse_ref,
  delta_ref,
  queries,
  d_q,
  d_rows,
  sums,
  sums_semaphores,
  *,
  scale,
  group,
  interpret,
):
  bQ, N, D = q_ref.shape
  C, bK, lanes = d_out_ref.shape[2], keys.shape[0], rows_lib.LANES
  is_union, twice = block_ref[0, 1], block_ref[0, 2]
  tiles_apart = codes_ref.shape[0] // bQ
  core = pl.program_id(0)
  stream = rows_lib.Stream(
    *(block_ref, pieces_ref, rows_ref, buffers, semaphores, turn, keys),
    interpret,
  )
  precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

  def dot(x, y, contract):
    return jax.lax.dot_general(
      x,
      y,
      (contract, ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
    )

  def copy_sums(write):
    def copy(piece, place):
      row = d_kv_ref.at[core, pl.ds(piece, sums.shape[0])]
      part = sums.at[:, place]
      source, target = (part, row) if write else (row, part)
      return pltpu.make_async_copy(
        source, target, sums_semaphores.at[int(write)]
      )

    return copy

  def start(tile, part=0, n_parts=1):
    pieces = pieces_ref.at[tile]
    rows_lib.start(copy_sums(write=False), pieces, 4, part, n_parts)
    stream.start(tile, part, n_parts)

  def wait_sums(write):
    rows_lib.wait(sums, sums_semaphores.at[int(write)])

  def attend(first, n):
    """Adds the gradients of `n` queries from `first` on, and of their keys."""
    some = pl.ds(first, n)
    q = q_ref[some].reshape(n * N, D)
    d_out = d_out_ref[some].reshape(n * N, C)
    across = lambda of: jnp.concatenate([of(i) for i in range(n)], 1)
    lse = across(lambda i: lse_ref[first + i]) * math.log2(math.e)
    delta = across(lambda i: delta_ref[first + i])
    shift = across(lambda i: jnp.full((1, N), first + i, jnp.int32))
    chosen = jnp.concatenate([queries[...]] * pl.cdiv(n * N, lanes), 1)
    chosen = chosen[:, : n * N] >> shift & 1
    logits = dot(keys[:, :D], q, ((1,), (1,)))
    # The hardware computes powers of two.
    weights = jnp.exp2(logits * (scale * math.log2(math.e)) - lse)
    weights = jnp.where(chosen == 1, weights, 0.0)
    d_weights = dot(keys[:, :C], d_out, ((1,), (1,)))
    d_logits = (scale * weights * (d_weights - delta)).astype(q.dtype)
    d_q[some] += dot(d_logits, keys[:, :D], ((0,), (0,))).reshape(n, N, D)
    d_rows[:, :D] += dot(d_logits, q, ((1,), (0,)))
    d_rows[:, :C] += dot(weights.astype(q.dtype), d_out, ((1,), (0,)))

  # The scalar unit computes a window's address, and products would wait for it
  # while it starts copies. Scratch has a fixed address.
  q_ref[...] = q_window[...]
  d_out_ref[...] = d_out_window[...]
  lse_ref[...] = lse_window[...]
  delta_ref[...] = delta_window[...]
  d_q[...] = jnp.zeros_like(d_q)

  stream.open()

  @pl.loop(0, stream.n_tiles)
  def _(tile):
    stream.read(tile)
    codes = codes_ref[pl.ds(tile, 1)]
    queries[...] = jnp.broadcast_to(codes, (lanes, bK)).T
    d_rows[...] = jnp.zeros_like(d_rows)

    # A row may have been changed by the previous tile.
    pl.when(tile > 0)(lambda: wait_sums(write=True))

    @pl.when(is_union == 1)
    def _():
      for i in range(bQ // group):
        start(tile, i, bQ // group)
        attend(i * group, group)

    @pl.when(is_union == 0)
    def _():
      start(tile)
      attend(tile // tiles_apart, 1)

    @pl.when(twice == 1)
    def _():
      # All entries of a key receive, and then write, the sum over all of them.
      key = codes >> bQ
      same = jnp.broadcast_to(key, (bK, bK))
      same = (same == same.T).astype(jnp.float32)
      d_rows[...] = jax.lax.dot(
        same,
        d_rows[...],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
      )

    wait_sums(write=False)
    parts = rows_lib.planes(sums, interpret)
    for i in range(parts.shape[0]):
      parts[i] += d_rows[:, i * lanes : (i + 1) * lanes]
    rows_lib.start_all(copy_sums(write=True), pieces_ref.at[tile], 4)

  wait_sums(write=True)
  stream.close()
  d_q_ref[...] = d_q[...].astype(d_q_ref.dtype)
