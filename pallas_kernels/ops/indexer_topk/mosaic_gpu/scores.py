"""Index scores of a chunk of queries, on Hopper.

A warpgroup multiplies a tile of 64 keys by 128 columns, all heads of some
queries: a row of its accumulator is a key, so a thread holds a quarter of the
heads of two keys and sums relu(x) w in its registers; the four threads that
share a key then add their sums.

Each of two warpgroups has two such accumulators: while the tensor cores fill
one, it reduces the other, across tiles too. Both read the same keys, each for
its own queries, which stay in shared memory; a third warpgroup prefetches keys.

All visible tiles of (queries, keys) are split evenly over the blocks: each has
one contiguous range of them, ordered by queries, then keys.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels.hopper import fragments
from pallas_kernels.hopper import signals
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper import wgmma
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32

bS: Final = 128  # keys per tile
HEADS: Final = (8, 16, 32, 64)
_SWIZZLE: Final = 128  # bytes of a row that are swizzled together
WIDTHS: Final = (_SWIZZLE, 2 * _SWIZZLE)  # of a head, in bytes
_ROWS: Final = tiles.ROWS  # of an accumulator: keys
_COLUMNS: Final = 128  # of an accumulator: queries x heads
_ACCUMULATORS: Final = 2  # of a warpgroup
_WARPGROUPS: Final = 2  # that multiply
_BLOCKS: Final = 132  # multiprocessors of an H100 or H200
_STAGES: Final = 3  # tiles of keys in shared memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scratch:
  """Shared memory of a block."""

  q: Any  # of each warpgroup
  k: Any  # a ring of tiles
  q_full: Any
  q_free: Any
  k_full: Any
  k_free: Any

  @classmethod
  def types(cls, I: int, dtype: DTypeLike) -> Any:
    return cls(
      q=tiles.shared((_WARPGROUPS, _ACCUMULATORS * _COLUMNS, I), dtype),
      k=tiles.shared((_STAGES, bS, I), dtype),
      q_full=plgpu.Barrier(num_barriers=_WARPGROUPS),
      q_free=plgpu.Barrier(num_barriers=_WARPGROUPS),
      k_full=plgpu.Barrier(num_barriers=_STAGES),
      k_free=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
    )


def scores(
  q: Float[Array, "T M I"],
  k: Float[Array, "S I"],
  w: Float[Array, "T M"],
  start: Int[Array, " T"],
  end: Int[Array, " T"],
  k_scale: Float[Array, " S"] | None = None,
) -> Float[Array, "T paddedS"]:
  """Computes `k_scale[s] sum_j w[t, j] relu(q[t, j] . k[s])` in float32.

  Scores outside [start, end) are undefined. Each score is independent of the
  tiling of queries and keys, and never -0.0.

  Args:
    q: Index queries, bfloat16 or float8_e4m3fn: `HEADS` heads of `WIDTHS`.
    k: Index keys, of the same dtype.
    w: Head weights.
    start: First key that each query sees.
    end: One past the last key.
    k_scale: Scales of the keys, if these are in 8 bits.

  Returns:
    The scores, S padded to a multiple of `bS`.
  """
  T, M, I = q.shape
  S = k.shape[0]
  paddedS = -(-S // bS) * bS
  bT = _WARPGROUPS * _ACCUMULATORS * _COLUMNS // M
  start, end = (
    jnp.pad(jnp.clip(x, 0, S).astype(jnp.int32), (0, -T % bT))
    for x in (start, end)
  )
  k = jnp.pad(k, [(0, paddedS - S), (0, 0)])
  w = jnp.pad(w.astype(jnp.float32), [(0, -T % bT), (0, 0)])
  shares, groups = share_out(start, end, bT)
  scales = () if k_scale is None else (jnp.pad(k_scale, (0, paddedS - S)),)
  return plgpu.kernel(
    functools.partial(_block, heads=M),
    out_type=jax.ShapeDtypeStruct((T, paddedS), jnp.float32),
    grid=(_BLOCKS,),
    grid_names=("block",),
    num_threads=_WARPGROUPS + 1,
    thread_name="warpgroup",
    scratch_types=[_Scratch.types(I, q.dtype)],
  )(q.reshape(-1, I), k, w.reshape(-1), shares.ravel(), groups.ravel(), *scales)


def share_out(
  start: Int[Array, " T"], end: Int[Array, " T"], bT: int, blocks: int = _BLOCKS
) -> tuple[Int[Array, "blocks 4"], Int[Array, "nT 3"]]:
  """Splits the visible tiles of `bT` queries x `bS` keys over the blocks.

  All of them form one sequence, group of queries by group of queries.

  Returns:
    For each block its range of the sequence, first and one past the last, and
    the range of its groups. For each group its range of the sequence, and the
    offset from a position in it to the index of the tile of keys.
  """
  start, end = start.reshape(-1, bT), end.reshape(-1, bT)
  alive = start < end
  first = jnp.min(jnp.where(alive, start, jnp.iinfo(jnp.int32).max), 1) // bS
  last = -(-jnp.max(jnp.where(alive, end, 0), 1) // bS)
  tiles = jnp.maximum(last - first, 0)
  after = jnp.cumsum(tiles)
  before = after - tiles
  groups = jnp.stack([before, after, first - before], 1)

  block, total = jnp.arange(blocks + 1, dtype=jnp.int32), after[-1]
  bound = block * (total // blocks) + jnp.minimum(block, total % blocks)
  begin, stop = bound[:-1], bound[1:]
  # Groups that end before a position: comparing all takes one pass.
  ended = lambda x: jnp.sum(after[None] <= x[:, None], 1, dtype=jnp.int32)
  first_group = ended(begin)
  last_group = jnp.where(begin < stop, ended(stop - 1) + 1, first_group)
  return jnp.stack([begin, stop, first_group, last_group], 1), groups


@dataclasses.dataclass(frozen=True)
class _Share:
  """What a block has of the sequence of tiles, see `share_out`."""

  begin: Int[Array, ""]
  stop: Int[Array, ""]
  first_group: Int[Array, ""]
  last_group: Int[Array, ""]
  groups: Any

  @classmethod
  def of_block(cls, shares, groups) -> "_Share":
    first = 4 * lax.axis_index("block")
    return cls(*(shares[first + i] for i in range(4)), groups)

  def visit(self, body: Callable[[Int[Array, ""]], None]) -> None:
    """Calls `body(group)` for each group of queries."""
    lax.fori_loop(
      self.first_group, self.last_group, lambda group, _: body(group), None
    )

  def stretch(self, group):
    """Range of the group's tiles in this block, and their keys."""
    before, after, shift = (self.groups[3 * group + i] for i in range(3))
    first, last = jnp.maximum(self.begin, before), jnp.minimum(self.stop, after)
    return first, last, lambda i: pl.ds((i + shift) * bS, bS)

  def slot(self, i: Int[Array, ""]) -> Int[Array, ""]:
    """Slot of a tile of keys in the ring."""
    return lax.rem(i - self.begin, _STAGES)


def _block(q, k, w, shares, groups, *refs, heads):
  *k_scale, scores, scratch = refs
  wg = lax.axis_index("warpgroup")
  share = _Share.of_block(shares, groups)

  @pl.when(wg == _WARPGROUPS)
  def _():
    plgpu.set_max_registers(40, action="decrease")
    _copy(q, k, share, scratch)

  @pl.when(wg < _WARPGROUPS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    _compute(w, k_scale, scores, share, scratch, wg, heads)


def _copy(q, k, share, scratch):
  """Copies the queries of each group, and the keys of each tile."""

  def copy_group(group):
    for i in range(_WARPGROUPS):
      # Bound now: `pl.when` calls it at once.
      wait = functools.partial(plgpu.barrier_wait, scratch.q_free.at[i])
      pl.when(group > share.first_group)(wait)
      plgpu.copy_gmem_to_smem(
        q.at[_columns(group, i)], scratch.q.at[i], scratch.q_full.at[i]
      )
    first, last, keys = share.stretch(group)

    def copy_keys(i, _):
      at = share.slot(i)
      free, full = scratch.k_free.at[at], scratch.k_full.at[at]
      pl.when(i - share.begin >= _STAGES)(lambda: plgpu.barrier_wait(free))
      plgpu.copy_gmem_to_smem(k.at[keys(i)], scratch.k.at[at], full)

    lax.fori_loop(first, last, copy_keys, None)

  share.visit(copy_group)


def _compute(w, k_scale, scores, share, scratch, wg, heads):
  """Computes the scores of a warpgroup's queries in each group."""

  def compute_group(group):
    columns = _columns(group, wg)
    w_N = [
      tiles.load(w.at[x], tiles.BY_COLUMN) for x in _parts(columns, _COLUMNS)
    ]
    first, last, keys = share.stretch(group)
    plgpu.barrier_wait(scratch.q_full.at[wg])

    def compute_tile(i, _):
      at = share.slot(i)
      rows = _parts(keys(i), _ROWS)
      scales = [
        [tiles.load(x.at[y], tiles.BY_ROW) for x in k_scale] for y in rows
      ]
      plgpu.barrier_wait(scratch.k_full.at[at])

      def reduce(x_SN, row, column):
        query = lax.div(columns.start + column * _COLUMNS, heads)
        args = scores, query, rows[row].start, heads
        _reduce(x_SN, w_N[column], scales[row], *args)

      free = lambda: plgpu.barrier_arrive(scratch.k_free.at[at])
      _multiply_tile(scratch.k.at[at], scratch.q.at[wg], reduce, free)

    lax.fori_loop(first, last, compute_tile, None)
    plgpu.barrier_arrive(scratch.q_free.at[wg])

  share.visit(compute_group)


def _columns(group, wg):
  """Slice of a warpgroup's queries in all queries x heads."""
  n = _ACCUMULATORS * _COLUMNS
  return pl.ds((group * _WARPGROUPS + wg) * n, n)


def _parts(whole: pl.Slice, size: int) -> list[pl.Slice]:
  return [pl.ds(whole.start + i, size) for i in range(0, whole.size, size)]


def _multiply_tile(k_s, q_s, reduce, free):
  """Calls `reduce(k qᵀ, row, column)` for each accumulator of a tile.

  While it reduces one, the next is computed; `free` is called when the last has
  been.
  """
  places = list(np.ndindex(bS // _ROWS, _ACCUMULATORS))
  x_SN = None
  for i, (row, column) in enumerate(places):
    k_part = k_s.at[pl.ds(row * _ROWS, _ROWS)]
    q_part = q_s.at[pl.ds(column * _COLUMNS, _COLUMNS)]
    ready, x_SN = _multiply(k_part, q_part, x_SN)
    if i:
      reduce(ready, *places[i - 1])
  x_SN = _wait(x_SN)
  free()
  reduce(x_SN, *places[-1])


def _multiply(k_s, q_s, before):
  """Starts k qᵀ; waits for the product `before` it, if there is one.

  Returns:
    The finished product, and the new one, see `wgmma.multiply_next`.
  """
  matrix = plgpu.RefType(tiles.transforms(k_s.dtype))
  before = [] if before is None else [before]
  row_bytes = k_s.shape[1] * k_s.dtype.itemsize
  is_8_bit = k_s.dtype.itemsize == 1

  def operand(ref):
    return wgmma.Operand(
      wgmma.start_of(Place.of(ref)),
      offset=0,
      leading=0,
      stride=8 * row_bytes,
      swizzle=_SWIZZLE,
      step=32,
    )

  @threads.code(
    *(matrix, matrix, [tiles.MATRIX] * len(before)),
    returns=[fragments.matrix(_COLUMNS, jnp.float32)] * (len(before) + 1),
  )
  def emit(k_s, q_s, before):
    products = wgmma.multiply_next(
      *(operand(k_s), operand(q_s)),
      [x for product in before for x in fragments.floats(product)],
      columns=_COLUMNS,
      tiles=row_bytes // _SWIZZLE,
      is_8_bit=is_8_bit,
    )
    return [fragments.of_floats(x) for x in products if x]

  *ready, started = emit(k_s, q_s, before)
  return ready[0] if ready else None, started


def _wait(product):
  """Waits for the last product."""

  @threads.code(tiles.MATRIX, returns=fragments.matrix(_COLUMNS, jnp.float32))
  def emit(product):
    return fragments.of_floats(wgmma.wait(0, fragments.floats(product)))

  return emit(product)


def _reduce(x_SN, w_N, scale_S, scores, query, key, heads):
  """Writes the scores of an accumulator's queries, from `query` on."""

  @threads.code(
    *(tiles.MATRIX, tiles.BY_COLUMN, [tiles.BY_ROW] * len(scale_S)),
    *(threads.REF, threads.NUMBER, threads.NUMBER),
  )
  def emit(x, w, scale, out, query, key):
    x, w, *scale = map(fragments.floats, (x, w, *scale))
    write(x, w, scale, Place.of(out), query, key, heads, scores.shape)

  emit(x_SN, w_N, scale_S, scores, query, key)


def write(
  x: Sequence[F32],
  w: Sequence[F32],
  scale: Sequence[Sequence[F32]],
  scores: Place,
  query: U32,
  key: U32,
  heads: int,
  shape: tuple[int, int],
) -> None:
  """Writes the scores of one product, as one of a warpgroup's threads.

  Args:
    x: Its numbers of keys x (queries x heads), see `fragments`.
    w: Weights of its columns.
    scale: Scales of its two keys, if keys have scales.
    scores: Result, float32.
    query: First query of the product.
    key: First key.
    heads: Heads of a query.
    shape: Queries and keys of the result; further queries are not written.
  """
  thread = threads.thread()
  # Of two queries and two keys, each of the four lanes keeps one score.
  query_bit, key_bit = thread.bits(0, 1), thread.bits(1, 1)
  query = query + query_bit
  key = key + thread.bits(5, 2) * 16 + key_bit * 8 + thread.bits(2, 3)
  is_odd, is_low = query_bit.differs(0), key_bit.differs(0)
  for i in range(0, _COLUMNS // heads, 2):
    keys = [
      _fold([_weighted(x, w, low, i + j, heads) for j in (0, 1)], is_odd, 1)
      for low in (0, 1)
    ]
    total = _fold(keys, is_low, 2)
    for of_upper, of_lower in scale:
      total = total * is_low.where_float(of_lower, of_upper)
    place = scores.step(query + i, 4 * shape[1]).step(key, 4)
    place.store([total], where=query + i < shape[0])
  # Free of cost; without it ptxas delays sums and runs out of registers.
  signals.meet_warp()


def _weighted(
  x: Sequence[F32], w: Sequence[F32], low: int, query: int, heads: int
) -> F32:
  """Sum of relu(x) w over this thread's quarter of a query's heads."""
  total, quarter = F32(0.0), heads // 4  # from 0.0, so that it is never -0.0
  for i in range(query * quarter, (query + 1) * quarter):
    # x: pair of columns, key, column of the pair.
    active = x[i // 2 * 4 + low * 2 + i % 2].max(0.0)
    total = w[i].multiply_add(active, total)
  return total


def _fold(pair: Sequence[F32], takes_second: Bool, distance: int) -> F32:
  """Adds two lanes' values: of the first, or in one lane of the second."""
  first, second = pair
  kept = takes_second.where_float(second, first)
  sent = takes_second.where_float(first, second)
  return kept + threads.exchange(sent, distance)
