"""Target of the dense loss: attention weights summed over heads, per chunk.

  p[t, s] = sum_n exp(scale q[t, n].k[s, n] - lse[t, n])

A thread block computes a tile of 128 queries x 192 keys. It loops over the
heads; the tile's sum stays in registers, queries and keys stream through shared
memory. A cluster of two blocks takes 256 queries and shares the keys. Two
warpgroups of 64 queries each ping-pong: one multiplies while the other computes
exponentials.
"""

import dataclasses
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import softmax
from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import tiles
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import ring as ring_lib

bT: Final = 128
bS: Final = 192
# Part of a head's width H + R that a slot of the ring buffer holds.
_WIDTH: Final = 64
_SLOTS: Final = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attended:
  """Operands of the kernel, of all chunks.

  Attributes:
    q: Queries [B, T, N, HR].
    k: Keys [B, S, N, HR].
    bias: -lse [B, N, T], in base 2.
  """

  q: Any
  k: Any
  bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shared:
  q: Any
  k: Any
  ring: ring_lib.Ring

  @classmethod
  def types(cls):
    return cls(
      q=tiles.shared((_SLOTS, bT, _WIDTH)),
      k=tiles.shared((_SLOTS, bS, _WIDTH)),
      ring=ring_lib.Ring.types(_SLOTS, copies=2, in_cluster=True),
    )


def n_tiles(chunk: int, width: int) -> tuple[int, int]:
  """Numbers of tiles of queries and of keys; the last may exceed the width."""
  return chunk // bT, pl.cdiv(width, bS)


def tile(
  attended: Attended,
  queries: Any,
  target: Any,
  row: Int[Array, ""],
  key: Int[Array, ""],
  scale: float,
) -> None:
  """Writes one tile; called by all warpgroups of a cluster's blocks.

  Args:
    attended: Refs.
    queries: Refs of the `chunks.Queries`.
    target: Ref of the sums [chunk, width].
    row: First query of the tile, in the chunk; different in the two blocks of a
      cluster.
    key: First key of the tile; the same in both blocks.
    scale: Scale of the logits.
  """

  def run(shared):
    wg = lax.axis_index("wg")
    batch, query = queries.place[0], pl.multiple_of(queries.place[1], bT) + row
    at = _Tile(attended, shared, wg, batch, query, key, scale)

    def compute():
      first = wg * tiles.ROWS
      sum_TS = at.sum_over_heads(first)
      target[pl.ds(row + first, tiles.ROWS), pl.ds(key, bS)] = sum_TS

    ring_lib.divide_work(wg, at.copy, compute)

  pl.run_scoped(run, _Shared.types(), collective_axes="wg")


@dataclasses.dataclass(frozen=True)
class _Tile:
  """A tile, as the warpgroups of a block compute it."""

  attended: Attended
  shared: _Shared
  wg: Int[Array, ""]
  batch: Int[Array, ""]
  query: Int[Array, ""]  # the tile's first
  key: Int[Array, ""]  # the tile's first
  scale: float

  @property
  def parts(self):
    """Steps of the ring buffer for each head."""
    return self.attended.q.shape[3] // _WIDTH

  def copy(self):
    """Copies queries and keys, head by head and part by part."""
    ring, parts = self.shared.ring, self.parts

    def part_of_head(step, slot):
      n = lax.div(step, parts)
      part = pl.ds(lax.rem(step, parts) * _WIDTH, _WIDTH)
      plgpu.copy_gmem_to_smem(
        self.attended.q.at[self.batch, pl.ds(self.query, bT), n, part],
        self.shared.q.at[slot],
        ring.full.at[slot],
      )
      plgpu.copy_gmem_to_smem(
        self.attended.k.at[self.batch, pl.ds(self.key, bS), n, part],
        self.shared.k.at[slot],
        ring.full.at[slot],
        collective_axes="cluster",
      )

    ring.fill(self.attended.q.shape[2] * parts, part_of_head)

  def sum_over_heads(self, first):
    """Weights of this warpgroup's queries, the tile's from `first` on."""
    turns = barriers.PingPong(self.wg)
    turns.start()
    return lax.fori_loop(
      *(0, self.attended.q.shape[2]),
      lambda n, sum_TS: sum_TS + self.weights(n, first, turns),
      tiles.zeros(bS),
    )

  def weights(self, n, first, turns):
    """Weights of head n."""
    queries = pl.ds(self.query + first, tiles.ROWS)
    bias = self.attended.bias.at[self.batch, n, queries]
    bias_T = tiles.load(bias, tiles.BY_ROW)
    logits_TS = pl.run_scoped(
      lambda acc: self.multiply(acc, n, first, turns),
      plgpu.ACC((tiles.ROWS, bS), jnp.float32),
    )
    last = n * self.parts + self.parts - 1
    self.shared.ring.release(self.shared.ring.slot(last))
    bias_TS = tiles.over_columns(bias_T, bS)
    return jnp.exp2(logits_TS * (self.scale * softmax.LOG2E) + bias_TS)

  def multiply(self, logits, n, first, turns):
    """Unscaled logits of head n."""
    ring, mine = self.shared.ring, pl.ds(first, tiles.ROWS)
    turns.wait()
    for part in range(self.parts):
      step = n * self.parts + part
      slot = ring.slot(step)
      ring.wait(slot)
      plgpu.wgmma(
        logits,
        self.shared.q.at[slot, mine],
        self.shared.k.at[slot].transpose((1, 0)),
      )
      if part:
        plgpu.wgmma_wait(1)
        ring.release(ring.slot(step - 1))
    turns.signal()
    return logits[...]
