"""Index scores of some queries of each row of a batch, on Hopper.

A warpgroup multiplies a tile of 64 keys by 128 columns, all heads of some
queries: a row of its accumulator is a key, so a thread holds a quarter of the
heads of two keys and sums relu(x) w in its registers; the four threads that
share a key then add their sums. While the tensor cores fill one accumulator,
the warpgroup reduces another. A third warpgroup prefetches keys.

The blocks, one for each multiprocessor, share all visible tiles of (queries,
keys) evenly, see `plan`. So the keys of a single query are read by all of them.
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
from pallas_kernels.ops.indexer_topk.mosaic_gpu import plan as plan_lib
from pallas_kernels.ops.indexer_topk.mosaic_gpu.plan import COLUMNS
from pallas_kernels.ops.indexer_topk.mosaic_gpu.plan import HALVES
from pallas_kernels.ops.indexer_topk.mosaic_gpu.plan import ROWS
from pallas_kernels.ops.indexer_topk.mosaic_gpu.plan import WARPGROUPS

_SWIZZLE: Final = 128  # bytes of a row that are swizzled together
WIDTHS: Final = (_SWIZZLE, 2 * _SWIZZLE)  # of a head, in bytes
_MOST_STAGES: Final = 8  # tiles of keys in shared memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Operands:
  """Arguments of `scores` in device memory; keys as rows of the whole pool."""

  q: Any
  k: Any
  k_scale: Any  # or None
  w: Any
  pages: Any
  shares: Any
  groups: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scratch:
  """Shared memory of a block."""

  q: Any  # of each warpgroup, or of both
  k: Any  # a ring of tiles, in halves
  k_scale: Any  # or None
  q_full: Any
  q_free: Any
  k_full: Any
  k_free: Any

  @classmethod
  def types(
    cls, plan: plan_lib.Plan, I: int, dtype: DTypeLike, is_scaled: bool
  ) -> Any:
    q = (plan.readers, plan.accumulators * COLUMNS, I)
    size = jnp.dtype(dtype).itemsize
    room = tiles.SHARED_MEMORY - q[0] * q[1] * I * size
    tile = plan_lib.bS * (I * size + 4 * is_scaled)
    stages = min(room // tile, _MOST_STAGES)
    scales = plgpu.SMEM((HALVES * stages, ROWS), jnp.float32)
    return cls(
      q=tiles.shared(q, dtype),
      k=tiles.shared((HALVES * stages, ROWS, I), dtype),
      k_scale=scales if is_scaled else None,
      q_full=plgpu.Barrier(num_barriers=plan.readers),
      q_free=plgpu.Barrier(
        num_arrivals=WARPGROUPS // plan.readers, num_barriers=plan.readers
      ),
      k_full=plgpu.Barrier(
        num_arrivals=HALVES * (1 + is_scaled), num_barriers=stages
      ),
      k_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )

  @property
  def stages(self) -> int:
    return self.k.shape[0] // HALVES


def scores(
  q: Float[Array, "B T M I"],
  k: Float[Array, "A page I"],
  w: Float[Array, "B T M"],
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  pages: Int[Array, "B P"],
  k_scale: Float[Array, "A page"] | None = None,
) -> Float[Array, "B T paddedS"]:
  """Computes `k_scale[s] sum_j w[t, j] relu(q[t, j] . k[s])` in float32.

  Scores outside [start, end) are undefined. Each score is independent of the
  tiling of queries and keys, of the rest of the batch, and never -0.0.

  Args:
    q: Index queries, bfloat16 or float8_e4m3fn: `plan.HEADS` heads of `WIDTHS`.
    k: Pages of index keys, of the same dtype; `page` is a multiple of
      `plan.ROWS`.
    w: Head weights.
    start: First key that each query sees.
    end: One past the last key.
    pages: Pages of each row's keys, in order; S = P page.
    k_scale: Scales of the keys, if these are in 8 bits.

  Returns:
    The scores, S padded to a multiple of `plan.bS`.
  """
  (B, T, M, I), page, P = q.shape, k.shape[1], pages.shape[1]
  S = P * page
  plan = plan_lib.Plan.of(T, M)
  missing = -T % plan.queries
  start, end = (
    jnp.pad(jnp.clip(x, 0, S).astype(jnp.int32), [(0, 0), (0, missing)])
    for x in (start, end)
  )
  q = jnp.pad(q, [(0, 0), (0, missing), (0, 0), (0, 0)])
  w = jnp.pad(w.astype(jnp.float32), [(0, 0), (0, missing), (0, 0)])
  group_shape = -1, plan.queries
  shares, groups = plan_lib.share_out(
    start.reshape(group_shape), end.reshape(group_shape)
  )
  kernel = plgpu.kernel(
    functools.partial(_block, plan=plan, page=page, P=P, heads=M),
    out_type=jax.ShapeDtypeStruct(
      (B, T, -(-S // plan_lib.bS) * plan_lib.bS), jnp.float32
    ),
    grid=(plan_lib.BLOCKS,),
    grid_names=("block",),
    num_threads=WARPGROUPS + 1,
    thread_name="warpgroup",
    scratch_types=[_Scratch.types(plan, I, q.dtype, k_scale is not None)],
    kernel_name="indexer_scores",
  )
  return kernel(
    _Operands(
      q=q.reshape(-1, I),
      k=k.reshape(-1, I),
      k_scale=None if k_scale is None else k_scale.reshape(-1),
      w=w.reshape(-1),
      pages=pages.astype(jnp.int32).reshape(-1),
      shares=shares.reshape(-1),
      groups=groups.reshape(-1),
    )
  )


def _block(operands, scores, scratch, *, plan, page, P, heads):
  wg = lax.axis_index("warpgroup")
  share = plan_lib.Share.of_block(operands.shares, operands.groups)
  # Groups of queries of a row of the batch.
  per_row = -(-scores.shape[1] // plan.queries)

  @pl.when(wg == WARPGROUPS)
  def _():
    plgpu.set_max_registers(40, action="decrease")
    table = _Table(operands.pages, P, page, operands.k.shape[0] // page)
    _copy(operands, table, share, scratch, plan, per_row, heads)

  @pl.when(wg < WARPGROUPS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    _compute(operands.w, scores, share, scratch, wg, plan, per_row, heads)


@dataclasses.dataclass(frozen=True)
class _Table:
  """Where keys lie in the pool."""

  pages: Any
  P: int
  page: int
  count: int
  """Pages of the pool."""

  def find(self, b: Int[Array, ""], block: Int[Array, ""]) -> Int[Array, ""]:
    """Where a block of `ROWS` keys of batch row b is, in such blocks of the
    pool; beyond the row's pages it is any."""
    size = self.page // ROWS
    place = jnp.clip(lax.div(block, size), 0, self.P - 1)
    # A page without a visible key may have any number.
    page = jnp.clip(self.pages[b * self.P + place], 0, self.count - 1)
    return page * size + lax.rem(block, size)


def _copy(operands, table, share, scratch, plan, per_row, heads):
  """Copies the queries of each group, and the keys of each tile."""

  def copy_group(group):
    for i in range(plan.readers):
      # Bound now: `pl.when` calls it at once.
      wait = functools.partial(plgpu.barrier_wait, scratch.q_free.at[i])
      pl.when(group > share.first_group)(wait)
      columns = plan.columns(group, i, heads)
      plgpu.copy_gmem_to_smem(
        operands.q.at[columns], scratch.q.at[i], scratch.q_full.at[i]
      )
    first, last, key = share.stretch(group)
    b = lax.div(group, per_row)

    def find(i):
      """Both halves of a tile in the pool."""
      block = lax.div(key(i), ROWS)
      return [table.find(b, block + half) for half in range(HALVES)]

    def copy_keys(i, here):
      # The next tile's, so that the wait for them is not in its way.
      following = find(jnp.minimum(i + 1, last - 1))
      at = share.slot(i, scratch.stages)
      free, full = scratch.k_free.at[at], scratch.k_full.at[at]
      pl.when(i - share.begin >= scratch.stages)(
        lambda: plgpu.barrier_wait(free)
      )
      for half, block in enumerate(here):
        source = pl.ds(block * ROWS, ROWS)  # seen to be a multiple
        plgpu.copy_gmem_to_smem(
          operands.k.at[source], scratch.k.at[HALVES * at + half], full
        )
        if scratch.k_scale is not None:
          plgpu.copy_gmem_to_smem(
            operands.k_scale.at[source],
            scratch.k_scale.at[HALVES * at + half],
            full,
          )
      return following

    lax.fori_loop(first, last, copy_keys, find(first))

  share.visit(copy_group)


def _compute(w, scores, share, scratch, wg, plan, per_row, heads):
  """Computes the scores of a warpgroup's queries, or keys, in each group."""
  reader = wg if plan.readers > 1 else 0

  def compute_group(group):
    columns = plan.columns(group, reader, heads)
    w_N = [
      tiles.load(w.at[pl.ds(columns.start + i, COLUMNS)], tiles.BY_COLUMN)
      for i in range(0, columns.size, COLUMNS)
    ]
    first, last, key = share.stretch(group)
    b, T, each = lax.div(group, per_row), scores.shape[1], COLUMNS // heads
    # The first query among those of all rows, and where its row's end.
    missing = per_row * plan.queries - T  # before it, of each row
    query, stop = lax.div(columns.start, heads) - b * missing, (b + 1) * T
    plgpu.barrier_wait(scratch.q_full.at[reader])

    def compute_tile(i, _):
      at = share.slot(i, scratch.stages)
      plgpu.barrier_wait(scratch.k_full.at[at])
      halves = plan.halves(wg)
      scales = [_load_scale(scratch.k_scale, at, half) for half in halves]

      def reduce(x_SN, which, column):
        place = query + column * each, stop, key(i) + ROWS * halves[which]
        args = scales[which], scores, *place, heads
        _reduce(x_SN, w_N[column], *args)

      k_s = [scratch.k.at[HALVES * at + half] for half in halves]
      free = lambda: plgpu.barrier_arrive(scratch.k_free.at[at])
      _multiply_tile(k_s, scratch.q.at[reader], reduce, free)

    lax.fori_loop(first, last, compute_tile, None)
    plgpu.barrier_arrive(scratch.q_free.at[reader])

  share.visit(compute_group)


def _load_scale(k_scale, at, half):
  """Scales of half a tile's keys; none if they have none."""
  if k_scale is None:
    return []
  return [tiles.load(k_scale.at[HALVES * at + half], tiles.BY_ROW)]


def _multiply_tile(k_s, q_s, reduce, free):
  """Calls `reduce(k qᵀ, which, column)` for each of some halves of a tile's
  keys, and each accumulator.

  While it reduces one, the next is computed; `free` is called when the last has
  been.
  """
  places = list(np.ndindex(len(k_s), q_s.shape[0] // COLUMNS))
  x_SN = None
  for i, (which, column) in enumerate(places):
    q_part = q_s.at[pl.ds(column * COLUMNS, COLUMNS)]
    ready, x_SN = _multiply(k_s[which], q_part, x_SN)
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
    returns=[fragments.matrix(COLUMNS, jnp.float32)] * (len(before) + 1),
  )
  def emit(k_s, q_s, before):
    products = wgmma.multiply_next(
      *(operand(k_s), operand(q_s)),
      [x for product in before for x in fragments.floats(product)],
      columns=COLUMNS,
      tiles=row_bytes // _SWIZZLE,
      is_8_bit=is_8_bit,
    )
    return [fragments.of_floats(x) for x in products if x]

  *ready, started = emit(k_s, q_s, before)
  return ready[0] if ready else None, started


def _wait(product):
  """Waits for the last product."""

  @threads.code(tiles.MATRIX, returns=fragments.matrix(COLUMNS, jnp.float32))
  def emit(product):
    return fragments.of_floats(wgmma.wait(0, fragments.floats(product)))

  return emit(product)


def _reduce(x_SN, w_N, scale_S, scores, query, stop, key, heads):
  """Writes the scores of an accumulator's queries, [query, stop) of all."""

  @threads.code(
    *(tiles.MATRIX, tiles.BY_COLUMN, [tiles.BY_ROW] * len(scale_S)),
    *(threads.REF, *[threads.NUMBER] * 3),
  )
  def emit(x, w, scale, out, query, stop, key):
    x, w, *scale = map(fragments.floats, (x, w, *scale))
    size = scores.shape[-1]
    write(x, w, scale, Place.of(out), query, stop, key, heads, size)

  emit(x_SN, w_N, scale_S, scores, query, stop, key)


def write(
  x: Sequence[F32],
  w: Sequence[F32],
  scale: Sequence[Sequence[F32]],
  scores: Place,
  query: U32,
  stop: U32,
  key: U32,
  heads: int,
  size: int,
) -> None:
  """Writes the scores of one product, as one of a warpgroup's threads.

  Args:
    x: Its numbers of keys x (queries x heads), see `fragments`.
    w: Weights of its columns.
    scale: Scales of its two keys, if keys have scales.
    scores: Result, float32.
    query: First query of the product, and row of the result.
    stop: From here on queries are not written.
    key: First key.
    heads: Heads of a query.
    size: Keys of a row of the result.
  """
  thread = threads.thread()
  # Of two queries and two keys, each of the four lanes keeps one score.
  query_bit, key_bit = thread.bits(0, 1), thread.bits(1, 1)
  query = query + query_bit
  key = key + thread.bits(5, 2) * 16 + key_bit * 8 + thread.bits(2, 3)
  is_odd, is_low = query_bit.differs(0), key_bit.differs(0)
  for i in range(0, COLUMNS // heads, 2):
    keys = [
      _fold([_weighted(x, w, low, i + j, heads) for j in (0, 1)], is_odd, 1)
      for low in (0, 1)
    ]
    total = _fold(keys, is_low, 2)
    for of_upper, of_lower in scale:
      total = total * is_low.where_float(of_lower, of_upper)
    place = scores.step(query + i, 4 * size).step(key, 4)
    place.store([total], where=query + i < stop)
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
