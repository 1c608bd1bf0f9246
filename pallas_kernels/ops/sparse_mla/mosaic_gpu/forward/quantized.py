"""The forward kernel's producer of rows in 8 bits: it converts what it gathers.

A thread holds its numbers of the next part in registers, as they come from
device memory, while those of the part before become bfloat16 and go to their
tile. So a part is full soon after it is free. Registers have room for no more:
the rows of a step are brought to L2 during the step before. RoPE's columns,
which are in bfloat16 anyway, are copied as they are.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, Final

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import copies
from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import rows
from pallas_kernels.hopper import signals
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper import widths
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import (
  gather as gather_lib,
)
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import plan
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import steps as steps_lib

_ROPE: Final = widths.C // plan.COLUMNS  # its column tile
_SCALES: Final = 4  # of a row
_ROWS: Final = len(gather_lib.GROUPS) // 2  # of a tile, that a thread has
# From one part to the next, and to the first of the next step.
_PARTS: Final = plan.LEFT_0, plan.RIGHT_0, plan.RIGHT_1, plan.LEFT_1
# 2^120, twice, as bfloat16: what the exponents of e4m3 and bfloat16 differ by.
_BIAS: Final = 0x7B807B80


@dataclasses.dataclass(frozen=True)
class Rows:
  """What an `operands.QuantizedLatents` has: arrays, or places in them."""

  values: Any
  scale: Any
  rope: Any


def gather(
  kv: Rows,
  indices: Any,
  shared: plan.Shared,
  first_row: Int[Array, ""],
  token: Int[Array, ""],
  rank: Int[Array, ""],
  keys: int,
  blocks: int,
) -> None:
  """Fills tiles as `gather.gather`, from arrays `[B S, ..]` in device memory.

  What it stores is not fenced: a consumer that has waited for a part does so.
  """
  K = indices.shape[1]

  @threads.code(
    *[threads.REF] * 4,
    *(plgpu.RefType(tiles.SWIZZLED), threads.REF),
    *[threads.NUMBER] * 3,
  )
  def emit(values, scale, rope, indices, target, numbers, row, token, rank):
    fill(
      Rows(
        Place.of(values).step(row, widths.C),
        Place.of(scale).step(row, 4 * _SCALES),
        Place.of(rope).step(row, 2 * widths.R),
      ),
      Place.of(indices).step(token, 4 * K),
      Place.of(target),
      Place.of(numbers),
      rank,
      **dict(steps=K // plan.STEP, keys=keys, blocks=blocks),
    )

  emit(
    *(kv.values, kv.scale, kv.rope, indices, shared.kv, shared.rows),
    *(first_row, token, rank),
  )


def fill(
  kv: Rows,
  indices: Place,
  target: Place,
  numbers: Place,
  rank: U32,
  *,
  steps: int,
  keys: int,
  blocks: int,
) -> None:
  """Runs a thread of the producer.

  Eight threads share a row: each has the piece of its index of all column
  tiles. Of RoPE's, that is 16 bytes as well.

  Args:
    kv: Rows of this batch row.
    indices: Of this query.
    target: Both tiles.
    numbers: The array of `plan.Row`.
    rank: The block takes the query's steps rank, rank + blocks and so on.
    steps: Of a query with K valid indices.
    keys: Rows that there are.
    blocks: Of the cluster.
  """
  thread = threads.thread_of_warpgroup()
  row, piece = thread >> 3, thread & 7
  target = rows.swizzled(target, row, piece, plan.EIGHT)
  kv = Rows(kv.values + (piece << 3), kv.scale, kv.rope + (piece << 4))
  by_thread, indices = indices.step(thread, 4), indices.step(row, 4)
  masks = numbers.step(row, 4)
  all_barriers = numbers + 4 * plan.ROWS * plan.Row.BARRIERS
  barrier = lambda which: all_barriers + barriers.BYTES * which

  load_indices = lambda i, tile: gather_lib.load_indices(
    indices, rank + i * blocks, tile
  )
  load_own = lambda i: by_thread.step(rank + i * blocks, 4 * plan.STEP).load()
  last = (U32(steps - 1) - rank) // blocks  # that there is room for

  def step(i, _, *carried):
    own, later = U32(0), load_own((i + 1).min(last))
    chosen, held = {0: carried[:_ROWS], 1: load_indices(i, 1)}, carried[_ROWS:]
    for part, following in zip(_PARTS, [*_PARTS[1:], _PARTS[0]], strict=True):
      real = [x < keys for x in chosen[part.tile]]
      if part is plan.RIGHT_1:
        own = steps_lib.count_own(numbers, rank, blocks)
        chosen[0] = load_indices((i + 1).min(own - 1), 0)
      signals.wait(barrier(part.free), (i & 1) ^ 1)
      if part is plan.RIGHT_0:
        # By now both consumers have read the masks of the step before.
        every = [x < keys for tile in range(2) for x in chosen[tile]]
        gather_lib.store_masks(masks, every, piece.equals(0))
        signals.arrive(barrier(plan.Barrier.MASKED))
        _prefetch(kv, later, keys)
      if _ROPE in part.columns:
        _copy_rope(part, target, kv.rope, chosen[part.tile], real)
      load_next = functools.partial(_load, following, kv, keys)
      upcoming = chosen[following.tile]
      held = _convert(part, target, held, real, load_next, upcoming)
      if _ROPE in part.columns:
        copies.wait_all()
      signals.arrive(barrier(part.ready))
    return [i + 1, own, *chosen[0], *held]

  first, whole = load_indices(U32(0), 0), load_own(U32(0))
  load_first = functools.partial(_load, _PARTS[0], kv, keys)
  held = [x for index in first for x in load_first(index)]
  _prefetch(kv, whole, keys)
  threads.loop_while(
    lambda i, own, *_: i < own, step, [U32(0), U32(1), *first, *held]
  )


def _prefetch(kv: Rows, index: U32, keys: int) -> None:
  """Brings a whole row to L2."""
  for array, size in (
    *((kv.values, widths.C), (kv.scale, 4 * _SCALES)),
    (kv.rope, 2 * widths.R),
  ):
    place = array.step((index < keys).where(index, 0), size)
    for line in range(0, size, 128):
      place.prefetch(line, where=index < keys)


def _values(part: plan.Part) -> list[int]:
  """Column tiles of a part that are in 8 bits."""
  return [column for column in part.columns if column != _ROPE]


def _load(part: plan.Part, kv: Rows, keys: int, index: U32) -> list[U32]:
  """Loads what this thread converts of a row: two scales, then the numbers."""
  index = (index < keys).where(index, 0)
  first, *_ = _values(part)
  if first:
    # Else the row's address would stay in registers, which are scarce, between
    # its two halves.
    index = index + instructions.zero()
  scale = kv.scale.step(index, 4 * _SCALES)
  values = kv.values.step(index, widths.C)
  loaded = scale.load_words(2, first // 2 * 4)
  for column in _values(part):
    loaded += values.load_words(2, plan.COLUMNS * column)
  return loaded


def _convert(
  part: plan.Part,
  target: Place,
  held: Sequence[U32],
  real: Sequence[Bool],
  load_next: Callable[[U32], list[U32]],
  upcoming: Sequence[U32],
) -> list[U32]:
  """Converts and stores a part's rows, and loads those of the next instead."""
  size = len(held) // _ROWS
  loaded = []
  for j, (ok, index) in enumerate(zip(real, upcoming, strict=True)):
    scales, words = (x := held[size * j :][:size])[:2], x[2:]
    # An index that is none gives 0.
    scales = [ok.where(x.pick_bytes(x, 0x3232), 0) for x in scales]
    for k, column in enumerate(_values(part)):
      pair = words[2 * k : 2 * k + 2]
      fours = [y for x in pair for y in widen(x, scales[k // 2])]
      target.store(fours, _offset(part, j, column))
    loaded += load_next(index)
    signals.meet_warp()  # the compiler would load later, when it is too late
  return loaded


def _offset(part: plan.Part, j: int, column: int) -> int:
  """Bytes from a thread's first piece to that of its j-th row."""
  eights = 2 * j
  return plan.TILE * part.tile + plan.EIGHT * eights + plan.BLOCK * column


def widen(word: U32, scale: U32) -> list[U32]:
  """Converts four numbers of e4m3 to bfloat16, times a scale.

  The exponent is 4 bits wider, so that a number, also a denormal one, becomes
  its 2^-120th. A NaN becomes 480.

  Args:
    word: The numbers.
    scale: Twice, as bfloat16.

  Returns:
    Two registers of two numbers; exact for powers of two.
  """
  low = (word << 4) & 0xF0F0F0F0
  high = ((word >> 4) & 0x07070707) | (word & 0x80808080)
  pairs = [low.pick_bytes(high, pattern) for pattern in (0x5140, 0x7362)]
  return [x.times_halves(U32(_BIAS)).times_halves(scale) for x in pairs]


def _copy_rope(
  part: plan.Part,
  target: Place,
  rope: Place,
  chosen: Sequence[U32],
  real: Sequence[Bool],
) -> None:
  """Starts the copies of a part's RoPE columns."""
  for j, (index, ok) in enumerate(zip(chosen, real, strict=True)):
    source = rope.step(ok.where(index, 0), 2 * widths.R)
    size, to = ok.where(copies.BYTES, 0), _offset(part, j, _ROPE)
    copies.start(target, source, size, prefetch=128, to=to)
