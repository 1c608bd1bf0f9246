"""Divergence of index scores from the attention's probabilities, on Hopper.

A warpgroup has one query and gathers its keys, 64 at a time. Keys are the rows
of the product with the query's heads, so that a score is a sum over a row; the
scores of all keys stay in shared memory for the softmax.
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

_bK: Final = tiles.ROWS
_STAGES: Final = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scratch:
  """Shared memory of a query."""

  q: Any
  k: Any
  scores: Any
  rows: Any
  loaded: Any

  @classmethod
  def types(cls, M: int, I: int, K: int) -> Any:
    return cls(
      q=tiles.shared((M, I)),
      k=tiles.shared((_STAGES, _bK, I)),
      scores=plgpu.SMEM((K,), jnp.float32),
      rows=plgpu.SMEM((K,), jnp.int32),
      loaded=plgpu.Barrier(),
    )


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
  kernel = plgpu.kernel(
    functools.partial(_query, T=T, S=S),
    out_type=(
      jax.ShapeDtypeStruct((B * T,), jnp.float32),
      jax.ShapeDtypeStruct((B * T, K), jnp.float32),
      jax.ShapeDtypeStruct((B * T,), jnp.int32),
    ),
    grid=(B * T,),
    grid_names=("query",),
    kernel_name="sparse_indexer_loss_compare",
    scratch_types=[_Scratch.types(M, I, K)],
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
  )
  flat = lambda x: x.reshape(B * T, *x.shape[2:])
  loss, gap, count = kernel(
    flat(q_index), k_index.reshape(B * S, I), flat(w), flat(indices), flat(p)
  )
  return loss.reshape(B, T), gap.reshape(B, T, K), count.reshape(B, T)


def _query(q, k, w, indices, p, loss, gap, count, scratch, *, T, S):
  """Computes all results of one query."""
  K, t = indices.shape[1], lax.axis_index("query")
  spans = spans_lib.Spans.of(K)
  plgpu.copy_gmem_to_smem(q.at[t], scratch.q, scratch.loaded)
  first_row = lax.div(t, T) * S
  last = _find_rows(indices.at[t], scratch.rows, spans, S, first_row)
  count[t] = last
  num_tiles = lax.div(last + (_bK - 1), _bK)
  plgpu.commit_smem()
  ahead = _STAGES - 1
  ring = rows_lib.Ring(k, scratch.rows, scratch.k, num_tiles, ahead)
  ring.start()
  plgpu.barrier_wait(scratch.loaded)
  _score(w.at[t], ring, scratch)
  plgpu.commit_smem()
  number = spans.number(last)
  keys = _Keys(scratch, p.at[t], spans, number)
  log_total, mass = keys.totals()
  loss[t] = keys.divergence(gap.at[t], log_total, mass)

  def clear(i, _):
    zeros = jnp.zeros((spans.size,), jnp.float32)
    ignored = pl.ds(i * spans.size, spans.size)
    gap[t, ignored] = plgpu.layout_cast(zeros, spans.layout)

  lax.fori_loop(number, K // spans.size, clear, None)


def _find_rows(indices, rows, spans, S, first_row):
  """Stores row numbers; returns the end of the last key not to be ignored."""

  def find(keys, last):
    found = spans.find_rows(indices, rows, keys, S, first_row)
    place = lax.broadcasted_iota(jnp.int32, (spans.size,), 0) + keys.start
    place = plgpu.layout_cast(place, spans.layout)
    return jnp.maximum(last, jnp.max(jnp.where(found >= 0, place + 1, 0)))

  return spans.fold(indices.shape[0] // spans.size, find, jnp.int32(0))


def _score(w, ring, scratch):
  """Stores the scores of all keys, tile by tile."""
  M = w.shape[0]
  w_M = tiles.load(w, tiles.BY_COLUMN)

  def score(i, _):
    k_s = ring.get(i)

    def multiply(acc):
      plgpu.wgmma(acc, k_s, scratch.q.transpose((1, 0)))
      return acc[...]

    similarity_KM = pl.run_scoped(multiply, plgpu.ACC((_bK, M), jnp.float32))
    scores_KM = jnp.maximum(similarity_KM, 0.0) * tiles.over_rows(w_M)
    scratch.scores[pl.ds(i * _bK, _bK)] = jnp.sum(scores_KM, 1)

  lax.fori_loop(0, ring.number, score, None)


@dataclasses.dataclass(frozen=True)
class _Keys:
  """Scores of a query's keys and attention weights `p`, span by span."""

  scratch: _Scratch
  p: Any
  spans: spans_lib.Spans
  number: Int[Array, ""]  # of spans to read

  def scores(self, keys):
    """Scores, -inf if ignored; and which are not ignored."""
    real = self.spans.load(self.scratch.rows, keys) >= 0
    scores_K = self.spans.load(self.scratch.scores, keys)
    return jnp.where(real, scores_K, -jnp.inf), real

  def totals(self):
    """Logsumexp of the scores, and sum of the weights."""

    def find_top(keys, top):
      return jnp.maximum(top, jnp.max(self.scores(keys)[0]))

    def add_up(keys, sums):
      scores_K, real_K = self.scores(keys)
      total, mass = sums
      total += jnp.sum(jnp.exp(scores_K - top))
      mass += jnp.sum(jnp.where(real_K, self.spans.load(self.p, keys), 0.0))
      return total, mass

    zero = jnp.float32(0.0)
    top = self.spans.fold(self.number, find_top, -jnp.float32(jnp.inf))
    total, mass = self.spans.fold(self.number, add_up, (zero, zero))
    return top + jnp.log(total), mass

  def divergence(self, gap, log_total, mass):
    """KL of the softmaxes; stores the gaps between them."""
    inverse = 1.0 / jnp.where(mass > 0, mass, 1.0)

    def subtract(keys, divergence):
      scores_K, real_K = self.scores(keys)
      p_K = self.spans.load(self.p, keys)
      target_K = jnp.where(real_K, p_K * inverse, 0.0)
      log_index_K = jnp.where(real_K, scores_K - log_total, 0.0)
      index_K = jnp.where(real_K, jnp.exp(log_index_K), 0.0)
      gap[keys] = index_K - target_K
      # A key of zero target adds nothing, whatever its score.
      log_target_K = jnp.log(jnp.where(target_K > 0, target_K, 1.0))
      lost_K = target_K * (log_target_K - log_index_K)
      return divergence + jnp.sum(jnp.where(target_K > 0, lost_K, 0.0))

    return self.spans.fold(self.number, subtract, jnp.float32(0.0))
