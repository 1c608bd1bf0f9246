"""Target of the sparse loss: weights summed over heads, on Hopper.

A block has one query and keeps all its heads. Each of two warpgroups has half
of the keys and loops over them 64 at a time, by columns of 64: a ring of such
pieces is all that shared memory has room for beside the query. While one
computes exponentials, the other multiplies. Keys are the rows of the product,
so that the sum over heads stays within a row.
"""

import math
from typing import Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.hopper import rows as rows_lib
from pallas_kernels.hopper import tiles

_bK: Final = tiles.ROWS
_COLUMNS: Final = 64
_WARPGROUPS: Final = 2
_MOST_STAGES: Final = 6
_BY_KEY: Final = plgpu.Layout.WGMMA.reduce(1)
_BY_HEAD: Final = plgpu.Layout.WGMMA.reduce(0)


def target(
  q: BFloat16[Array, "B T N CR"],
  kv: BFloat16[Array, "B S CR"],
  indices: Int[Array, "B T K"],
  lse: Float[Array, "B T N"],
  scale: float,
) -> Float[Array, "B T K"]:
  """Computes sum_n exp(scale q[t, n] . kv[i] - lse[t, n]); 0 outside [0, S).

  Args:
    q: Absorbed queries. C+R a multiple of 64; N one of 16, and at most 128.
    kv: Latents and rotated keys.
    indices: Selected keys. K a multiple of 256.
    lse: Logsumexp of the attention over them.
    scale: Multiplies the logits.
  """
  (B, T, N, D), S, K = q.shape, kv.shape[1], indices.shape[2]
  parts, num_tiles, f32 = D // _COLUMNS, K // _bK // _WARPGROUPS, jnp.float32
  free = tiles.SHARED_MEMORY - 2 * N * D - 4 * K
  stages = min(free // (2 * _WARPGROUPS * _bK * _COLUMNS), _MOST_STAGES)
  span = next(x for x in (1024, 512, 256, 128) if not K // _WARPGROUPS % x)

  def body(q, kv, indices, lse, p, q_s, kv_s, rows_s, loaded):
    t, wg = lax.axis_index("query"), lax.axis_index("wg")
    first_row, begin = lax.div(t, T) * S, wg * (K // _WARPGROUPS)
    kv_s = kv_s.at[wg]

    @pl.when(wg == 0)
    def _():
      for part in range(parts):
        columns = pl.ds(part * _COLUMNS, _COLUMNS)
        plgpu.copy_gmem_to_smem(q.at[t, :, columns], q_s.at[part], loaded)

    for i in range(0, K // _WARPGROUPS, span):
      keys = pl.ds(begin + i, span)
      strided = plgpu.Layout.WG_STRIDED((span,), 1)
      index = plgpu.load(indices.at[t, keys], layout=strided)
      rows_s[keys] = rows_lib.numbers(index, S, first_row)
    plgpu.commit_smem()

    def start(tile, part):
      tile += part // parts
      part %= parts

      @pl.when(tile < num_tiles)
      def _():
        slot = lax.rem(tile * parts + part, stages)
        first, column = begin + tile * _bK, part * _COLUMNS
        rows_lib.start_copy(kv, rows_s, kv_s.at[slot], first, column)

      rows_lib.commit_copies()

    # One piece less is prefetched than there is room for: the piece before the
    # last may still be read, as its product overlaps with the next one's.
    prefetched = stages - 2
    for part in range(prefetched):
      start(jnp.int32(0), part)
    plgpu.barrier_wait(loaded)
    log2e = math.log2(math.e)
    lse_N = plgpu.load(lse.at[t], layout=_BY_HEAD, optimized=False) * log2e

    def step(tile, _):
      def multiply(acc):
        for part in range(parts):
          rows_lib.wait_copies(prefetched - 1)
          start(tile, part + prefetched)
          slot = lax.rem(tile * parts + part, stages)
          q_DN = q_s.at[part].transpose((1, 0))
          plgpu.wgmma(acc, kv_s.at[slot], q_DN)
          plgpu.wgmma_wait(1)
        return acc[...]

      logits_KN = pl.run_scoped(multiply, plgpu.ACC((_bK, N), f32))
      lse_KN = lax.broadcast_in_dim(lse_N, (_bK, N), (1,))
      weights_KN = jnp.exp2(logits_KN * (scale * log2e) - lse_KN)
      keys = pl.ds(begin + tile * _bK, _bK)
      real_K = plgpu.load(rows_s.at[keys], layout=_BY_KEY) >= 0
      p[t, keys] = jnp.where(real_K, jnp.sum(weights_KN, 1), 0.0)

    lax.fori_loop(0, num_tiles, step, None)

  kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((B * T, K), f32),
    grid=(B * T,),
    grid_names=("query",),
    num_threads=_WARPGROUPS,
    thread_name="wg",
    scratch_types=(
      tiles.shared((parts, N, _COLUMNS)),
      tiles.shared((_WARPGROUPS, stages, _bK, _COLUMNS)),
      plgpu.SMEM((K,), jnp.int32),
      plgpu.Barrier(num_arrivals=parts),
    ),
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True, approx_math=True
    ),
  )
  flat = lambda x: x.reshape(B * T, *x.shape[2:])
  p = kernel(flat(q), kv.reshape(B * S, D), flat(indices), flat(lse))
  return p.reshape(B, T, K)
