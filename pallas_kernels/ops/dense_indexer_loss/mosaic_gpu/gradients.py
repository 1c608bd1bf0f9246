"""Gradients of index queries and keys from d scores, for one chunk.

With g[t, m, s] = d scores[t, s] where head m is active, else 0:

  query_sums: sum_s g[t, m, s] k[s]
  key_sums:   sum_tm g[t, m, s] w[t, m] q[t, m]

Both are matrix products whose left operand, g, is computed in registers: the
bits of active heads mask d scores by a bitwise and. So g is 0 where a query
does not see a key, whatever d scores holds there.
"""

from typing import Any, Final

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import vector
import numpy as np

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper import registers
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  scores as scores_lib,
)

HEADS: Final = scores_lib.HEADS
_WORDS: Final = HEADS // scores_lib.WORD
_I: Final = 128
# query_sums: queries of a warpgroup, and keys of a step.
_QUERIES: Final = 2
query_bT: Final = 2 * _QUERIES
_KEYS: Final = 128
_QUERY_STAGES: Final = 5
# key_sums: a block has so many keys, and takes so many queries, two at a time.
key_bS: Final = 256
key_bT: Final = 64
_PAIR: Final = 2
_KEY_STAGES: Final = 4


def query_scratch(dtype) -> tuple[Any, ...]:
  """Scratch of one block, for `query_sums`."""
  return (
    plgpu.SMEM((_QUERY_STAGES, query_bT, _KEYS), jnp.bfloat16),
    plgpu.SMEM((_QUERY_STAGES, _WORDS, query_bT, _KEYS), jnp.int32),
    _operand((_QUERY_STAGES, _KEYS, _I), dtype),
    plgpu.Barrier(num_arrivals=3, num_barriers=_QUERY_STAGES),
    plgpu.Barrier(num_arrivals=2, num_barriers=_QUERY_STAGES),
  )


def query_sums(inputs, sums, row, d_s, active_s, k_s, full, free) -> None:
  """Computes the sums of `query_bT` queries; all warpgroups call it.

  Args:
    inputs: Refs of d scores [chunk, width], bits of active heads [2, chunk,
      width], k_index [B, S, 128], place: batch row and first query of the
      chunk, start and end [chunk]: the first key that a query sees, and one
      past the last.
    sums: Ref of the sums [chunk, 64, 128], f32.
    row: First query, in the chunk.
    d_s: Like the arguments after it, scratch.
  """
  d_scores, active, k, place, start, end = inputs
  wg = lax.axis_index("wg")
  first, last = jnp.int32(2**31 - 1), jnp.int32(0)
  for i in range(query_bT):
    a, b = start[row + i], end[row + i]
    first = jnp.where(a < b, jnp.minimum(first, a), first)
    last = jnp.where(a < b, jnp.maximum(last, b), last)
  first = lax.div(first, _KEYS)
  steps = jnp.maximum(lax.div(last + _KEYS - 1, _KEYS) - first, 0)

  @pl.when(wg == 2)
  def _load():
    plgpu.set_max_registers(40, action="decrease")

    def step(i, _):
      slot, key = lax.rem(i, _QUERY_STAGES), (first + i) * _KEYS
      pl.when(i >= _QUERY_STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
      rows, keys = pl.ds(row, query_bT), pl.ds(key, _KEYS)
      for source, target in (
        (k.at[place[0], keys], k_s),
        (d_scores.at[rows, keys], d_s),
        (active.at[:, rows, keys], active_s),
      ):
        plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

    lax.fori_loop(0, steps, step, None)

  @pl.when(wg < 2)
  def _compute():
    plgpu.set_max_registers(232, action="increase")

    def walk(*sums):
      def step(i, _):
        slot = lax.rem(i, _QUERY_STAGES)
        plgpu.barrier_wait(full.at[slot])
        for j, sum_MI in enumerate(sums):
          query = wg * _QUERIES + j
          g_MS = _heads_by_keys(
            d_s.at[slot, query], active_s.at[slot, :, query]
          )
          plgpu.wgmma(sum_MI, g_MS, k_s.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[slot])

      lax.fori_loop(0, steps, step, None)
      return [sum_MI[...] for sum_MI in sums]

    accumulators = [plgpu.ACC((HEADS, _I), jnp.float32)] * _QUERIES
    for j, sum_MI in enumerate(pl.run_scoped(walk, *accumulators)):
      sums[row + wg * _QUERIES + j] = sum_MI


def key_scratch(dtype) -> tuple[Any, ...]:
  """Scratch of one block, for `key_sums`."""
  return (
    plgpu.SMEM((_KEY_STAGES, _PAIR, key_bS), jnp.bfloat16),
    plgpu.SMEM((_KEY_STAGES, _WORDS, _PAIR, key_bS), jnp.int32),
    _operand((_KEY_STAGES, _PAIR, HEADS, _I), dtype),
    plgpu.SMEM(
      (2, 64, _I),
      jnp.float32,
      transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
    ),
    plgpu.Barrier(num_arrivals=3, num_barriers=_KEY_STAGES),
    plgpu.Barrier(num_arrivals=2, num_barriers=_KEY_STAGES),
  )


def key_sums(
  inputs, d_k, row, key, d_s, active_s, q_s, sum_s, full, free
) -> None:
  """Adds sums of `key_bT` queries to `key_bS` keys; all warpgroups call it.

  Args:
    inputs: Refs of d scores [chunk, width], bits of active heads [2, chunk,
      width] and w q_index [chunk, 64, 128].
    d_k: Ref [width, 128], f32, to which the sums are added, in no fixed order.
    row: First query, in the chunk.
    key: First key.
    d_s: Like the arguments after it, scratch.
  """
  d_scores, active, q = inputs
  wg, steps = lax.axis_index("wg"), key_bT // _PAIR

  @pl.when(wg == 2)
  def _load():
    plgpu.set_max_registers(40, action="decrease")

    def step(i, _):
      slot = lax.rem(i, _KEY_STAGES)
      pl.when(i >= _KEY_STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
      rows, keys = pl.ds(row + i * _PAIR, _PAIR), pl.ds(key, key_bS)
      for source, target in (
        (q.at[rows], q_s),
        (d_scores.at[rows, keys], d_s),
        (active.at[:, rows, keys], active_s),
      ):
        plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

    lax.fori_loop(0, steps, step, None)

  @pl.when(wg < 2)
  def _compute():
    plgpu.set_max_registers(232, action="increase")

    def walk(*sums):
      def step(i, _):
        slot = lax.rem(i, _KEY_STAGES)
        plgpu.barrier_wait(full.at[slot])
        for j in range(_PAIR):
          for half, sum_SI in enumerate(sums):
            keys = pl.ds(wg * 128 + half * 64, 64)
            g_SM = _keys_by_heads(
              d_s.at[slot, j, keys], active_s.at[slot, :, j, keys]
            )
            plgpu.wgmma(sum_SI, g_SM, q_s.at[slot, j])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[slot])

      lax.fori_loop(0, steps, step, None)
      return [sum_SI[...] for sum_SI in sums]

    accumulators = [plgpu.ACC((64, _I), jnp.float32)] * 2
    for half, sum_SI in enumerate(pl.run_scoped(walk, *accumulators)):
      sum_s[wg] = sum_SI
      plgpu.commit_smem()
      keys = pl.ds(key + wg * 128 + half * 64, 64)
      plgpu.copy_smem_to_gmem(sum_s.at[wg], d_k.at[keys], reduction_op="add")
      plgpu.wait_smem_to_gmem(0)


def _operand(shape, dtype):
  transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def _heads_by_keys(d_scores, active):
  """g of one query, [64 heads, 128 keys], as a wgmma's left operand.

  A thread holds heads r and r + 8 of its warp's 16, and of each 8 keys the pair
  from 2 c on, for r = lane // 4 and c = lane % 4.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),) * 2,
    return_type=registers.matrix(_KEYS, jnp.bfloat16),
  )
  def make(ctx, d_scores, active):
    del ctx
    warp, r, c = _thread()
    odd, byte = (
      arith.andi(r, ptx.i32(1)),
      arith.andi(warp, ptx.i32(1)),
    )
    word = arith.index_cast(_index(), arith.shrui(warp, ptx.i32(1)))
    # A head's bit is number r // 2 (+ 4 for r + 8) of its byte; of the bytes,
    # the parity of r says which half, that of the warp which one of the half.
    pick = arith.select(_is_set(odd), ptx.i32(0x7632), ptx.i32(0x5410))
    shift = arith.subi(ptx.i32(3), arith.shrui(r, ptx.i32(1)))
    signs = arith.select(_is_set(byte), ptx.i32(0xBB99), ptx.i32(0xAA88))
    g = _empty(_KEYS)
    for i in range(_KEYS // 8):
      key = arith.addi(ptx.i32(8 * i), arith.shli(c, ptx.i32(1)))
      key = arith.index_cast(_index(), key)
      pair = _load(active, 2, [word, key])
      d = registers.from_pair(_load(d_scores, 2, [key]))
      words = [vector.extract(pair, [], [e]) for e in range(2)]
      both = registers.asm("prmt.b32 $0, $1, $2, $3;", *words, pick)
      second = arith.shli(both, shift)
      for half, bits in enumerate((arith.shli(second, ptx.i32(4)), second)):
        mask = registers.asm("prmt.b32 $0, $1, $1, $2;", bits, signs)
        _set(g, i, half, arith.andi(mask, d))
    return _array(g)

  return make(d_scores, active)


def _keys_by_heads(d_scores, active):
  """g of one query, [64 keys, 64 heads], as a wgmma's left operand.

  A thread holds keys r and r + 8 of its warp's 16, and of each 8 heads the pair
  from 2 c on, for r = lane // 4 and c = lane % 4.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),) * 2,
    return_type=registers.matrix(HEADS, jnp.bfloat16),
  )
  def make(ctx, d_scores, active):
    del ctx
    warp, r, c = _thread()
    shift = arith.subi(ptx.i32(3), c)
    g = _empty(HEADS)
    for half in range(2):
      key = arith.addi(arith.shli(warp, ptx.i32(4)), r)
      key = arith.index_cast(_index(), arith.addi(key, ptx.i32(8 * half)))
      d = _load(d_scores, 1, [key])
      d = vector.bitcast(
        ir.VectorType.get((1,), ir.IntegerType.get_signless(16)), d
      )
      d = arith.extui(registers.i32(), vector.extract(d, [], [0]))
      d = registers.asm("prmt.b32 $0, $1, $1, 0x1010;", d)
      for word in range(_WORDS):
        at = arith.constant(_index(), ir.IntegerAttr.get(_index(), word))
        bits = vector.extract(_load(active, 1, [at, key]), [], [0])
        # Heads 2 c + 8 i and the next: bits c + 4 i of the two halves.
        odd = arith.shli(bits, shift)
        even = arith.shli(odd, ptx.i32(4))
        for i in range(4):
          mask = registers.asm(
            f"prmt.b32 $0, $1, $1, {('0xAA88', '0xBB99')[i // 2]};",
            (even, odd)[i % 2],
          )
          _set(g, 4 * word + i, half, arith.andi(mask, d))
    return _array(g)

  return make(d_scores, active)


def _empty(columns):
  shape = mgpu.WGMMA_LAYOUT.registers_shape((64, columns))
  return np.empty(shape, dtype=object)


def _set(g, column_group, half, word):
  """Rows r (half 0) or r + 8 (half 1), columns from 8 column_group + 2 c on."""
  pair = registers.to_pair(word, ir.BF16Type.get())
  g.reshape(-1, 2)[column_group, half] = pair


def _array(g):
  return mgpu.FragmentedArray(
    _registers=g, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
  )


def _thread():
  """Warp in the warpgroup; row and column of the lane in an 8 x 4 warp."""
  thread = arith.andi(mgpu.thread_idx(), ptx.i32(127))
  lane = arith.andi(thread, ptx.i32(31))
  warp = arith.shrui(thread, ptx.i32(5))
  return (
    warp,
    arith.shrui(lane, ptx.i32(2)),
    arith.andi(lane, ptx.i32(3)),
  )


def _load(ref, n, at):
  element = ir.MemRefType(ref.type).element_type
  return vector.load(ir.VectorType.get((n,), element), ref, at)


def _is_set(x):
  return arith.cmpi(arith.CmpIPredicate.ne, x, ptx.i32(0))


def _index():
  return ir.IndexType.get()
