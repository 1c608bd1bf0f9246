"""Gradients of index queries and keys from d scores, for one chunk of queries.

With g[t, m, s] = d scores[t, s] where head m is active, else 0:

  query_sums: sum_s g[t, m, s] k[s]
  key_sums:   sum_tm g[t, m, s] w[t, m] q[t, m]

Both are matrix products whose left operand, g, is computed in registers: see
`active_bits`.
"""

import dataclasses
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.hopper import tiles
from pallas_kernels.hopper import widths
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import active_bits
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import ring as ring_lib

# query_sums: queries of a warpgroup, and keys of a step.
_QUERIES: Final = 2
query_bT: Final = 2 * _QUERIES
_KEYS: Final = 128
_QUERY_SLOTS: Final = 5
# key_sums: a block has so many keys, and takes so many queries, two at a time.
key_bS: Final = 256
key_bT: Final = 64
_PAIR: Final = 2
_KEY_SLOTS: Final = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DScores:
  """What g is made of: of a chunk, or of each slot of a ring buffer.

  Attributes:
    d_scores: [queries, keys], bfloat16; arbitrary where a query does not see a
      key.
    active: Bits of active heads [2, queries, keys].
  """

  d_scores: Any
  active: Any

  @classmethod
  def types(cls, slots: int, queries: int, keys: int) -> "DScores":
    """Types of a ring buffer's arrays."""
    active = slots, active_bits.WORDS, queries, keys
    return cls(
      plgpu.SMEM((slots, queries, keys), jnp.bfloat16),
      plgpu.SMEM(active, jnp.int32),
    )

  def start_copies(
    self, target: "DScores", slot: Any, full: Any, queries: Any, keys: Any
  ) -> None:
    """Copies a block to a slot: two arrivals at its barrier `full`."""
    for x, y in (
      (self.d_scores.at[queries, keys], target.d_scores),
      (self.active.at[:, queries, keys], target.active),
    ):
      plgpu.copy_gmem_to_smem(x, y.at[slot], full)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _QueryShared:
  g: DScores
  k: Any
  ring: ring_lib.Ring

  @classmethod
  def types(cls):
    return cls(
      g=DScores.types(_QUERY_SLOTS, query_bT, _KEYS),
      k=tiles.shared((_QUERY_SLOTS, _KEYS, widths.I)),
      ring=ring_lib.Ring.types(_QUERY_SLOTS, copies=3),
    )


def query_sums(
  g: DScores, k: Any, queries: Any, sums: Any, row: Int[Array, ""]
) -> None:
  """Computes the sums of `query_bT` queries; all warpgroups call it.

  Args:
    g: Refs.
    k: Ref of the index keys [B, S, 128].
    queries: Refs of the `chunks.Queries`.
    sums: Ref of the sums [chunk, 64, 128], f32.
    row: First query, in the chunk.
  """

  def run(shared):
    wg = lax.axis_index("wg")
    first, steps = _steps(queries, row)
    ring = shared.ring

    def copy(step, slot):
      key = (first + step) * _KEYS
      rows, keys = pl.ds(row, query_bT), pl.ds(key, _KEYS)
      full = ring.full.at[slot]
      plgpu.copy_gmem_to_smem(
        k.at[queries.place[0], keys], shared.k.at[slot], full
      )
      g.start_copies(shared.g, slot, full, rows, keys)

    def multiply(slot, sums):
      for j, sum_MI in enumerate(sums):
        query = wg * _QUERIES + j
        g_MS = active_bits.heads_by_keys(
          shared.g.d_scores.at[slot, query], shared.g.active.at[slot, :, query]
        )
        plgpu.wgmma(sum_MI, g_MS, shared.k.at[slot])

    def compute():
      shape = active_bits.HEADS, widths.I
      for j, sum_MI in enumerate(_add_up(ring, steps, multiply, shape)):
        sums[row + wg * _QUERIES + j] = sum_MI

    ring_lib.divide_work(wg, lambda: ring.fill(steps, copy), compute)

  pl.run_scoped(run, _QueryShared.types(), collective_axes="wg")


def _steps(queries, row):
  """First step of keys that `query_bT` queries see, and number of steps."""
  first, last = jnp.int32(2**31 - 1), jnp.int32(0)
  for i in range(query_bT):
    a, b = queries.start[row + i], queries.end[row + i]
    first = jnp.where(a < b, jnp.minimum(first, a), first)
    last = jnp.where(a < b, jnp.maximum(last, b), last)
  first = lax.div(first, _KEYS)
  return first, jnp.maximum(lax.div(last + _KEYS - 1, _KEYS) - first, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _KeyShared:
  g: DScores
  q: Any
  sums: Any
  ring: ring_lib.Ring

  @classmethod
  def types(cls):
    return cls(
      g=DScores.types(_KEY_SLOTS, _PAIR, key_bS),
      q=tiles.shared((_KEY_SLOTS, _PAIR, active_bits.HEADS, widths.I)),
      sums=tiles.shared((2, tiles.ROWS, widths.I), jnp.float32),
      ring=ring_lib.Ring.types(_KEY_SLOTS, copies=3),
    )


def key_sums(
  g: DScores,
  weighted_q: Any,
  d_k: Any,
  row: Int[Array, ""],
  key: Int[Array, ""],
) -> None:
  """Adds sums of `key_bT` queries to `key_bS` keys; all warpgroups call it.

  Args:
    g: Refs.
    weighted_q: Ref of w q_index [chunk, 64, 128].
    d_k: Ref [width, 128], f32, to which the sums are added, in no fixed order.
    row: First query, in the chunk.
    key: First key.
  """

  def run(shared):
    wg, steps = lax.axis_index("wg"), key_bT // _PAIR
    ring = shared.ring

    def copy(step, slot):
      rows, keys = pl.ds(row + step * _PAIR, _PAIR), pl.ds(key, key_bS)
      full = ring.full.at[slot]
      plgpu.copy_gmem_to_smem(weighted_q.at[rows], shared.q.at[slot], full)
      g.start_copies(shared.g, slot, full, rows, keys)

    def multiply(slot, sums):
      for j in range(_PAIR):
        for half, sum_SI in enumerate(sums):
          keys = pl.ds(wg * 128 + half * tiles.ROWS, tiles.ROWS)
          g_SM = active_bits.keys_by_heads(
            shared.g.d_scores.at[slot, j, keys],
            shared.g.active.at[slot, :, j, keys],
          )
          plgpu.wgmma(sum_SI, g_SM, shared.q.at[slot, j])

    def compute():
      shape = tiles.ROWS, widths.I
      for half, sum_SI in enumerate(_add_up(ring, steps, multiply, shape)):
        shared.sums[wg] = sum_SI
        plgpu.commit_smem()
        keys = pl.ds(key + wg * 128 + half * tiles.ROWS, tiles.ROWS)
        mine = shared.sums.at[wg]
        plgpu.copy_smem_to_gmem(mine, d_k.at[keys], reduction_op="add")
        plgpu.wait_smem_to_gmem(0)

    ring_lib.divide_work(wg, lambda: ring.fill(steps, copy), compute)

  pl.run_scoped(run, _KeyShared.types(), collective_axes="wg")


def _add_up(ring, steps, multiply, shape):
  """Two accumulators, after `multiply(slot, accumulators)` of all steps."""

  def walk(*sums):
    def step(i, _):
      slot = ring.slot(i)
      ring.wait(slot)
      multiply(slot, sums)
      plgpu.wgmma_wait(0)
      ring.release(slot)

    lax.fori_loop(0, steps, step, None)
    return [x[...] for x in sums]

  return pl.run_scoped(walk, *[plgpu.ACC(shape, jnp.float32)] * 2)
