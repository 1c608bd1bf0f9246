"""Exact selection of the highest scores of each row, on Hopper.

One thread block takes one row, or where rows are few and long, a cluster of
blocks does:

  1. It guesses, from a sample of the row, a score that somewhat more than K
     scores reach; each block of a cluster does.
  2. It reads the row once and lists the scores that reach the guess, in order;
     each block of a cluster reads a part, and the first gets all their lists.
  3. It finds the K-th highest of the list by radix: counts the scores by their
     leading digit, finds the digit that holds the K-th, and continues with the
     next digit among the scores that share it.
  4. It writes the scores above the K-th, and the first of those equal to it, in
     the order of the list: the indices ascend, ties go to the lowest.

If the guess was bad, fewer than K scores reach it, or more than the list holds;
all were counted, so the block detects it. Steps 3 and 4 then run over the row
itself, which is slower and needs no list. So the result is always exact.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import itertools
from typing import Any, Final

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import cluster
from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Memory
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.indexer_topk.mosaic_gpu import sources

_THREADS: Final = sources.THREADS
_WARPS: Final = _THREADS // threads.WARP
_VECTOR: Final = sources.VECTOR
# Loads of a thread at once where it does little more than wait for them.
_MOST_LOADS: Final = 4
_SAMPLE: Final = 4096
_SAMPLE_LOADS: Final = _SAMPLE // (_THREADS * _VECTOR)
_DIGIT_BITS: Final = 11
_BINS: Final = 1 << _DIGIT_BITS
_BINS_PER_THREAD: Final = _BINS // _THREADS
_LARGEST_LIST: Final = 16384
LARGEST_K: Final = _LARGEST_LIST // 2
# Places in `Scratch.words`.
_SUMS, _FOUND, _GATE, _LISTED, _TOTAL, _WORDS = 0, 96, 99, 100, 101, 102
_PART: Final = 16384  # scores of a row, at least, for each block that shares it
_TIES: Final = 2  # a slot of sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scratch:
  """Shared memory of a block, in words."""

  listed: Any  # positions, and from the middle on their scores
  bins: Any
  words: Any  # through which the warps communicate

  @classmethod
  def sizes(cls, top_k: int) -> "Scratch":
    # One load may begin on the last word of a part of the list.
    listed = 2 * (_list_size(top_k) + _VECTOR)
    return cls(listed, bins=_BINS, words=_WORDS)


def select(
  scores: Float[Array, "T S_padded"],
  start: Int[Array, " T"],
  end: Int[Array, " T"],
  top_k: int,
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
  """Selects the `top_k` highest of `scores[t, start[t]:end[t]]` of each row t.

  Ties go to the lowest index. The result depends on nothing else.

  Args:
    scores: fp32, S a multiple of 4. Scores outside [start, end) are ignored.
    start: First visible score of each row.
    end: One past the last; clipped to the row. `start >= end` sees none.
    top_k: K, from 1 to `LARGEST_K`.

  Returns:
    Indices, int32, ascending, padded with -1 at the end where fewer than K
    are visible; and their scores, -inf there.
  """
  T, S = scores.shape
  start = jnp.clip(start, 0, S).astype(jnp.int32)
  end = jnp.clip(end, start, S).astype(jnp.int32)
  words = lambda size: plgpu.SMEM((size,), jnp.int32)
  parts = num_parts(T, S)
  kernel = plgpu.kernel(
    functools.partial(_kernel, top_k=top_k, parts=parts),
    out_type=(
      jax.ShapeDtypeStruct((T, top_k), jnp.int32),
      jax.ShapeDtypeStruct((T, top_k), jnp.float32),
    ),
    grid=(T,),
    grid_names=("row",),
    cluster=(parts,),
    cluster_names=("part",),
    num_threads=_THREADS // threads.WARPGROUP,
    thread_name="warpgroup",
    scratch_types=[jax.tree.map(words, Scratch.sizes(top_k))],
    kernel_name="indexer_select",
  )
  return kernel(scores, start, end)


def num_parts(T: int, S: int) -> int:
  """Blocks that share a row: as many as run at once for all rows, if each has
  scores enough."""
  most = min(max(S // _PART, 1), len(cluster.AT_ONCE))
  fitting = [n for n in range(1, most + 1) if T <= cluster.AT_ONCE[n - 1]]
  return max(fitting, default=1)


def _list_size(top_k: int) -> int:
  return min(max(4 * top_k, _SAMPLE), _LARGEST_LIST)


def _kernel(*refs, top_k, parts):
  *arrays, scratch = refs
  ref = threads.REF

  @threads.code(threads.NUMBER, [ref] * len(arrays), Scratch(ref, ref, ref))
  def emit(row, arrays, scratch):
    scores, start, end, indices, chosen = arrays
    again = lambda ref: lambda: Memory(ref, row.opaque())
    Row(
      *(again(ref) for ref in (scores, indices, chosen)),
      *(Memory(ref).load(row) for ref in (start, end)),
      scratch=jax.tree.map(Memory, scratch),
      top_k=top_k,
      parts=parts,
    ).emit()

  emit(lax.axis_index("row"), arrays, scratch)


class Row:
  """Emits a block's part of the selection of one row."""

  def __init__(
    self, scores, indices, chosen, start, end, *, scratch, top_k, parts=1
  ):
    # Each use recomputes the address of its row: registers are scarce.
    self._scores, self._indices, self._chosen = scores, indices, chosen
    self._start, self._end = start, end
    self._list_size = _list_size(top_k)
    self._list_stride = self._list_size + _VECTOR
    self._listed, self._bins = scratch.listed, scratch.bins
    self._words = scratch.words
    self._top_k, self._parts = top_k, parts
    self._part = cluster.rank() if parts > 1 else U32(0)
    self._thread = threads.thread()
    self._warp, self._lane = threads.warp(), threads.lane()

  def emit(self) -> None:
    meet = cluster.meet if self._parts > 1 else threads.barrier
    self.list_part()
    meet()
    if self._parts > 1:
      self.send()
      meet()
    self.finish()

  @property
  def _seen(self) -> U32:
    return self._end - self._start

  def list_part(self) -> None:
    """Lists the scores of this part that reach the guess."""

    @threads.when(self._seen > self._top_k)
    def _():
      self._clear_bins()
      threads.barrier()
      gate = self._gate(self._seen)
      listed = self._list(gate)
      first = self._thread.equals(0)
      for word, x in ((_GATE, gate), (_LISTED, listed), (_TOTAL, listed)):
        self._words.store(word, x, where=first)

  def send(self) -> None:
    """Sends the list to the first block, behind those of the parts before."""

    @threads.when(self._seen > self._top_k)
    def _():
      before = total = U32(0)
      for part in range(self._parts):
        listed = self._words.in_block(U32(part)).load(_LISTED)
        before = before + (self._part > part).where(listed, 0)
        total = total + listed
      first = U32(0)
      is_first = self._part.equals(0)
      is_one = self._thread.equals(0)
      self._words.store(_TOTAL, total, where=is_first & is_one)

      @threads.when(self._fits(total) & ~is_first)
      def _():
        listed = self._words.load(_LISTED)
        target = self._listed.in_block(first)

        def body(i):
          place = i * _THREADS + self._thread
          inside = place < listed
          mine = inside.where(place, 0)
          for at in (0, self._list_stride):
            word = self._listed.load(mine + at)
            target.store(before + place + at, word, where=inside)
          return ()

        threads.loop((listed + _THREADS - 1) // _THREADS, body, ())

  def _fits(self, total: U32) -> Bool:
    """Whether the list has the K highest, and all of it has room."""
    return (total >= self._top_k) & (total <= self._list_size)

  def finish(self) -> None:
    """Writes the result, in the first block."""
    is_short = self._seen <= self._top_k
    is_first = self._part.equals(0)
    threads.when(is_first & is_short)(lambda: self._copy(self._seen))

    @threads.when(is_first & ~is_short)
    def _():
      total, gate = self._words.load(_TOTAL), self._words.load(_GATE)
      fits = self._fits(total)

      @threads.when(fits)
      def _():
        stride = self._list_stride
        scores = lambda at: self._listed.load4s([i + stride for i in at])
        self._choose(
          sources.Source(scores, 0, total), self._listed.load4s, gate
        )

      @threads.when(~fits)
      def _():
        start, end = self._start.opaque(), self._end.opaque()
        self._choose(self._row(start, end, 1), _neighbours, U32(0))

  def _row(self, start: U32, end: U32, loads: int) -> sources.Source:
    return sources.Source(self._scores().load4s, start, end, loads)

  def _copy(self, seen: U32) -> None:
    """Selects all that the row sees."""
    scores, indices, chosen = self._scores(), self._indices(), self._chosen()

    def body(i):
      k = i * _THREADS + self._thread
      sees = k < seen
      score = scores.load(sees.where(self._start + k, 0))
      score = sees.where(score, threads.MINUS_INFINITY)
      index = sees.where(self._start + k, -1)
      indices.store(k, index, where=k < self._top_k)
      chosen.store(k, score, where=k < self._top_k)
      return ()

    threads.loop(U32(-(-self._top_k // _THREADS)), body, ())

  def _gate(self, seen: U32) -> U32:
    """Guesses the key that somewhat more than K scores of the row reach."""
    scores, first = self._scores(), self._start & -_VECTOR

    def load(positions):  # neighbours, evenly spread over the row
      vectors = sources.divide(seen, _VECTOR)
      spread = [sources.divide(x * vectors, _SAMPLE) for x in positions]
      return scores.load4s([first + x * _VECTOR for x in spread])

    def guess(*_):
      sample = sources.Held(load, 0, _SAMPLE, _SAMPLE_LOADS)
      # The K-th of the row is about the m-th of the sample. It is before the
      # (m + 6 sqrt(m) + 8)-th but for one row in a billion, even if there are
      # but half as many independent scores; and 6 sqrt(m) <= 3/16 m + 48.
      rank = U32(_SAMPLE * self._top_k * 19 // 16) // seen + 57
      floor, ties = self._kth_highest(
        sample, rank, U32(0), slack=sources.divide(rank, 4)
      )
      return [floor + ties.equals(0).number()]

    # Short rows are listed as they are.
    everything = U32(threads.MINUS_INFINITY).float_order()
    [gate] = threads.loop(
      (seen > self._list_size).number(), guess, [everything]
    )
    return gate

  def _list(self, gate: U32) -> U32:
    """Lists the scores that reach the gate; returns their number."""
    lowest = gate.float_of_order()

    def body(i, tile, listed):
      reach = tile.flags(lambda score: score.float_at_least(lowest))
      ranks, count = self._ranks(reach, tile, slot=i & 1)
      for j, rank in enumerate(ranks):
        place = listed + rank
        inside = (place < self._list_size).where(reach, 0)
        cursor = self._listed.cursor(place)
        for e in range(_VECTOR):
          entry = tile.positions[j] + e, tile.scores[j][e]
          cursor = self._listed.append(
            cursor, entry, inside, j * _VECTOR + e, stride=self._list_stride
          )
      return [listed + count]

    [listed] = self._row(*self._range(), _MOST_LOADS).visit(body, [U32(0)])
    threads.barrier()
    return listed

  def _range(self) -> tuple[U32, U32]:
    """The scores of this part, which begins with a whole vector."""
    start, end = self._start.opaque(), self._end.opaque()
    if self._parts == 1:
      return start, end
    base = start & -_VECTOR
    share = (end - base + (self._parts - 1)) // self._parts
    share = (share + (_VECTOR - 1)) & -_VECTOR
    low, stop = base + self._part * share, base + (self._part + 1) * share
    return low.max(start).min(end), stop.min(end)

  def _choose(
    self,
    source: sources.Source,
    indices_at: Callable[[Sequence[U32]], Sequence[Sequence[U32]]],
    lowest: U32,
  ) -> None:
    """Writes the K highest of a source of at least K.

    Args:
      source: No key in it is below `lowest`.
      indices_at: The indices of loads of elements, by their first positions.
      lowest: A key.
    """
    floor, ties = self._kth_highest(source, U32(self._top_k), lowest)
    indices, chosen = self._indices(), self._chosen()

    def body(i, tile, before, equal_before):
      def add_ties(_, choose, equal_before):
        equal = tile.flags(lambda score: score.float_order().equals(floor))
        ranks, count = self._ranks(equal, tile, slot=U32(_TIES))
        for j, rank in enumerate(ranks):
          rank = equal_before + rank
          for e in range(_VECTOR):
            is_equal = sources.flag(equal, j, e)
            choose = choose.with_bit(j * _VECTOR + e, is_equal & (rank < ties))
            rank = rank + is_equal.number()
        return [choose, equal_before + count]

      choose, equal_before = threads.loop(
        (ties > 0).number(),
        add_ties,
        [tile.flags(lambda score: score.float_order() > floor), equal_before],
      )
      entries = zip(indices_at(tile.positions), tile.scores)
      ranks, count = self._ranks(choose, tile, slot=i & 1)
      for j, (rank, load) in enumerate(zip(ranks, entries)):
        place = before + rank
        for e, (index, score) in enumerate(zip(*load)):
          is_chosen = sources.flag(choose, j, e)
          indices.store(place, index, where=is_chosen)
          chosen.store(place, score, where=is_chosen)
          place = is_chosen.where(place + 1, place)
      return [before + count, equal_before]

    source.visit(body, [U32(0), U32(0)])

  def _kth_highest(
    self, source: sources.Source, k: U32, lowest: U32, slack: U32 | int = 0
  ) -> tuple[U32, U32]:
    """Returns (floor, ties): the k highest keys of the source are those above
    `floor`, and `ties` of those equal to it.

    No key is below `lowest`. With some slack, there may be so many keys more
    above `floor`.
    """
    span = U32(-1) - lowest
    shift = (span < _BINS).where(0, (32 - _DIGIT_BITS) - span.leading_zeros())

    # The k-th key is among base ... base + last, the rank-th highest there.
    def digit(base, last, shift, rank, _):
      def count(_, tile):
        for score, valid in tile.elements():
          offset = score.float_order() - base
          self._bins.add(offset >> shift, 1, where=valid & (offset <= last))
        return ()

      source.visit(count, ())
      threads.barrier()
      bin_, rank, count = self._find_bin(rank)
      base = base + (bin_ << shift)
      last = (U32(1) << shift) - 1
      whole = (count - rank <= slack) & (base > 0)
      done = whole | shift.equals(0)
      shift = (shift < _DIGIT_BITS).where(0, shift - _DIGIT_BITS)
      return (
        whole.where(base - 1, base),
        last,
        shift,
        whole.where(0, rank),
        done.number(),
      )

    floor, _, _, ties, _ = threads.loop_while(
      lambda *carried: carried[-1].equals(0),
      digit,
      [lowest, span, shift, k, U32(0)],
    )
    return floor, ties

  def _first_bin(self) -> U32:
    """First bin of this thread; threads own bins from the highest down."""
    return (_THREADS - 1 - self._thread) * _BINS_PER_THREAD

  def _find_bin(self, rank: U32) -> tuple[U32, U32, U32]:
    """Finds the bin of the rank-th highest, its rank there, the bin's count.

    Clears the bins.
    """
    vectors = range(0, _BINS_PER_THREAD, _VECTOR)
    vectors = self._bins.load4s([self._first_bin() + i for i in vectors])
    counts = list(itertools.chain(*vectors))
    self._clear_bins()
    mine = functools.reduce(U32.__add__, counts)
    through = threads.warp_sums(mine)
    before, _ = self._across_warps(threads.last_lane(through), U32(0))
    before = before + through - mine
    for i in reversed(range(_BINS_PER_THREAD)):
      found = (before < rank) & (rank <= before + counts[i])
      for word, x in enumerate(
        (self._first_bin() + i, rank - before, counts[i])
      ):
        self._words.store(_FOUND + word, x, where=found)
      before = before + counts[i]
    threads.barrier()
    return tuple(self._words.load(_FOUND + i) for i in range(3))

  def _clear_bins(self) -> None:
    for i in range(_BINS_PER_THREAD):
      self._bins.store(self._first_bin() + i, 0)

  def _ranks(
    self, flags: U32, tile: sources.Tile, slot: U32
  ) -> tuple[Sequence[U32], U32]:
    """Counts the flags set before each load of this thread, and in all.

    The slot is one of `_across_warps`.
    """
    loads = range(len(tile.positions))
    # A byte for each load: it has 128 elements.
    counts = [
      ((flags >> j * _VECTOR) & ((1 << _VECTOR) - 1)).bit_count() << 8 * j
      for j in loads
    ]
    mine = functools.reduce(U32.__or__, counts)
    through = threads.warp_sums(mine)
    in_warp, before = threads.last_lane(through), through - mine
    total, ranks = U32(0), []
    for j in loads:
      ranks.append(total + ((before >> 8 * j) & 255))
      total = total + ((in_warp >> 8 * j) & 255)
    before, in_tile = self._across_warps(total, slot)
    return [before + rank for rank in ranks], in_tile

  def _across_warps(self, x: U32, slot: U32) -> tuple[U32, U32]:
    """Sums x over the preceding warps, and over all.

    A slot may be overwritten only after another barrier: calls without one
    between them alternate slots.
    """
    slot = _SUMS + slot * threads.WARP
    self._words.store(slot + self._warp, x, where=self._lane.equals(0))
    threads.barrier()
    sums = self._words.load(slot + self._lane.min(_WARPS - 1))
    before, every = self._lane < self._warp, self._lane < _WARPS
    return (
      threads.warp_sum(before.where(sums, 0)),
      threads.warp_sum(every.where(sums, 0)),
    )


def _neighbours(starts: Sequence[U32]) -> list[list[U32]]:
  return [[start + e for e in range(_VECTOR)] for start in starts]
