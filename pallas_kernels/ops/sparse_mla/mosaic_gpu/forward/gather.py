"""The forward kernel's producer: it gathers selected rows into two tiles."""

import math
from typing import Any, Final

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import copies
from pallas_kernels.hopper import rows
from pallas_kernels.hopper import signals
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper import widths
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import plan
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import steps as steps_lib

_BYTES: Final = 2 * widths.CR  # of a row
_APART: Final = 16  # rows from one of a thread's to its next: 8 threads a row
# The tile and first row of each group of rows that the threads copy together.
_GROUPS: Final = tuple(
  (tile, first) for tile in range(2) for first in range(0, plan.ROWS, _APART)
)


def gather(
  kv: Any,
  indices: Any,
  shared: plan.Shared,
  first_row: Int[Array, ""],
  token: Int[Array, ""],
  rank: Int[Array, ""],
  keys: int,
  blocks: int,
) -> None:
  """Fills the parts of both tiles, step by step, as they become free.

  Args:
    kv: [B S, C+R] in device memory.
    indices: [B T, K], likewise.
    shared: Holds the tiles, their masks and the barriers.
    first_row: First row of this query's batch row in `kv`.
    token: Index of this query in `indices`.
    rank: Of this block in its cluster.
    keys: S; an index outside [0, S) gives zeros and a mask of -inf.
    blocks: Of the cluster.
  """
  K = indices.shape[1]

  @threads.code(
    *(threads.REF, threads.REF, plgpu.RefType(tiles.SWIZZLED), threads.REF),
    *[threads.NUMBER] * 3,
  )
  def emit(kv, indices, target, numbers, first_row, token, rank):
    fill(
      Place.of(kv).step(first_row, _BYTES),
      Place.of(indices).step(token, 4 * K),
      Place.of(target),
      Place.of(numbers),
      rank,
      **dict(keys=keys, blocks=blocks),
    )

  emit(kv, indices, shared.kv, shared.rows, first_row, token, rank)


def fill(
  kv: Place,
  indices: Place,
  target: Place,
  numbers: Place,
  rank: U32,
  *,
  keys: int,
  blocks: int,
) -> None:
  """Runs a thread of the producer.

  Eight threads share a row: each copies the piece of its index of all column
  tiles. The indices of a step are loaded during the step before. The first
  step, which every block has, does not wait until the consumers have noted how
  many the query has.

  Args:
    kv: Rows of this batch row.
    indices: Of this query.
    target: Both tiles.
    numbers: The array of `plan.Row`.
    rank: The block takes the query's steps rank, rank + blocks and so on.
    keys: Rows that there are.
    blocks: Of the cluster.
  """
  thread = threads.thread_of_warpgroup()
  row, piece = thread >> 3, thread & 7
  target = rows.swizzled(target, row, piece, plan.EIGHT)
  kv = kv + (piece << 4)
  indices = indices.step(row, 4)
  masks = numbers.step(row, 4)
  all_barriers = numbers + 4 * plan.ROWS * plan.Row.BARRIERS
  barrier = lambda which: all_barriers + barriers.BYTES * which

  load = lambda i: load_indices(indices, rank + i * blocks, _APART)

  def step(i, _, *chosen):
    parity = (i & 1) ^ 1
    real = [x < keys for x in chosen]
    sources = [
      kv.step(ok.where(x, 0), _BYTES)
      for x, ok in zip(chosen, real, strict=True)
    ]
    sizes = [ok.where(copies.BYTES, 0) for ok in real]

    def copy(part):
      _copy(part, target, sources, sizes)
      signals.arrive_after_copies(barrier(part.ready))

    def wait_for(part):
      signals.wait(barrier(part.free), parity)

    wait_for(plan.LEFT_0)
    copy(plan.LEFT_0)
    wait_for(plan.RIGHT_0)
    # By now both consumers have read the masks of the step before.
    store_masks(masks, real, _APART, piece.equals(0))
    signals.arrive(barrier(plan.Barrier.MASKED))
    copy(plan.RIGHT_0)
    own = steps_lib.count_own(numbers, rank, blocks)
    upcoming = load((i + 1).min(own - 1))
    for part in (plan.RIGHT_1, plan.LEFT_1):
      wait_for(part)
      copy(part)
    return [i + 1, own, *upcoming]

  threads.loop_while(
    lambda i, own, *_: i < own, step, [U32(0), U32(1), *load(U32(0))]
  )


def load_indices(indices: Place, step: U32, apart: int) -> list[U32]:
  """Loads a thread's indices of both tiles of a step.

  Args:
    indices: This thread's first of the query.
    step: Among those of the query.
    apart: Rows from one of the thread's to its next.
  """
  here = indices.step(step, 4 * plan.STEP)
  return [here.load(4 * row) for row in range(0, plan.STEP, apart)]


def _copy(
  part: plan.Part, target: Place, sources: list[Place], sizes: list[U32]
) -> None:
  """Starts this thread's copies of a part."""
  for (tile, i), source, size in zip(_GROUPS, sources, sizes, strict=True):
    if tile != part.tile:
      continue
    for column in part.columns:
      to = plan.TILE * tile + plan.EIGHT * (i // 8) + plan.BLOCK * column
      at = 2 * plan.COLUMNS * column
      copies.start(target, source, size, prefetch=128, to=to, at=at)


def store_masks(
  masks: Place, real: list[Bool], apart: int, where: Bool
) -> None:
  """Stores the masks of both tiles, in one thread of each row.

  Args:
    masks: Place of this thread's first, of tile 0; those of tile 1 follow.
    real: Whether the keys of its rows are any, in the order of `load_indices`.
    apart: As `load_indices` gets it.
    where: The threads that store.
  """

  @threads.when(where)
  def _():
    for i, ok in enumerate(real):
      mask = ok.where_float(0.0, -math.inf)
      masks.store([mask], 4 * (plan.ROWS * plan.Row.MASK_0 + apart * i))
