"""Index scores and bits of active heads, for one chunk of queries.

A tile of 128 queries x 128 keys loops over the indexer's heads; the scores stay
in registers. A cluster of two blocks shares the queries. The gradients need of
a head's similarity only whether it is active, q.k > 0: one bit, saved here in
place of another multiplication.
"""

import dataclasses
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import tiles
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import active_bits
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import ring as ring_lib

bT: Final = 128
bS: Final = 128
_SLOTS: Final = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Index:
  """Operands of the kernel, of all chunks.

  Attributes:
    q: Index queries [B, T, 64, 128].
    k: Index keys [B, S, 128].
    half_w: Half of the head weights [B, 64, T].
  """

  q: Any
  k: Any
  half_w: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """Results of the kernel, of a chunk.

  Attributes:
    scores: [chunk, width], -inf where a query does not see a key.
    active: Bits of active heads [2, chunk, width], see `active_bits`; 0 where a
      query does not see a key.
    top: Maximum score [nS, chunk] of each tile of keys.
    total: Sum of exponentials relative to it.
  """

  scores: Any
  active: Any
  top: Any
  total: Any

  @classmethod
  def types(cls, chunk: int, width: int) -> "Scores":
    a = jax.ShapeDtypeStruct
    _, nS = n_tiles(chunk, width)
    return cls(
      scores=a((chunk, width), jnp.float32),
      active=a((active_bits.WORDS, chunk, width), jnp.int32),
      top=a((nS, chunk), jnp.float32),
      total=a((nS, chunk), jnp.float32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shared:
  q: Any
  k: Any
  k_full: Any
  ring: ring_lib.Ring

  @classmethod
  def types(cls):
    return cls(
      q=tiles.shared((_SLOTS, bT, 128)),
      k=tiles.shared((bS, 128)),
      k_full=plgpu.Barrier(),
      ring=ring_lib.Ring.types(_SLOTS, copies=1, in_cluster=True),
    )


def n_tiles(chunk: int, width: int) -> tuple[int, int]:
  """Numbers of tiles of queries, and of keys, several of them per cluster."""
  return chunk // bT, width // bS


def tile(
  index: Index,
  queries: Any,
  results: Scores,
  row: Int[Array, ""],
  i_s: Int[Array, ""],
) -> None:
  """Writes one tile; called by all warpgroups of a cluster's blocks.

  Args:
    index: Refs.
    queries: Refs of the `chunks.Queries`.
    results: Refs.
    row: First query of the tile, in the chunk; the same in both blocks of a
      cluster.
    i_s: Index of the tile of keys; different in the two blocks.
  """

  def run(shared):
    wg = lax.axis_index("wg")
    batch, query = queries.place[0], pl.multiple_of(queries.place[1], bT) + row
    at = _Tile(
      index,
      queries,
      results,
      shared,
      wg=wg,
      batch=batch,
      query=query,
      row=row,
      i_s=i_s,
      key=i_s * bS,
    )
    ring_lib.divide_work(wg, at.copy, at.compute)

  pl.run_scoped(run, _Shared.types(), collective_axes="wg")


def no_tile(results: Scores, row: Int[Array, ""], i_s: Int[Array, ""]) -> None:
  """Replaces `tile` where no query sees a key."""
  wg = lax.axis_index("wg")

  @pl.when(wg < 2)
  def _():
    rows = pl.ds(row + wg * tiles.ROWS, tiles.ROWS)
    results.top[i_s, rows] = tiles.by_row(-jnp.inf)
    results.total[i_s, rows] = tiles.by_row(0.0)


@dataclasses.dataclass(frozen=True)
class _Tile:
  """A tile, as the warpgroups of a block compute it."""

  index: Index
  queries: Any
  results: Scores
  shared: _Shared
  wg: Int[Array, ""]
  batch: Int[Array, ""]
  query: Int[Array, ""]  # the tile's first
  row: Int[Array, ""]  # of that query in the chunk
  i_s: Int[Array, ""]
  key: Int[Array, ""]  # the tile's first

  def copy(self):
    """Copies the tile's keys, and its queries head by head."""
    k = self.index.k.at[self.batch, pl.ds(self.key, bS)]
    plgpu.copy_gmem_to_smem(k, self.shared.k, self.shared.k_full)

    def queries_of_head(step, slot):
      head, rows = active_bits.head(step), pl.ds(self.query, bT)
      plgpu.copy_gmem_to_smem(
        self.index.q.at[self.batch, rows, head],
        self.shared.q.at[slot],
        self.shared.ring.full.at[slot],
        collective_axes="cluster",
      )

    self.shared.ring.fill(active_bits.HEADS, queries_of_head)

  def compute(self):
    """Computes scores and bits of this warpgroup's queries, and writes them."""
    first = self.wg * tiles.ROWS  # of the tile's queries
    rows = pl.ds(self.row + first, tiles.ROWS)
    turns = barriers.PingPong(self.wg)
    turns.start()
    plgpu.barrier_wait(self.shared.k_full)
    key_TS = self.key + plgpu.broadcasted_iota(
      jnp.int32, (tiles.ROWS, bS), 1, layout=tiles.MATRIX
    )
    scores_TS = tiles.zeros(bS)
    for word in range(active_bits.WORDS):
      halves = []
      for parity in range(2):
        step = (2 * word + parity) * active_bits.HALF
        scores_TS, half_TS = lax.fori_loop(
          *(step, step + active_bits.HALF),
          lambda i, carry: self.add_head(i, first, turns, *carry),
          (scores_TS, tiles.zeros(bS, jnp.int16)),
        )
        halves.append(half_TS)
      self.results.active[word, rows, pl.ds(self.key, bS)] = jnp.where(
        self.visible(rows, key_TS), active_bits.join(*halves), 0
      )
    scores_TS = jnp.where(self.visible(rows, key_TS), scores_TS, -jnp.inf)
    self.write_scores(rows, scores_TS)

  def add_head(self, step, first, turns, scores_TS, half_TS):
    """Adds a head to the scores, and its bits to a half of the words."""
    head = active_bits.head(step)
    queries = pl.ds(self.query + first, tiles.ROWS)
    half_w = self.index.half_w.at[self.batch, head, queries]
    w_T = tiles.load(half_w, tiles.BY_ROW)
    slot = self.shared.ring.slot(step)
    similarity_TS = pl.run_scoped(
      lambda acc: self.multiply(acc, slot, first, turns),
      plgpu.ACC((tiles.ROWS, bS), jnp.float32),
    )
    self.shared.ring.release(slot)
    w_TS = tiles.over_columns(w_T, bS)
    return active_bits.add_head(similarity_TS, w_TS, scores_TS, half_TS)

  def multiply(self, similarity, slot, first, turns):
    """Similarity of queries and keys for the head in the slot."""
    mine = pl.ds(first, tiles.ROWS)
    self.shared.ring.wait(slot)
    turns.wait()
    for part in range(2):
      half = pl.ds(part * 64, 64)
      plgpu.wgmma(
        similarity,
        self.shared.q.at[slot, mine, half],
        self.shared.k.at[:, half].transpose((1, 0)),
      )
    # The other begins when half is done: tensor cores serve both equally.
    plgpu.wgmma_wait(1)
    turns.signal()
    return similarity[...]

  def visible(self, rows, key_TS):
    """Whether each of the rows' queries sees each key of the tile."""

    def of_rows(ref):
      return tiles.over_columns(tiles.load(ref.at[rows], tiles.BY_ROW), bS)

    seen_TS = key_TS >= of_rows(self.queries.start)
    return seen_TS & (key_TS < of_rows(self.queries.end))

  def write_scores(self, rows, scores_TS):
    """Writes the scores, and of each query their maximum and sum."""
    self.results.scores[rows, pl.ds(self.key, bS)] = scores_TS
    top_T = scores_TS.max(1)
    self.results.top[self.i_s, rows] = top_T
    finite_T = jnp.where(top_T == -jnp.inf, 0.0, top_T)
    weights_TS = jnp.exp(scores_TS - tiles.over_columns(finite_T, bS))
    self.results.total[self.i_s, rows] = weights_TS.sum(1)
