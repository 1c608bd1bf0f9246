"""Target of the sparse loss: weights summed over heads, on Hopper.

A block has one query and keeps all its heads. Each of two warpgroups has half
of the keys and loops over them 64 at a time, by columns of 64: a ring of such
pieces is all that shared memory has room for beside the query. While one
computes exponentials, the other multiplies. Keys are the rows of the product,
so that the sum over heads stays within a row.
"""

import dataclasses
import functools
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.hopper import rows as rows_lib
from pallas_kernels.hopper import tiles
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import spans as spans_lib
from pallas_kernels.softmax import LOG2E

_bK: Final = tiles.ROWS
_COLUMNS: Final = 64
_WARPGROUPS: Final = 2
_MOST_STAGES: Final = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scratch:
  """Shared memory of a query."""

  q: Any  # by columns
  kv: Any  # of each warpgroup
  rows: Any
  loaded: Any

  @classmethod
  def types(cls, N: int, D: int, K: int) -> Any:
    parts = D // _COLUMNS
    free = tiles.SHARED_MEMORY - 2 * N * D - 4 * K
    stages = min(free // (2 * _WARPGROUPS * _bK * _COLUMNS), _MOST_STAGES)
    return cls(
      q=tiles.shared((parts, N, _COLUMNS)),
      kv=tiles.shared((_WARPGROUPS, stages, _bK, _COLUMNS)),
      rows=plgpu.SMEM((K,), jnp.int32),
      loaded=plgpu.Barrier(num_arrivals=parts),
    )


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
  kernel = plgpu.kernel(
    functools.partial(_query, T=T, S=S, scale=scale),
    out_type=jax.ShapeDtypeStruct((B * T, K), jnp.float32),
    grid=(B * T,),
    grid_names=("query",),
    kernel_name="sparse_indexer_loss_target",
    num_threads=_WARPGROUPS,
    thread_name="wg",
    scratch_types=[_Scratch.types(N, D, K)],
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True, approx_math=True
    ),
  )
  flat = lambda x: x.reshape(B * T, *x.shape[2:])
  p = kernel(flat(q), kv.reshape(B * S, D), flat(indices), flat(lse))
  return p.reshape(B, T, K)


def _query(q, kv, indices, lse, p, scratch, *, T, S, scale):
  """Computes the sums of one query, each warpgroup half of them."""
  t, wg = lax.axis_index("query"), lax.axis_index("wg")
  mine = indices.shape[1] // _WARPGROUPS
  first_row, begin = lax.div(t, T) * S, wg * mine
  parts = scratch.q.shape[0]

  @pl.when(wg == 0)
  def _():
    for part in range(parts):
      columns = pl.ds(part * _COLUMNS, _COLUMNS)
      q_s = scratch.q.at[part]
      plgpu.copy_gmem_to_smem(q.at[t, :, columns], q_s, scratch.loaded)

  spans = spans_lib.Spans.of(mine)
  for i in range(0, mine, spans.size):
    keys = pl.ds(begin + i, spans.size)
    spans.find_rows(indices.at[t], scratch.rows, keys, S, first_row)
  plgpu.commit_smem()
  # One piece less is copied ahead than there is room for: the piece before the
  # last may still be read, as its product overlaps with the next one's.
  kv_s = scratch.kv.at[wg]
  ahead, tile_count = kv_s.shape[0] - 2, mine // _bK
  ring = rows_lib.Ring(
    kv, scratch.rows, kv_s, tile_count, ahead, pieces=parts, first=begin
  )
  ring.start()
  plgpu.barrier_wait(scratch.loaded)
  lse_N = tiles.load(lse.at[t], tiles.BY_COLUMN) * LOG2E

  def step(tile, _):
    logits_KN = _multiply(ring, tile, scratch.q)
    lse_KN = tiles.over_rows(lse_N)
    weights_KN = jnp.exp2(logits_KN * (scale * LOG2E) - lse_KN)
    keys = pl.ds(begin + tile * _bK, _bK)
    real_K = plgpu.load(scratch.rows.at[keys], layout=tiles.BY_ROW) >= 0
    p[t, keys] = jnp.where(real_K, jnp.sum(weights_KN, 1), 0.0)

  lax.fori_loop(0, tile_count, step, None)


def _multiply(ring, tile, q_s):
  """Multiplies a tile of keys by all heads."""
  parts, N, _ = q_s.shape

  def multiply(acc):
    for part in range(parts):
      kv_s = ring.get(tile, part)
      plgpu.wgmma(acc, kv_s, q_s.at[part].transpose((1, 0)))
      plgpu.wgmma_wait(1)
    return acc[...]

  return pl.run_scoped(multiply, plgpu.ACC((_bK, N), jnp.float32))
