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

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.hopper import fragments
from pallas_kernels.hopper import rows as rows_lib
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import spans as spans_lib

_bK: Final = tiles.ROWS
_STAGES: Final = 2
# Part of d key that is computed at once: with larger ones, an SM's registers do
# not hold three queries.
_COLUMNS: Final = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scratch:
  """Shared memory of a query."""

  q: Any  # by parts of the columns; in the end its gradient
  k: Any
  g: Any
  rows: Any
  loaded: Any

  @classmethod
  def types(cls, M: int, I: int, K: int) -> Any:
    parts = I // _COLUMNS
    return cls(
      q=tiles.shared((parts, M, _COLUMNS)),
      k=tiles.shared((_STAGES, _bK, I)),
      g=tiles.shared((_bK, M)),
      rows=plgpu.SMEM((K,), jnp.int32),
      loaded=plgpu.Barrier(num_arrivals=parts),
    )


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
  kernel = plgpu.kernel(
    functools.partial(_query, T=T, S=S),
    out_type=(
      jax.ShapeDtypeStruct((B * T, M, I), jnp.bfloat16),
      jax.ShapeDtypeStruct((B * T, M), jnp.float32),
    ),
    grid=(B * T,),
    grid_names=("query",),
    kernel_name="sparse_indexer_loss_gradient",
    scratch_types=[_Scratch.types(M, I, K)],
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
  )
  d_k = jax.new_ref(jnp.zeros((B * S, I), jnp.float32))
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


def _query(
  q, k, w, indices, gap, count, d_loss, d_k, d_q, d_w, scratch, *, T, S
):
  """Computes the gradients of one query."""
  M, I = q.shape[1:]
  t = lax.axis_index("query")
  spans = spans_lib.Spans.of(indices.shape[1])
  for i in range(I // _COLUMNS):
    plgpu.copy_gmem_to_smem(_part(q.at[t], i), scratch.q.at[i], scratch.loaded)
  first_row, d = lax.div(t, T) * S, d_loss[t]
  # A query without a gradient reads nothing.
  last = jnp.where(d == 0.0, 0, count[t])
  num_tiles = lax.div(last + (_bK - 1), _bK)

  def find_rows(keys, _):
    spans.find_rows(indices.at[t], scratch.rows, keys, S, first_row)

  spans.fold(spans.number(last), find_rows, None)
  plgpu.commit_smem()
  ahead = _STAGES - 1
  ring = rows_lib.Ring(k, scratch.rows, scratch.k, num_tiles, ahead)
  ring.start()
  plgpu.barrier_wait(scratch.loaded)
  w_M = tiles.load(w.at[t], tiles.BY_COLUMN).astype(jnp.bfloat16)

  def walk(sum_MI):
    def step(i, _):
      k_s, gap_K = ring.get(i), gap.at[t, pl.ds(i * _bK, _bK)]
      d_K = d * tiles.load(gap_K, tiles.BY_ROW)
      g_KM, w_KM = _where_active(_similarity(k_s, scratch.q, M), d_K, w_M)
      scratch.g[...] = g_KM
      plgpu.commit_smem()
      plgpu.wgmma(sum_MI, scratch.g.transpose((1, 0)), k_s)
      _add_to_keys(d_k, scratch, i, w_KM, d_K)

    lax.fori_loop(0, num_tiles, step, None)
    return sum_MI[...]

  sum_MI = pl.run_scoped(walk, plgpu.ACC((M, I), jnp.float32))
  rows_lib.wait_copies(0)
  _write_query(sum_MI, w.at[t], scratch.q, d_q.at[t], d_w, t)


def _part(x, i):
  """The i-th part of the columns."""
  return x.at[:, pl.ds(i * _COLUMNS, _COLUMNS)]


def _similarity(k_s, q_s, M):
  """Multiplies a tile of keys by the query's heads."""

  def multiply(acc):
    for i in range(q_s.shape[0]):
      plgpu.wgmma(acc, _part(k_s, i), q_s.at[i].transpose((1, 0)))
    return acc[...]

  return pl.run_scoped(multiply, plgpu.ACC((_bK, M), jnp.float32))


def _add_to_keys(d_k, scratch, tile, w_KM, d_K):
  """Adds to the gradients of a tile's keys."""

  def add_part(part, _):
    def multiply_back(acc):
      plgpu.wgmma(acc, w_KM, scratch.q.at[part])
      return acc[...]

    acc = plgpu.ACC((_bK, _COLUMNS), jnp.float32)
    d_key_KI = pl.run_scoped(multiply_back, acc)
    d_key_KI *= tiles.over_columns(d_K, _COLUMNS)
    first, column = tile * _bK, part * _COLUMNS
    rows_lib.add(d_k, scratch.rows, d_key_KI, first, column)

  # A loop, so that the parts reuse the same registers.
  lax.fori_loop(0, scratch.q.shape[0], add_part, None)


def _write_query(sum_MI, w, q_s, d_q, d_w, t):
  """Writes the gradients of the query and of its weights."""
  # Here heads are rows; there they were columns.
  w_M = tiles.load(w, tiles.BY_ROW)
  d_w_M = tiles.by_row(0.0)
  parts, M, _ = q_s.shape
  for i in range(parts):
    q_MI = plgpu.load(q_s.at[i], layout=tiles.MATRIX)
    column = i * _COLUMNS
    part_MI = lax.slice(sum_MI, (0, column), (M, column + _COLUMNS))
    d_w_M += jnp.sum(q_MI.astype(jnp.float32) * part_MI, 1)
    part_MI *= tiles.over_columns(w_M, _COLUMNS)
    q_s[i] = part_MI.astype(jnp.bfloat16)
  d_w[t] = d_w_M
  plgpu.commit_smem()
  for i in range(parts):
    plgpu.copy_smem_to_gmem(q_s.at[i], _part(d_q, i))
  plgpu.wait_smem_to_gmem(0)


def _where_active(
  similarity_KM: Float[Array, "64 heads"],
  d_K: Float[Array, "64"],
  w_M: BFloat16[Array, " heads"],
) -> tuple[BFloat16[Array, "64 heads"], BFloat16[Array, "64 heads"]]:
  """Masks d_K and w_M with 0 where the similarity is not positive."""
  masked = fragments.matrix(similarity_KM.shape[1], jnp.bfloat16)

  @threads.code(
    *(tiles.MATRIX, tiles.BY_ROW, tiles.BY_COLUMN), returns=(masked, masked)
  )
  def emit(similarity, d, w):
    floats, words = fragments.floats, fragments.words
    both = where_active(floats(similarity), floats(d), words(w))
    return tuple(map(fragments.of_words, both))

  return emit(similarity_KM, d_K, w_M)


def where_active(
  similarity: Sequence[F32], d: Sequence[F32], w: Sequence[U32]
) -> tuple[list[U32], list[U32]]:
  """Masks d and w, as one of a warpgroup's threads; see `fragments`.

  Two at a time: comparing a pair gives a bit mask.

  Args:
    similarity: Its numbers of keys x heads.
    d: Of its two keys.
    w: Of its heads, in pairs.

  Returns:
    d and w where the similarity is positive, else 0; in pairs, bfloat16.
  """
  of_keys = [x.pack(x) for x in d]
  ds, ws = [], []
  pairs = zip(similarity[::2], similarity[1::2], strict=True)
  for i, (low, high) in enumerate(pairs):
    mask = low.pack(high).positive_halves()
    # Of the same heads, one key's pair comes after the other's.
    ds.append(mask & of_keys[i % 2])
    ws.append(mask & w[i // 2])
  return ds, ws
