"""Sparse attention forward on Hopper: one block for 64 heads of a query.

A producer warpgroup gathers selected rows into two tiles of 64. Two consumer
warpgroups hold the same 64 heads: each computes the logits of one tile, and
each keeps half of the output's columns, for which it needs the weights of both
tiles. So a step of 128 keys is, where `@` runs on the tensor cores:

  warpgroup 0                          warpgroup 1
  logits 0 = q @ tile 0
  weights 0; share them                logits 1 = q @ tile 1
  left += weights 0 @ tile 0 left      right += weights 0 @ tile 0 right
    (tile 0 is free: next rows)          meanwhile weights 1; share them
  left += weights 1 @ tile 1 left      right += weights 1 @ tile 1 right

Rows come by cp.async, 16 bytes a thread, in four parts (tile x columns left or
right), each free again as soon as its last product is done.

The maximum that weights refer to is raised only where a logit exceeds it by
`SLACK`, not with every new maximum: the output then seldom needs rescaling.
"""

import functools
import math

import jax
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax._src.lib.mlir.dialects import llvm
from jax._src.lib.mlir.dialects import memref
from jax._src.lib.mlir.dialects import nvvm
from jax._src.lib.mlir.dialects import scf
from jax._src.lib.mlir.dialects import vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels.hopper import ptx

ROWS = 64  # keys a tile, and heads a block
RANK = 512  # C
WIDTH = 576  # C + R
HALF = RANK // 2
COLUMN_TILES = WIDTH // 64
LEFT = range(0, 4)  # column tiles of 64
RIGHT = range(4, 9)
EIGHT = COLUMN_TILES * 1024  # bytes of eight rows, which lie together
TILE = 8 * EIGHT
PLACES = [(tile, i) for tile in range(2) for i in range(4)]
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Rows of the small array in shared memory. The masks are added to logits.
MASK_0, MASK_1, TOP_0, TOP_1, SUM_0, SUM_1, BARRIERS = range(7)
SLACK = 8.0  # in powers of two; weights stay below 2^8, sums below 2^21
NEVER = -1e30  # initial maximum; finite, since -inf would give NaN
LOG2E = math.log2(math.e)

# Barriers in shared memory: part of a tile is full, or empty again.
READY_0L, READY_0R, READY_1L, READY_1R, VALID = range(5)
FREE_0L, FREE_0R, FREE_1L, FREE_1R = range(5, 9)
# Named barriers of the two consumers.
WEIGHTS_0, WEIGHTS_1, SUMS = range(8, 11)
BOTH = 256


def _gather(kv, indices, tiles, small, first_row, token, steps, S):
  """Runs the producer: fills the parts of both tiles, step by step.

  Args:
    kv: [B S, C+R] in device memory.
    indices: [B T, K], likewise.
    tiles: Both tiles.
    small: For masks and barriers.
    first_row: First row of this query's batch row in `kv`.
    token: Index of this query in `indices`.
    steps: Pairs of tiles.
    S: Keys; an index outside [0, S) gives zeros and a mask of -inf.
  """

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.RefType(),
      plgpu.RefType(SWIZZLED),
      plgpu.RefType(),
      *[ptx.SCALAR] * 3,
    )
  )
  def emit(ctx, kv, indices, tiles, small, first_row, token, steps):
    del ctx
    i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
    c = ptx.i32
    index = lambda x: arith.index_cast(ir.IndexType.get(), x)
    first_row, token, steps = (
      x.registers.item() for x in (first_row, token, steps)
    )
    # Eight threads a row: this one copies chunk 0..7 of every column tile, of
    # the rows `group + 16 i`, i = 0..3.
    thread = ptx.thread()
    group, chunk = arith.shrui(thread, c(3)), arith.andi(thread, c(7))
    row_in_eight = arith.andi(group, c(7))
    swizzled = arith.shli(arith.xori(chunk, row_in_eight), c(4))
    place = arith.addi(
      arith.addi(
        ptx.address(tiles), arith.muli(arith.shrui(group, c(3)), c(EIGHT))
      ),
      arith.addi(arith.shli(row_in_eight, c(7)), swizzled),
    )
    kv_address = arith.addi(
      llvm.ptrtoint(i64, mgpu.memref_ptr(kv)),
      arith.extui(i64, arith.shli(chunk, c(4))),
    )
    first64 = arith.extsi(i64, first_row)
    barriers = arith.addi(ptx.address(small), c(4 * ROWS * BARRIERS))
    barrier = lambda i: arith.addi(barriers, c(8 * i))

    def chosen(step):
      first = arith.addi(arith.shli(step, c(7)), group)
      return [
        memref.load(
          indices,
          [index(token), index(arith.addi(first, c(ROWS * t + 16 * i)))],
        )
        for t, i in PLACES
      ]

    loop = scf.ForOp(c(0), steps, c(1), chosen(c(0)))
    with ir.InsertionPoint(loop.body):
      step = loop.induction_variable
      free = arith.xori(arith.andi(step, c(1)), c(1))
      valid, sources, sizes = {}, {}, {}
      for key, row in zip(PLACES, loop.inner_iter_args):
        valid[key] = ok = arith.cmpi(arith.CmpIPredicate.ult, row, c(S))
        row = arith.addi(arith.extsi(i64, arith.select(ok, row, c(0))), first64)
        row_bytes = arith.constant(i64, ir.IntegerAttr.get(i64, 2 * WIDTH))
        sources[key] = arith.addi(kv_address, arith.muli(row, row_bytes))
        sizes[key] = arith.select(ok, c(16), c(0))
      # Prefetched one step early.
      following = arith.addi(step, c(1))
      last = arith.cmpi(arith.CmpIPredicate.eq, following, steps)
      upcoming = chosen(arith.select(last, step, following))

      def copy(tile, columns, ready):
        for i in range(4):
          for t in columns:
            to = arith.addi(place, c(TILE * tile + 2 * EIGHT * i + 1024 * t))
            mgpu.inline_ptx(
              "cp.async.cg.shared.global.L2::128B"
              f" [$0], [$1+{128 * t}], 16, $2;",
              *(to, sources[tile, i], sizes[tile, i]),
              has_side_effects=True,
            )
        mgpu.inline_ptx(
          "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
          barrier(ready),
          has_side_effects=True,
        )

      ptx.emit_wait(barrier(FREE_0L), free)
      copy(0, LEFT, READY_0L)
      ptx.emit_wait(barrier(FREE_0R), free)
      # By now both consumers have read the masks of the step before.
      with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, chunk, c(0))):
        for (t, i), ok in valid.items():
          seen, unseen = (
            arith.constant(f32, ir.FloatAttr.get(f32, x))
            for x in (0, -math.inf)
          )
          memref.store(
            arith.select(ok, seen, unseen),
            small,
            [index(c(MASK_0 + t)), index(arith.addi(group, c(16 * i)))],
          )
      ptx.emit_arrive(barrier(VALID))
      copy(0, RIGHT, READY_0R)
      ptx.emit_wait(barrier(FREE_1R), free)
      copy(1, RIGHT, READY_1R)
      ptx.emit_wait(barrier(FREE_1L), free)
      copy(1, LEFT, READY_1L)
      scf.yield_(upcoming)

  emit(kv, indices, tiles, small, first_row, token, steps)


def _rescale(out, keep):
  """Scales rows, `out * keep`; a warp with no change in its rows skips it."""
  layout = plgpu.Layout.WGMMA

  @plgpu.inline_mgpu(
    arg_types=(layout, layout.reduce(1)),
    return_type=plgpu.ShapeDtypeStruct(out.shape, out.dtype, layout=layout),
  )
  def emit(ctx, out, keep):
    del ctx
    one = arith.constant(
      ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), 1.0)
    )
    values = [
      vector.extract(register, [], [0]) for register in keep.registers.flat
    ]
    changed = [
      arith.cmpf(arith.CmpFPredicate.UNE, value, one) for value in values
    ]
    any_changed = functools.reduce(arith.ori, changed)
    any_changed = nvvm.vote_sync(ptx.i32(-1), any_changed, "any")
    registers = list(out.registers.flat)
    branch = scf.IfOp(any_changed, [r.type for r in registers], has_else=True)
    with ir.InsertionPoint(branch.then_block):
      factor = keep.broadcast_in_dim(out.shape, (0,), out.layout)
      scf.yield_(list((out * factor).registers.flat))
    otherwise = branch.else_block
    assert otherwise is not None
    with ir.InsertionPoint(otherwise):
      scf.yield_(registers)
    results = np.array(list(branch.results), dtype=object)
    return fragmented_array.FragmentedArray(
      _registers=results.reshape(out.registers.shape),
      _layout=out.layout,
      _is_signed=None,
    )

  return emit(out, keep)


def _kernel(
  steps_ref,
  q_ref,
  kv_ref,
  indices_ref,
  out_ref,
  lse_ref,
  q_smem,
  tiles,
  weights_1,
  small,
  q_barrier,
  *,
  scale,
  blocks,
  T,
  S,
):
  block = lax.axis_index("block")
  token = block // blocks
  heads = pl.ds((block % blocks) * ROWS, ROWS)
  steps = steps_ref[token]
  warpgroup = lax.axis_index("wg")
  barriers = small.at[BARRIERS]
  ptx.barriers_init(barriers, [128] * 9)
  by_row = plgpu.Layout.WGMMA.reduce(1)
  spread = lambda x, columns: lax.broadcast_in_dim(x, (ROWS, columns), [0])
  zeros = lambda columns: plgpu.layout_cast(
    jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA
  )
  row = lambda value: plgpu.layout_cast(
    jnp.full((ROWS,), value, jnp.float32), by_row
  )
  left, right = pl.ds(0, HALF), pl.ds(HALF, HALF)
  weights_0 = tiles.at[0, :, pl.ds(RANK, ROWS)]  # its keys' RoPE part is done

  # A 0 opaque to the compiler, so that operand addresses are recomputed in each
  # step. Kept over the loop, they would take so many registers that others
  # spill, at a quarter of the speed.
  zero = lambda i: i >> 30

  def logits(acc, i, tile, columns):
    for t in columns:
      rows = tiles.at[tile + zero(i), :, pl.ds(64 * t, 64)]
      plgpu.wgmma(acc, q_smem.at[t + zero(i)], rows.transpose((1, 0)))

  def mix(acc, i, weights, tile, columns):
    plgpu.wgmma(acc, weights, tiles.at[tile + zero(i), :, columns])

  def rescale(acc, keep):
    out = plgpu.wgmma_accumulator_load(acc, wait_n=None)
    acc[...] = _rescale(out, keep)

  def scaled(acc, tile):
    mask = plgpu.load(
      small.at[MASK_0 + tile], layout=plgpu.Layout.WGMMA.reduce(0)
    )
    mask = lax.broadcast_in_dim(mask, (ROWS, ROWS), [1])
    return acc * (scale * LOG2E) + mask

  def raised(top, x):
    """Returns the reference maximum, given these logits."""
    highest = jnp.max(x, axis=1)
    return jnp.where(highest > top + SLACK, highest, top)

  def finish(out_acc, top, total, first):
    """Writes four column tiles of the output; returns lse."""
    plgpu.wgmma_wait(0)
    small[SUM_0 + warpgroup] = total
    ptx.meet(SUMS, BOTH)
    total = plgpu.load(small.at[SUM_0], layout=by_row) + plgpu.load(
      small.at[SUM_1], layout=by_row
    )
    out = plgpu.wgmma_accumulator_load(out_acc)
    inverse = 1.0 / jnp.where(total > 0, total, 1.0)
    # q is no longer needed.
    out = (out * spread(inverse, HALF)).astype(q_smem.dtype)
    for i in range(4):
      q_smem[first + i] = out[:, 64 * i : 64 * (i + 1)]
    plgpu.commit_smem()
    for i in range(4):
      columns = pl.ds(64 * (first + i), 64)
      plgpu.copy_smem_to_gmem(
        q_smem.at[first + i], out_ref.at[token, heads, columns]
      )
    return jnp.where(total > 0, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)

  @pl.when(warpgroup == 0)
  def _():
    plgpu.set_max_registers(216, action="increase")
    for t in range(COLUMN_TILES):
      columns = pl.ds(64 * t, 64)
      plgpu.copy_gmem_to_smem(
        q_ref.at[token, heads, columns], q_smem.at[t], q_barrier
      )
    plgpu.barrier_wait(q_barrier)

    def body(out_acc, logits_acc):
      def score(i, before_right):
        """Computes the logits of tile 0 of step i."""
        phase = i & 1
        logits_acc[...] = zeros(ROWS)
        ptx.barrier_wait(barriers, READY_0L, phase)
        logits(logits_acc, i, 0, LEFT)
        before_right()
        ptx.barrier_wait(barriers, READY_0R, phase)
        logits(logits_acc, i, 0, RIGHT)
        ptx.barrier_wait(barriers, VALID, phase)
        return plgpu.wgmma_accumulator_load(logits_acc)

      def step(i, carry, last=False):
        top, total, x = carry
        x = scaled(x, 0)
        top_0 = raised(top, x)
        keep = jnp.exp2(top - top_0)
        weights = jnp.exp2(x - spread(top_0, ROWS))
        total = total * keep + jnp.sum(weights, axis=1)
        weights = weights.astype(q_smem.dtype)
        weights_0[...] = weights
        small[TOP_0] = top_0
        ptx.fence_smem()
        ptx.announce(WEIGHTS_0, BOTH)
        rescale(out_acc, keep)
        mix(out_acc, i, weights, 0, left)
        plgpu.wgmma_wait(0)
        ptx.barrier_arrive(barriers, FREE_0L)

        ptx.meet(WEIGHTS_1, BOTH)
        top = plgpu.load(small.at[TOP_1], layout=by_row)
        keep = jnp.exp2(top_0 - top)
        rescale(out_acc, keep)
        mix(out_acc, i, weights_1, 1, left)

        def free():
          plgpu.wgmma_wait(len(LEFT))
          ptx.barrier_arrive(barriers, FREE_1L)

        if not last:
          x = score(i + 1, free)
        return top, total * keep, x

      x = score(jnp.int32(0), lambda: None)
      carry = lax.fori_loop(0, steps - 1, step, (row(NEVER), row(0.0), x))
      *carry, _ = step(steps - 1, carry, last=True)
      finish(out_acc, *carry, 0)

    pl.run_scoped(
      body,
      plgpu.ACC((ROWS, HALF), jnp.float32),
      plgpu.ACC((ROWS, ROWS), jnp.float32),
    )
    plgpu.wait_smem_to_gmem(0)

  @pl.when(warpgroup == 1)
  def _():
    plgpu.set_max_registers(216, action="increase")
    plgpu.barrier_wait(q_barrier)

    def body(out_acc, logits_acc):
      def step(i, carry):
        top, total = carry
        phase = i & 1
        logits_acc[...] = zeros(ROWS)
        ptx.barrier_wait(barriers, READY_1R, phase)
        logits(logits_acc, i, 1, RIGHT)
        ptx.barrier_wait(barriers, READY_1L, phase)
        logits(logits_acc, i, 1, LEFT)
        ptx.barrier_wait(barriers, VALID, phase)
        x = scaled(plgpu.wgmma_accumulator_load(logits_acc), 1)

        ptx.meet(WEIGHTS_0, BOTH)
        top_0 = plgpu.load(small.at[TOP_0], layout=by_row)
        keep = jnp.exp2(top - top_0)
        total = total * keep
        rescale(out_acc, keep)
        mix(out_acc, i, weights_0, 0, right)

        # While that product runs:
        top = raised(top_0, x)
        keep = jnp.exp2(top_0 - top)
        weights = jnp.exp2(x - spread(top, ROWS))
        total = total * keep + jnp.sum(weights, axis=1)
        weights = weights.astype(q_smem.dtype)
        weights_1[...] = weights
        small[TOP_1] = top
        ptx.fence_smem()
        ptx.announce(WEIGHTS_1, BOTH)

        plgpu.wgmma_wait(0)
        ptx.barrier_arrive(barriers, FREE_0R)
        rescale(out_acc, keep)
        mix(out_acc, i, weights, 1, right)
        plgpu.wgmma_wait(0)
        ptx.barrier_arrive(barriers, FREE_1R)
        return top, total

      carry = lax.fori_loop(0, steps, step, (row(NEVER), row(0.0)))
      lse = finish(out_acc, *carry, 4)
      small[TOP_0] = lse
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(small.at[TOP_0], lse_ref.at[token, heads])

    pl.run_scoped(
      body,
      plgpu.ACC((ROWS, HALF), jnp.float32),
      plgpu.ACC((ROWS, ROWS), jnp.float32),
    )
    plgpu.wait_smem_to_gmem(0)

  @pl.when(warpgroup == 2)
  def _():
    plgpu.set_max_registers(72, action="decrease")
    first_row = (token // T) * S
    _gather(kv_ref, indices_ref, tiles, small, first_row, token, steps, S)


def forward(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"],
  indices: Int[Array, "B T K"],
  scale: float,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """Computes out and lse of `api.sparse_mla`, for bfloat16, C = 512, R = 64.

  Fewer than 64 heads cost as much as 64. Reads `indices` up to each query's
  last valid one, in steps of 128.
  """
  B, T, N, _ = q.shape
  S, K = kv.shape[1], indices.shape[2]
  padded = -(-N // ROWS) * ROWS
  q = jnp.pad(q, [(0, 0), (0, 0), (0, padded - N), (0, 0)])
  indices = jnp.pad(
    indices, [(0, 0), (0, 0), (0, -K % (2 * ROWS))], constant_values=-1
  ).reshape(B * T, -1)
  # Pairs of tiles up to the last valid index: later queries see more keys.
  places = jnp.arange(1, indices.shape[1] + 1, dtype=jnp.int32)[None]
  last = jnp.max(jnp.where((indices >= 0) & (indices < S), places, 0), axis=-1)
  steps = jnp.maximum(-(-last // (2 * ROWS)), 1)
  blocks = padded // ROWS
  kernel = plgpu.kernel(
    functools.partial(_kernel, scale=scale, blocks=blocks, T=T, S=S),
    out_type=(
      jax.ShapeDtypeStruct((B * T, padded, RANK), q.dtype),
      jax.ShapeDtypeStruct((B * T, padded), jnp.float32),
    ),
    grid=(B * T * blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="wg",
    scratch_types=[
      plgpu.SMEM((COLUMN_TILES, ROWS, 64), q.dtype, transforms=SWIZZLED),
      plgpu.SMEM((2, ROWS, WIDTH), q.dtype, transforms=SWIZZLED),
      plgpu.SMEM((ROWS, ROWS), q.dtype, transforms=SWIZZLED),
      plgpu.SMEM((7, ROWS), jnp.float32),
      plgpu.Barrier(num_arrivals=COLUMN_TILES),
    ],
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
    ),
    kernel_name="sparse_mla_forward",
  )
  out, lse = kernel(
    steps,
    q.reshape(B * T, padded, WIDTH),
    kv.reshape(B * S, WIDTH),
    indices,
  )
  return (
    out[:, :N].reshape(B, T, N, RANK),
    lse[:, :N].reshape(B, T, N),
  )
