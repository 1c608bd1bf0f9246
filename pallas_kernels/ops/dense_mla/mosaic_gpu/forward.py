"""Attention to a range of keys on Hopper, forward.

A thread block takes 128 queries of one head and walks over the tiles of 128
keys that at least one of these queries sees. A producer warpgroup copies keys
and values into a two-stage ring buffer; two consumer warpgroups have 64 queries
each, whose output stays in registers. They ping-pong on the tensor cores:

  warpgroup 0   out += P V, logits of the next tile | softmax
  warpgroup 1   softmax                             | out += P V, logits ...

A tile that all of the block's queries see in full needs no mask: with causal
ranges, that is all but the last. With selected keys, every tile is masked by
bits.
"""

import math
from typing import Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import ping_pong
from pallas_kernels.ops.dense_mla.mosaic_gpu import mask_bits as mask_bits_lib

bT: Final = 128
bS: Final = 128
_ROWS: Final = 64  # queries of a warpgroup
_COLUMNS: Final = 64  # of a tile of queries
_STAGES: Final = 2
_NEVER: Final = -1e30  # initial maximum; finite, since -inf would give NaN
_LOG2E: Final = math.log2(math.e)
_SWIZZLED: Final = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_BY_ROW: Final = plgpu.Layout.WGMMA.reduce(1)


def forward(
  q: Float[Array, "B tileableT N HR"],
  k: Float[Array, "B tileableS N HR"],
  v: Float[Array, "B tileableS N U"],
  start: Int[Array, "B paddedT"],
  end: Int[Array, "B paddedT"],
  plan: Int[Array, "B nT 4"],
  scale: float,
  mask_bits: Int[Array, "B nS paddedT 4"] | None = None,
) -> tuple[Float[Array, "B tileableT N U"], Float[Array, "B N paddedT"]]:
  """Computes the output and the logsumexp.

  Args:
    q: Queries; their number is a multiple of 8, and at least one tile.
    k: Keys; their number is a multiple of 8, and at least one tile.
    v: Values.
    start: First key of each query, padded to whole tiles of queries.
    end: One past the last key, at most S.
    plan: For each tile of queries, tiles of keys: those in [first, second) are
      seen by some query, those in [third, fourth) in full by all.
    scale: Scale of the logits; positive.
    mask_bits: Bits of the keys that each query reads, all in its range, padded
      to whole tiles of keys. A query that reads none has an empty range.
  """
  (B, T, N, HR), U = q.shape, v.shape[-1]
  nT = plan.shape[1]
  operands = q, k, v, start, end, plan.reshape(-1)
  if mask_bits is not None:
    operands += (mask_bits.reshape(-1, mask_bits.shape[-1]),)

  def kernel(*refs):
    refs, rest = refs[: len(operands)], refs[len(operands) :]
    _kernel(*refs[:6], *rest, scale=scale, nT=nT, mask_bits=refs[6:])

  smem = lambda *shape: plgpu.SMEM(shape, q.dtype, transforms=_SWIZZLED)
  return plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((B, T, N, U), q.dtype),
      jax.ShapeDtypeStruct((B, N, nT * bT), jnp.float32),
    ),
    # Heads one after the other, so that the blocks that run together share a
    # head's keys in L2.
    grid=(B * N * nT,),
    grid_names=("block",),
    num_threads=3,
    thread_name="wg",
    scratch_types=(
      smem(2, HR // _COLUMNS, _ROWS, _COLUMNS),
      smem(_STAGES, bS, HR),
      smem(_STAGES, bS, U),
      plgpu.SMEM((2, _ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=2, num_arrivals=HR // _COLUMNS),
      plgpu.Barrier(num_barriers=_STAGES),
      plgpu.Barrier(num_barriers=_STAGES),
      plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2),
      plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2),
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
    ),
    kernel_name="dense_mla_forward",
  )(*operands)


def _kernel(
  q, k, v, start, end, plan, out, lse,
  q_smem, k_smem, v_smem, lse_smem, q_full, k_full, v_full, k_free, v_free,
  *, scale, nT, mask_bits,
):  # fmt: skip
  batches, _, N, U = out.shape
  parts = q.shape[3] // _COLUMNS
  block, wg = lax.axis_index("block"), lax.axis_index("wg")
  head = lax.div(block, nT)
  # The last queries first: with causal ranges they take the longest.
  i_t = nT - 1 - lax.rem(block, nT)
  batch, head = lax.div(head, N), lax.rem(head, N)
  at = 4 * (batch * nT + i_t)
  first, last, whole, unwhole = (plan[at + i] for i in range(4))
  query = i_t * bT + wg * _ROWS

  @pl.when(wg == 2)
  def _load():
    plgpu.set_max_registers(40, action="decrease")

    def step(i, _):
      slot = lax.rem(i - first, _STAGES)
      keys = pl.ds(i * bS, bS)
      for source, target, full, free in (
        (k, k_smem, k_full, k_free),
        (v, v_smem, v_full, v_free),
      ):
        pl.when(i - first >= _STAGES)(
          lambda free=free: plgpu.barrier_wait(free.at[slot])
        )
        plgpu.copy_gmem_to_smem(
          source.at[batch, keys, head], target.at[slot], full.at[slot]
        )

    lax.fori_loop(first, last, step, None)

  @pl.when(wg < 2)
  def _compute():
    plgpu.set_max_registers(232, action="increase")
    for i in range(parts):
      columns = pl.ds(i * _COLUMNS, _COLUMNS)
      plgpu.copy_gmem_to_smem(
        q.at[batch, pl.ds(query, _ROWS), head, columns],
        q_smem.at[wg, i],
        q_full.at[wg],
      )

    def of_rows(ref):
      return plgpu.load(
        ref.at[batch, pl.ds(query, _ROWS)], layout=_BY_ROW, optimized=False
      )

    def spread(x, columns):
      return lax.broadcast_in_dim(x, (_ROWS, columns), [0])

    def full(value, *shape, layout=_BY_ROW):
      return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def masked(logits, i):
      key = plgpu.broadcasted_iota(
        jnp.int32, (_ROWS, bS), 1, layout=plgpu.Layout.WGMMA
      )
      key += i * bS
      seen = (key >= spread(of_rows(start), bS)) & (
        key < spread(of_rows(end), bS)
      )
      return jnp.where(seen, logits, -jnp.inf)

    def load_bits(ref, i):
      nS = ref.shape[0] // (batches * nT * bT)
      row = (batch * nS + i) * (nT * bT) + query
      return mask_bits_lib.load(ref, row, bS // 32)

    def compute(out_acc, logits_acc):
      def multiply_logits(i):
        slot = lax.rem(i - first, _STAGES)
        logits_acc[...] = full(0.0, _ROWS, bS, layout=plgpu.Layout.WGMMA)
        plgpu.barrier_wait(k_full.at[slot])
        for part in range(parts):
          columns = pl.ds(part * _COLUMNS, _COLUMNS)
          plgpu.wgmma(
            logits_acc,
            q_smem.at[wg, part],
            k_smem.at[slot, :, columns].transpose((1, 0)),
          )

      def step(i, carry, is_last=False):
        top, total = carry
        slot = lax.rem(i - first, _STAGES)
        bits = [load_bits(ref, i) for ref in mask_bits]
        logits = plgpu.wgmma_accumulator_load(logits_acc)
        plgpu.barrier_arrive(k_free.at[slot])
        if bits:
          logits = mask_bits_lib.apply(logits, *bits)
        else:
          logits = lax.cond(
            (i >= whole) & (i < unwhole),
            lambda x: x,
            lambda x: masked(x, i),
            logits,
          )
        new_top = jnp.maximum(top, jnp.max(logits, axis=1) * (scale * _LOG2E))
        keep = jnp.exp2(top - new_top)
        weights = jnp.exp2(logits * (scale * _LOG2E) - spread(new_top, bS))
        total = total * keep + jnp.sum(weights, axis=1)
        weights = weights.astype(v.dtype)
        out_TU = plgpu.wgmma_accumulator_load(out_acc, wait_n=None)
        out_acc[...] = out_TU * spread(keep, U)
        plgpu.barrier_wait(v_full.at[slot])
        ping_pong.wait(wg)
        plgpu.wgmma(out_acc, weights, v_smem.at[slot])
        if not is_last:
          multiply_logits(i + 1)
        ping_pong.signal(1 - wg)
        if not is_last:
          plgpu.wgmma_wait(parts)
          plgpu.barrier_arrive(v_free.at[slot])
        return new_top, total

      out_acc[...] = full(0.0, _ROWS, U, layout=plgpu.Layout.WGMMA)
      plgpu.barrier_wait(q_full.at[wg])
      pl.when(wg == 1)(lambda: ping_pong.wait(wg))
      multiply_logits(first)
      ping_pong.signal(1 - wg)
      carry = full(_NEVER, _ROWS), full(0.0, _ROWS)
      carry = lax.fori_loop(first, last - 1, step, carry)
      top, total = step(last - 1, carry, is_last=True)
      pl.when(wg == 0)(lambda: ping_pong.wait(wg))

      out_TU = plgpu.wgmma_accumulator_load(out_acc)
      alive = of_rows(start) < of_rows(end)
      inverse = jnp.where(alive, 1 / total, 0.0)
      out_TU = jnp.where(spread(alive, U), out_TU * spread(inverse, U), 0.0)
      # The queries are no longer needed: their buffer takes the output.
      out_TU = out_TU.astype(out.dtype)
      for part in range(U // _COLUMNS):
        columns = slice(part * _COLUMNS, (part + 1) * _COLUMNS)
        q_smem[wg, part] = out_TU[:, columns]
      lse_smem[wg] = jnp.where(
        alive, top * (1 / _LOG2E) + jnp.log(total), -jnp.inf
      )
      plgpu.commit_smem()
      rows = pl.ds(query, _ROWS)
      for part in range(U // _COLUMNS):
        columns = pl.ds(part * _COLUMNS, _COLUMNS)
        plgpu.copy_smem_to_gmem(
          q_smem.at[wg, part], out.at[batch, rows, head, columns]
        )
      plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse.at[batch, head, rows])
      plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
      compute,
      plgpu.ACC((_ROWS, U), jnp.float32),
      plgpu.ACC((_ROWS, bS), jnp.float32),
    )
