"""Gradients of index queries, keys and weights from d scores, on Hopper.

A warpgroup has one query and gathers its keys, 64 at a time. With g[k, m] =
d scores[k] where head m is active at key k, else 0:

  d q[m] = w[m] sum_k g[k, m] key[k]
  d w[m] = q[m] . sum_k g[k, m] key[k]
  d key[k] = d scores[k] sum_m (w[m] where active, else 0) q[m]

d w comes for free, as relu(q . key) = q . (key where active, else 0). The speed
is bound by the accumulation of d key in device memory, 512 bytes for each pair
of a query and a key.
"""

from typing import Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import vector
from jaxtyping import Array, BFloat16, Float, Int
import numpy as np

from pallas_kernels.hopper import rows as rows_lib
from pallas_kernels.hopper import tiles

_bK: Final = tiles.ROWS
_STAGES: Final = 2
# Part of d key that is computed at once: with larger ones, an SM's registers do
# not hold three queries.
_COLUMNS: Final = 64
_BY_KEY: Final = plgpu.Layout.WGMMA.reduce(1)
_BY_HEAD: Final = plgpu.Layout.WGMMA.reduce(0)


def gradient(
  q_index: BFloat16[Array, "B T 64 128"],
  k_index: BFloat16[Array, "B S 128"],
  w: Float[Array, "B T 64"],
  indices: Int[Array, "B T K"],
  gap: Float[Array, "B T K"],
  count: Int[Array, "B T"],
  d_loss: Float[Array, "B T"],
) -> tuple[
  BFloat16[Array, "B T 64 128"],
  Float[Array, "B S 128"],
  Float[Array, "B T 64"],
]:
  """Computes d q_index, d k_index (summed in f32, in no fixed order) and d w.

  Args:
    q_index: Index queries.
    k_index: Index keys.
    w: Head weights.
    indices: Selected keys, as passed to `compare`.
    gap: Result of `compare`: d loss / d scores.
    count: Result of `compare`: length of the prefix of keys to read.
    d_loss: Cotangent of each query's loss.
  """
  (B, T, M, I), S, K = q_index.shape, k_index.shape[1], indices.shape[2]
  f32, bf16 = jnp.float32, jnp.bfloat16
  span = next(x for x in (1024, 512, 256) if not K % x)
  strided = plgpu.Layout.WG_STRIDED((span,), 1)

  def body(q, k, w, indices, gap, count, d_loss, d_k, d_q, d_w, *scratch):
    t = lax.axis_index("query")
    q_s, k_s, g_s, rows_s, loaded = scratch
    columns = range(0, I, _COLUMNS)
    for i, column in enumerate(columns):
      part = q.at[t, :, pl.ds(column, _COLUMNS)]
      plgpu.copy_gmem_to_smem(part, q_s.at[i], loaded)
    first_row, d = lax.div(t, T) * S, d_loss[t]
    # A query without a gradient reads nothing.
    last = jnp.where(d == 0.0, 0, count[t])
    num_tiles = lax.div(last + (_bK - 1), _bK)

    def find_rows(i, _):
      keys = pl.ds(i * span, span)
      index = plgpu.load(indices.at[t, keys], layout=strided)
      rows_s[keys] = rows_lib.numbers(index, S, first_row)

    lax.fori_loop(0, lax.div(last + (span - 1), span), find_rows, None)
    plgpu.commit_smem()

    def start(i):
      @pl.when(i < num_tiles)
      def _():
        slot = k_s.at[lax.rem(i, _STAGES)]
        rows_lib.start_copy(k, rows_s, slot, i * _bK)

      rows_lib.commit_copies()

    for i in range(_STAGES - 1):
      start(jnp.int32(i))
    plgpu.barrier_wait(loaded)
    w_M = plgpu.load(w.at[t], layout=_BY_HEAD, optimized=False).astype(bf16)

    def step(i, sum_MI):
      rows_lib.wait_copies(_STAGES - 2)
      start(i + _STAGES - 1)
      slot = k_s.at[lax.rem(i, _STAGES)]

      def multiply(acc):
        for part in range(I // _COLUMNS):
          key_KI = slot.at[:, pl.ds(part * _COLUMNS, _COLUMNS)]
          q_IM = q_s.at[part].transpose((1, 0))
          plgpu.wgmma(acc, key_KI, q_IM)
        return acc[...]

      keys = pl.ds(i * _bK, _bK)
      d_K = d * plgpu.load(gap.at[t, keys], layout=_BY_KEY, optimized=False)
      similarity_KM = pl.run_scoped(multiply, plgpu.ACC((_bK, M), f32))
      g_KM, w_KM = _where_active(similarity_KM, d_K, w_M)
      g_s[...] = g_KM
      plgpu.commit_smem()
      plgpu.wgmma(sum_MI, g_s.transpose((1, 0)), slot)

      def add_part(part, _):
        def multiply_back(acc):
          plgpu.wgmma(acc, w_KM, q_s.at[part])
          return acc[...]

        shape = _bK, _COLUMNS
        d_key_KI = pl.run_scoped(multiply_back, plgpu.ACC(shape, f32))
        d_key_KI *= lax.broadcast_in_dim(d_K, shape, (0,))
        rows_lib.add(d_k, rows_s, d_key_KI, i * _bK, part * _COLUMNS)

      # A loop, so that the parts reuse the same registers.
      lax.fori_loop(0, I // _COLUMNS, add_part, None)

    def walk(sum_MI):
      lax.fori_loop(0, num_tiles, lambda i, _: step(i, sum_MI), None)
      return sum_MI[...]

    sum_MI = pl.run_scoped(walk, plgpu.ACC((M, I), f32))
    rows_lib.wait_copies(0)
    # Here heads are rows; there they were columns.
    w_M = plgpu.load(w.at[t], layout=_BY_KEY, optimized=False)
    d_w_M = plgpu.layout_cast(jnp.zeros((M,), f32), _BY_KEY)
    for i, column in enumerate(columns):
      q_MI = plgpu.load(q_s.at[i], layout=plgpu.Layout.WGMMA)
      part_MI = lax.slice(sum_MI, (0, column), (M, column + _COLUMNS))
      d_w_M += jnp.sum(q_MI.astype(f32) * part_MI, 1)
      part_MI *= lax.broadcast_in_dim(w_M, (M, _COLUMNS), (0,))
      q_s[i] = part_MI.astype(bf16)
    d_w[t] = d_w_M
    plgpu.commit_smem()
    for i, column in enumerate(columns):
      part = d_q.at[t, :, pl.ds(column, _COLUMNS)]
      plgpu.copy_smem_to_gmem(q_s.at[i], part)
    plgpu.wait_smem_to_gmem(0)

  kernel = plgpu.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct((B * T, M, I), bf16),
      jax.ShapeDtypeStruct((B * T, M), f32),
    ),
    grid=(B * T,),
    grid_names=("query",),
    scratch_types=(
      tiles.shared((I // _COLUMNS, M, _COLUMNS)),
      tiles.shared((_STAGES, _bK, I)),
      tiles.shared((_bK, M)),
      plgpu.SMEM((K,), jnp.int32),
      plgpu.Barrier(num_arrivals=I // _COLUMNS),
    ),
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
  )
  d_k = jax.new_ref(jnp.zeros((B * S, I), f32))
  flat = lambda x: x.reshape(B * T, *x.shape[2:])
  d_q, d_w = kernel(
    flat(q_index),
    k_index.reshape(B * S, I),
    *map(flat, (w, indices, gap, count, d_loss)),
    d_k,
  )
  return (
    d_q.reshape(q_index.shape),
    d_k[...].reshape(k_index.shape),
    d_w.reshape(w.shape),
  )


def _where_active(
  similarity_KM: Float[Array, "64 heads"],
  d_K: Float[Array, "64"],
  w_M: BFloat16[Array, " heads"],
) -> tuple[BFloat16[Array, "64 heads"], BFloat16[Array, "64 heads"]]:
  """Masks d_K and w_M with 0 where the similarity is not positive.

  Two at a time: comparing a pair gives a bit mask.
  """
  result = plgpu.ShapeDtypeStruct(
    similarity_KM.shape, jnp.dtype("bfloat16"), layout=plgpu.Layout.WGMMA
  )

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, _BY_KEY, _BY_HEAD),
    return_type=(result, result),
  )
  def select(ctx, similarity, d, w):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    bf16_pair = ir.VectorType.get((2,), ir.BF16Type.get())
    bits = lambda pair: vector.extract(
      vector.bitcast(ir.VectorType.get((1,), i32), pair),
      dynamic_position=[],
      static_position=ir.DenseI64ArrayAttr.get([0]),
    )
    pair = lambda bits: vector.bitcast(
      bf16_pair, vector.broadcast(ir.VectorType.get((1,), i32), bits)
    )
    # By eighths of the heads and halves of a warp's rows.
    shape = similarity.registers.shape
    halves = [
      bits(arith.truncf(bf16_pair, vector.broadcast(x, y)))
      for x, y in (
        (
          ir.VectorType.get((2,), ir.F32Type.get()),
          vector.extract(
            register,
            dynamic_position=[],
            static_position=ir.DenseI64ArrayAttr.get([0]),
          ),
        )
        for register in d.registers.flat
      )
    ]
    columns = [bits(x) for x in w.registers.flat]
    by_place = similarity.registers.reshape(len(columns), len(halves))
    ds, ws = [], []
    for row in zip(by_place, columns, strict=True):
      for x, half in zip(row[0], halves, strict=True):
        mask = mgpu.utils.inline_ptx(
          "{ .reg .b32 zero; mov.b32 zero, 0;"
          " set.gt.u32.bf16x2 $0, $1, zero; }",
          bits(arith.truncf(bf16_pair, x)),
          result_types=i32,
        )
        ds.append(pair(arith.andi(mask, half)))
        ws.append(pair(arith.andi(mask, row[1])))
    return tuple(
      mgpu.FragmentedArray(
        _registers=np.array(x, dtype=object).reshape(shape),
        _layout=similarity.layout,
        _is_signed=None,
      )
      for x in (ds, ws)
    )

  return select(similarity_KM, d_K, w_M)
