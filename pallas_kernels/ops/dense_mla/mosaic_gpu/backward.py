"""Attention to a range of keys on Hopper, backward, in one kernel.

A thread block takes 128 keys of one head and walks over tiles of 64 queries.
Two warpgroups have 64 keys each; keys are the rows of their products:

  S^T = K Q^T, dP^T = V dO^T, dV += P^T dO     P^T in registers, as computed
  dK += dS^T Q, dQ = dS K                      dS^T of both in shared memory;
                                               each has half of dQ's columns

Products overlap with the threads' other work: the first half of dK is
multiplied while dQ is written out, the second during the exponentials of the
next tile, dV while dS is computed.

dK and dV stay in registers until the end. dQ is accumulated in device memory in
float32 by TMA, in no fixed order of blocks: its last bit varies from run to
run.
"""

import math
from typing import cast, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import vector
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels.hopper import ptx
from pallas_kernels.ops.dense_mla.mosaic_gpu import mask_bits as mask_bits_lib

bT: Final = 64
bS: Final = 128
_ROWS: Final = 64  # keys of a warpgroup
_STAGES: Final = 2
_LOG2E: Final = math.log2(math.e)
_BY_COLUMN: Final = plgpu.Layout.WGMMA.reduce(0)
# Half of dQ's columns, 96, is not a multiple of 64: tiles of these columns are
# 32 wide.
_WIDE: Final = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_NARROW: Final = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))
_FLOATS: Final = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
# Named barriers of the two warpgroups: dS is written; dS and K have been read.
_WRITTEN: Final = 10
_READ: Final = 11
_BOTH: Final = 256


def backward(
  q: Float[Array, "B tileableT N HR"],
  k: Float[Array, "B tileableS N HR"],
  v: Float[Array, "B tileableS N U"],
  d_out: Float[Array, "B tileableT N U"],
  lse: Float[Array, "B N paddedT"],
  delta: Float[Array, "B N paddedT"],
  start: Int[Array, "B paddedT"],
  end: Int[Array, "B paddedT"],
  plan: Int[Array, "B nS 4"],
  scale: float,
  mask_bits: Int[Array, "B nT paddedS 2"] | None = None,
) -> tuple[
  Float[Array, "B tileableT N HR"],
  Float[Array, "B tileableS N HR"],
  Float[Array, "B tileableS N U"],
]:
  """Computes dQ / scale in float32, dK and dV.

  Args:
    q: Queries; their number is a multiple of 8, and at least one tile.
    k: Keys; their number is a multiple of 8, and at least one tile.
    v: Values.
    d_out: Gradient of the output.
    lse: Logsumexp in base 2; infinite for a query that sees no key.
    delta: Subtracted from d weights.
    start: First key of each query, padded to whole tiles of queries.
    end: One past the last key, at most S.
    plan: For each tile of keys, tiles of queries: in [first, second) some
      query sees some of it, in [third, fourth) all queries see all of it.
    scale: Scale of the logits.
    mask_bits: Bits of the queries that read each key, all within their ranges,
      padded to whole tiles of queries and keys.
  """
  (B, T, N, HR), (S, U) = q.shape, (k.shape[1], v.shape[-1])
  nS = plan.shape[1]
  operands = q, k, v, d_out, lse, delta, start, end, plan.reshape(-1)
  if mask_bits is not None:
    operands += (mask_bits.reshape(-1, mask_bits.shape[-1]),)

  def kernel(*refs):
    refs, rest = refs[: len(operands)], refs[len(operands) :]
    _kernel(*refs[:9], *rest, scale=scale, nS=nS, mask_bits=refs[9:])

  wide = lambda *shape: plgpu.SMEM(shape, q.dtype, transforms=_WIDE)
  narrow = lambda *shape: plgpu.SMEM(shape, q.dtype, transforms=_NARROW)
  d_q = jax.new_ref(jnp.zeros((B, T, N, HR), jnp.float32))
  d_k, d_v = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((B, S, N, HR), k.dtype),
      jax.ShapeDtypeStruct((B, S, N, U), v.dtype),
    ),
    grid=(B * N * nS,),
    grid_names=("block",),
    num_threads=3,
    thread_name="wg",
    scratch_types=(
      narrow(bS, HR),
      wide(bS, U),
      narrow(_STAGES, bT, HR),
      wide(_STAGES, bT, U),
      narrow(bS, bT),
      plgpu.SMEM((2, bT, HR // 2), jnp.float32, transforms=_FLOATS),
      plgpu.SMEM((_STAGES, bT), jnp.float32),
      plgpu.SMEM((_STAGES, bT), jnp.float32),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2),
      plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2),
      plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2),
      plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2),
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
    ),
    kernel_name="dense_mla_backward",
  )(*operands, d_q)
  return d_q[...], d_k, d_v


def _fresh(number):
  """Returns `number` unchanged, opaque to the compiler.

  Otherwise it keeps the addresses of all operands in registers across a loop.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WG_SPLAT,),
    return_type=plgpu.ShapeDtypeStruct(
      (), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT
    ),
  )
  def emit(ctx, number):
    del ctx
    x = number.registers.item()
    x = llvm.inline_asm(
      x.type, [x], "mov.b32 $0, $1;", "=r,r", has_side_effects=True
    )
    return mgpu.FragmentedArray.splat(cast(ir.Value, x), (), is_signed=True)

  return emit(number)


def _map_registers(x, dtype, function):
  """Applies `function` to the registers of a tile, two elements each."""

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,),
    return_type=plgpu.ShapeDtypeStruct(
      x.shape, dtype, layout=plgpu.Layout.WGMMA
    ),
  )
  def emit(ctx, x):
    del ctx
    registers = np.empty_like(x.registers)
    for i, register in np.ndenumerate(x.registers):
      registers[i] = function(register)
    return mgpu.FragmentedArray(
      _registers=registers, _layout=x.layout, _is_signed=None
    )

  return emit(x)


def _pack(x):
  """float32 -> bfloat16, in packed pairs that the compiler does not split.

  Otherwise it keeps each half in its own register for a later `_unpack`.
  """

  def pack(pair):
    low, high = (
      vector.extract(pair, dynamic_position=[], static_position=[i])
      for i in range(2)
    )
    word = ir.IntegerType.get_signless(32)
    both = llvm.inline_asm(
      word, [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"
    )
    pair_type = ir.VectorType.get((2,), ir.BF16Type.get())
    return llvm.bitcast(pair_type, cast(ir.Value, both))

  return _map_registers(x, jnp.dtype(jnp.bfloat16), pack)


def _unpack(x):
  """bfloat16 -> float32."""

  def unpack(pair):
    word, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    both = llvm.bitcast(word, pair)
    low = arith.shli(both, ptx.i32(16))
    high = arith.andi(both, ptx.i32(-(2**16)))
    return vector.from_elements(
      ir.VectorType.get((2,), f32), [arith.bitcast(f32, y) for y in (low, high)]
    )

  return _map_registers(x, jnp.dtype(jnp.float32), unpack)


def _kernel(
  q, k, v, d_out, lse, delta, start, end, plan, d_q, d_k, d_v,
  k_smem, v_smem, q_smem, do_smem, ds_smem, dq_smem, lse_smem, delta_smem,
  kv_full, q_full, do_full, q_free, do_free,
  *, scale, nS, mask_bits,
):  # fmt: skip
  N, HR, U = q.shape[2], q.shape[3], v.shape[3]
  block, wg = lax.axis_index("block"), lax.axis_index("wg")
  # The first keys first: with causal ranges they take the longest.
  head, i_s = lax.div(block, nS), lax.rem(block, nS)
  batch, head = lax.div(head, N), lax.rem(head, N)
  at = 4 * (batch * nS + i_s)
  first, last, whole, unwhole = (plan[at + i] for i in range(4))

  @pl.when(wg == 2)
  def _load():
    plgpu.set_max_registers(24, action="decrease")
    keys = pl.ds(i_s * bS, bS)
    plgpu.copy_gmem_to_smem(k.at[batch, keys, head], k_smem, kv_full)
    plgpu.copy_gmem_to_smem(v.at[batch, keys, head], v_smem, kv_full)

    def step(i, _):
      slot = lax.rem(i - first, _STAGES)
      queries = pl.ds(i * bT, bT)
      for source, target, sums, sums_smem, full, free in (
        (q, q_smem, lse, lse_smem, q_full, q_free),
        (d_out, do_smem, delta, delta_smem, do_full, do_free),
      ):
        pl.when(i - first >= _STAGES)(
          lambda free=free: plgpu.barrier_wait(free.at[slot])
        )
        plgpu.copy_gmem_to_smem(
          source.at[batch, queries, head], target.at[slot], full.at[slot]
        )
        plgpu.copy_gmem_to_smem(
          sums.at[batch, head, queries], sums_smem.at[slot], full.at[slot]
        )

    lax.fori_loop(first, last, step, None)

  @pl.when(wg < 2)
  def _compute():
    plgpu.set_max_registers(240, action="increase")
    mine = pl.ds(wg * _ROWS, _ROWS)

    def spread(x):
      return lax.broadcast_in_dim(x, (_ROWS, bT), [1])

    def zeros(n):
      return plgpu.layout_cast(
        jnp.zeros((_ROWS, n), jnp.float32), plgpu.Layout.WGMMA
      )

    def masked(logits_ST, i):
      key = plgpu.broadcasted_iota(
        jnp.int32, (_ROWS, bT), 0, layout=plgpu.Layout.WGMMA
      )
      key += i_s * bS + wg * _ROWS
      start_T, end_T = (
        plgpu.load(
          x.at[batch, pl.ds(i * bT, bT)], layout=_BY_COLUMN, optimized=False
        )
        for x in (start, end)
      )
      seen = (key >= spread(start_T)) & (key < spread(end_T))
      return jnp.where(seen, logits_ST, -jnp.inf)

    def load_bits(ref, i):
      nT = start.shape[1] // bT
      row = (batch * nT + i) * (nS * bS) + i_s * bS + wg * _ROWS
      return mask_bits_lib.load(ref, row, bT // 32)

    def compute(dk_acc, dv_acc, s_acc, dp_acc, dq_acc):
      def operands(i):
        here = _fresh(wg)
        mine = pl.ds(pl.multiple_of(here * _ROWS, _ROWS), _ROWS)
        half = pl.multiple_of(here * (HR // 2), HR // 2)
        return lax.rem(i - first, _STAGES), mine, pl.ds(half, HR // 2)

      def multiply_logits(i):
        slot, mine, _ = operands(i)
        s_acc[...] = zeros(bT)
        plgpu.wgmma(s_acc, k_smem.at[mine], q_smem.at[slot].transpose((1, 0)))

      def multiply_dk(i, part):
        slot, mine, _ = operands(i)
        queries = pl.ds(part * (bT // 2), bT // 2)
        plgpu.wgmma(dk_acc, ds_smem.at[mine, queries], q_smem.at[slot, queries])

      def kept(logits_ST, bits):
        return mask_bits_lib.apply(logits_ST, *bits) if bits else logits_ST

      dk_acc[...], dv_acc[...] = zeros(HR), zeros(U)
      plgpu.barrier_wait(kv_full)
      plgpu.barrier_wait(q_full.at[0])
      multiply_logits(first)

      def step(i, logits_ST):
        slot, mine, columns = operands(i)
        if not mask_bits:
          logits_ST = lax.cond(
            (i >= whole) & (i < unwhole),
            lambda x: x,
            lambda x: masked(x, i),
            logits_ST,
          )
        plgpu.barrier_wait(do_full.at[slot])
        lse_T = plgpu.load(lse_smem.at[slot], layout=_BY_COLUMN)
        p_ST = jnp.exp2(logits_ST * (scale * _LOG2E) - spread(lse_T))
        p_ST = _pack(p_ST)
        dp_acc[...] = zeros(bT)
        plgpu.wgmma(dp_acc, v_smem.at[mine], do_smem.at[slot].transpose((1, 0)))
        plgpu.wgmma(dv_acc, p_ST, do_smem.at[slot])
        delta_T = plgpu.load(delta_smem.at[slot], layout=_BY_COLUMN)
        dp_ST = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)

        @pl.when(i > first)
        def _():
          plgpu.barrier_arrive(q_free.at[1 - slot])

        ds_ST = _unpack(p_ST) * (dp_ST - spread(delta_T))
        ds_ST = _pack(ds_ST)
        ptx.meet(_READ, _BOTH)
        ds_smem[mine] = ds_ST
        ptx.fence_smem()
        ptx.meet(_WRITTEN, _BOTH)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(do_free.at[slot])
        dq_acc[...] = zeros(HR // 2)
        plgpu.wgmma(dq_acc, ds_smem.transpose((1, 0)), k_smem.at[:, columns])
        multiply_dk(i, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dq_smem[wg] = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          dq_smem.at[wg],
          d_q.at[batch, pl.ds(i * bT, bT), head, columns],
          reduction_op="add",
        )
        following = jnp.minimum(i + 1, last - 1)

        @pl.when(i + 1 < last)
        def _():
          plgpu.barrier_wait(q_full.at[1 - slot])

        prefetched = [load_bits(ref, following) for ref in mask_bits]
        # The last tile computes its own logits again, which are not used.
        multiply_logits(following)
        multiply_dk(i, 1)
        return kept(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), prefetched)

      bits = [load_bits(ref, first) for ref in mask_bits]
      logits_ST = kept(plgpu.wgmma_accumulator_load(s_acc), bits)
      lax.fori_loop(first, last, step, logits_ST)
      ptx.meet(_READ, _BOTH)
      k_smem[mine] = (plgpu.wgmma_accumulator_load(dk_acc) * scale).astype(
        d_k.dtype
      )
      v_smem[mine] = plgpu.wgmma_accumulator_load(dv_acc).astype(d_v.dtype)
      plgpu.commit_smem()
      rows = pl.ds(i_s * bS + wg * _ROWS, _ROWS)
      plgpu.copy_smem_to_gmem(k_smem.at[mine], d_k.at[batch, rows, head])
      plgpu.copy_smem_to_gmem(v_smem.at[mine], d_v.at[batch, rows, head])
      plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
      compute,
      *(plgpu.ACC((_ROWS, n), jnp.float32) for n in (HR, U, bT, bT, HR // 2)),
    )
