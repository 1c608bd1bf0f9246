"""Divergence of index scores from the attention's probabilities, on Hopper.

A warpgroup has one query and gathers its keys, 64 at a time. Keys are the rows
of the product with the query's heads, so that a score is a sum over a row; the
scores of all keys stay in shared memory for the softmax.
"""

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
_STAGES: Final = 2


def compare(
  q_index: BFloat16[Array, "B T 64 128"],
  k_index: BFloat16[Array, "B S 128"],
  w: Float[Array, "B T 64"],
  indices: Int[Array, "B T K"],
  p: Float[Array, "B T K"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T K"], Int[Array, "B T"]]:
  """Computes each query's divergence and its gradient to the scores.

  Args:
    q_index: Index queries.
    k_index: Index keys.
    w: Head weights.
    indices: Selected keys; outside [0, S) is ignored. K a multiple of 256.
    p: Attention weight of each of them, at least 0, to be normalised.

  Returns:
    KL(p || softmax(scores)); softmax(scores) - p, 0 for ignored keys; and the
    length of a prefix of the keys that has all that are not ignored.
  """
  (B, T, M, I), S, K = q_index.shape, k_index.shape[1], indices.shape[2]
  f32 = jnp.float32
  span = next(x for x in (1024, 512, 256) if not K % x)
  strided = plgpu.Layout.WG_STRIDED((span,), 1)

  def body(q, k, w, indices, p, loss, gap, count, *scratch):
    q_s, k_s, scores_s, rows_s, loaded = scratch
    t = lax.axis_index("query")
    plgpu.copy_gmem_to_smem(q.at[t], q_s, loaded)

    def fold(n, f, init):
      """Folds f(slice of `span` keys, carry) over n steps."""
      return lax.fori_loop(
        0, n, lambda i, carry: f(pl.ds(i * span, span), carry), init
      )

    def read(ref, keys):
      return plgpu.load(ref.at[keys], layout=strided)

    def find_rows(keys, last):
      first_row = lax.div(t, T) * S
      rows = rows_lib.numbers(read(indices.at[t], keys), S, first_row)
      rows_s[keys] = rows
      place = lax.broadcasted_iota(jnp.int32, (span,), 0) + keys.start
      place = plgpu.layout_cast(place, strided)
      return jnp.maximum(last, jnp.max(jnp.where(rows >= 0, place + 1, 0)))

    last = fold(K // span, find_rows, jnp.int32(0))
    count[t] = last
    num_tiles = lax.div(last + (_bK - 1), _bK)
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
    w_M = plgpu.load(
      w.at[t], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
    )

    def score(i, _):
      rows_lib.wait_copies(_STAGES - 2)
      start(i + _STAGES - 1)

      def multiply(acc):
        slot = k_s.at[lax.rem(i, _STAGES)]
        plgpu.wgmma(acc, slot, q_s.transpose((1, 0)))
        return acc[...]

      similarity_KM = pl.run_scoped(multiply, plgpu.ACC((_bK, M), f32))
      w_KM = lax.broadcast_in_dim(w_M, (_bK, M), (1,))
      scores_K = jnp.sum(jnp.maximum(similarity_KM, 0.0) * w_KM, 1)
      scores_s[pl.ds(i * _bK, _bK)] = scores_K

    lax.fori_loop(0, num_tiles, score, None)
    plgpu.commit_smem()

    def scores(keys):
      real = read(rows_s, keys) >= 0
      return jnp.where(real, read(scores_s, keys), -jnp.inf), real

    def find_top(keys, top):
      return jnp.maximum(top, jnp.max(scores(keys)[0]))

    def add_up(keys, sums):
      scores_K, real_K = scores(keys)
      total, mass = sums
      total += jnp.sum(jnp.exp(scores_K - top))
      mass += jnp.sum(jnp.where(real_K, read(p.at[t], keys), 0.0))
      return total, mass

    def subtract(keys, divergence):
      scores_K, real_K = scores(keys)
      target_K = jnp.where(real_K, read(p.at[t], keys) * inverse, 0.0)
      log_index_K = jnp.where(real_K, scores_K - log_total, 0.0)
      index_K = jnp.where(real_K, jnp.exp(log_index_K), 0.0)
      gap[t, keys] = index_K - target_K
      # A key of zero target adds nothing, whatever its score.
      log_target_K = jnp.log(jnp.where(target_K > 0, target_K, 1.0))
      lost_K = target_K * (log_target_K - log_index_K)
      return divergence + jnp.sum(jnp.where(target_K > 0, lost_K, 0.0))

    def clear(i, _):
      gap[t, pl.ds(i * span, span)] = plgpu.layout_cast(
        jnp.zeros((span,), f32), strided
      )

    zero = jnp.float32(0.0)
    num_spans = lax.div(last + (span - 1), span)
    top = fold(num_spans, find_top, -jnp.float32(jnp.inf))
    total, mass = fold(num_spans, add_up, (zero, zero))
    log_total = top + jnp.log(total)
    inverse = 1.0 / jnp.where(mass > 0, mass, 1.0)
    loss[t] = fold(num_spans, subtract, zero)
    lax.fori_loop(num_spans, K // span, clear, None)

  kernel = plgpu.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct((B * T,), f32),
      jax.ShapeDtypeStruct((B * T, K), f32),
      jax.ShapeDtypeStruct((B * T,), jnp.int32),
    ),
    grid=(B * T,),
    grid_names=("query",),
    scratch_types=(
      tiles.shared((M, I)),
      tiles.shared((_STAGES, _bK, I)),
      plgpu.SMEM((K,), f32),
      plgpu.SMEM((K,), jnp.int32),
      plgpu.Barrier(),
    ),
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
  )
  flat = lambda x: x.reshape(B * T, *x.shape[2:])
  loss, gap, count = kernel(
    flat(q_index), k_index.reshape(B * S, I), flat(w), flat(indices), flat(p)
  )
  return loss.reshape(B, T), gap.reshape(B, T, K), count.reshape(B, T)
