"""The forward kernel's producer of rows in 8 bits: it converts what it gathers.

While a thread converts what it has of a row's part, and stores it to the tile,
it loads that of its next row into registers. So a part is full soon after it is
free. The rows of a step are brought to L2 during the step before. RoPE's
columns, which are in bfloat16 anyway, are copied as they are.
"""

from collections.abc import Sequence
import dataclasses
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
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import (
  gather as gather_lib,
)
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import plan
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import steps as steps_lib

_ROPE: Final = widths.C // plan.COLUMNS  # its column tile
_GROUPS: Final = 4  # of a row's numbers, which have a scale each
_WORDS: Final = 4  # of a thread's numbers in a column tile
_APART: Final = 32  # rows from a thread's first to its second: 4 threads a row
_ROWS: Final = plan.ROWS // _APART  # of a tile, that a thread has
_HALVES: Final = 2  # of a part, which have a scale each
# What a thread converts at a time, in turn: parts of its rows.
_TURNS: Final = tuple(
  (part, row)
  for part in (plan.LEFT_0, plan.RIGHT_0, plan.RIGHT_1, plan.LEFT_1)
  for row in range(_ROWS)
)
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
        Place.of(scale).step(row, 4 * _GROUPS),
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

  Four threads share a row: each has 16 columns of every column tile, which are
  16 bytes, and two pieces of 16 bytes when they are converted.

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
  row, quarter = thread >> 2, thread & 3
  place = lambda piece: rows.swizzled(target, row, piece, plan.EIGHT)
  pieces = [place((quarter << 1) + i) for i in range(2)]
  # Of a row and the next, other halves at a time: they lie in other banks.
  piece = quarter ^ ((row & 1) << 2)
  rope = [(x << 4, place(x)) for x in (piece, piece ^ 4)]
  kv = Rows(kv.values + (quarter << 4), kv.scale, kv.rope)
  indices, masks = indices.step(row, 4), numbers.step(row, 4)
  all_barriers = numbers + 4 * plan.ROWS * plan.Row.BARRIERS
  barrier = lambda which: all_barriers + barriers.BYTES * which
  last = (U32(steps - 1) - rank) // blocks  # that there is room for
  load = lambda i: gather_lib.load_indices(indices, rank + i * blocks, _APART)
  of = lambda part, xs: xs[_ROWS * part.tile :][:_ROWS]

  def step(i, _, *carried):
    chosen, held = carried[: 2 * _ROWS], carried[2 * _ROWS :]
    own, upcoming = U32(0), list[U32]()
    real = [x < keys for x in chosen]
    for turn, (part, j) in enumerate(_TURNS):
      if j == 0:
        if part is plan.RIGHT_1:
          own = steps_lib.count_own(numbers, rank, blocks)
        signals.wait(barrier(part.free), (i & 1) ^ 1)
        if part is plan.RIGHT_0:
          # By now both consumers have read the masks of the step before.
          gather_lib.store_masks(masks, real, _APART, quarter.equals(0))
          signals.arrive(barrier(plan.Barrier.MASKED))
        if _ROPE in part.columns:
          _copy_rope(part, kv.rope, rope, of(part, chosen), of(part, real))
          signals.arrive_after_copies(barrier(part.ready))
      scales = _scales(held, of(part, real)[j])
      if turn == 0:
        upcoming = load((i + 1).min(last))
      if turn == 1:
        _prefetch(kv, upcoming, quarter, keys)
      later, row = _TURNS[(turn + 1) % len(_TURNS)]
      following = chosen if turn + 1 < len(_TURNS) else upcoming
      loaded = _load(later, kv, keys, of(later, following)[row])
      _convert(part, j, pieces, held, scales)
      held = loaded
      if j == _ROWS - 1:
        signals.arrive(barrier(part.ready))
    return [i + 1, own, *upcoming, *held]

  first = load(U32(0))
  _prefetch(kv, first, quarter, keys)
  part, row = _TURNS[0]
  held = _load(part, kv, keys, of(part, first)[row])
  threads.loop_while(
    lambda i, own, *_: i < own, step, [U32(0), U32(1), *first, *held]
  )


def _prefetch(kv: Rows, chosen: Sequence[U32], quarter: U32, keys: int) -> None:
  """Brings rows to L2: of their numbers, a line by each thread of a row."""
  for index in chosen:
    real = index < keys
    index = real.where(index, 0)
    # This thread's place in a row is 16 bytes a quarter already.
    line = kv.values.step(index, widths.C) + quarter * (128 - 16)
    line.prefetch(0, where=real)
    scale = kv.scale.step(index, 4 * _GROUPS)
    scale.prefetch(0, where=real & quarter.equals(0))
    rope = kv.rope.step(index, 2 * widths.R)
    rope.prefetch(0, where=real & quarter.equals(1))


def _columns(part: plan.Part) -> range:
  """Column tiles of a part that are in 8 bits."""
  first = part.columns[0]
  return range(first, first + 2 * _HALVES)


def _load(part: plan.Part, kv: Rows, keys: int, index: U32) -> list[U32]:
  """Loads what this thread converts of a row's part: scales, then numbers."""
  index = (index < keys).where(index, 0)
  scale = kv.scale.step(index, 4 * _GROUPS)
  values = kv.values.step(index, widths.C)
  columns = _columns(part)
  loaded = scale.load_words(_HALVES, 4 * (columns[0] // 2))
  for column in columns:
    loaded += values.load_words(_WORDS, plan.COLUMNS * column)
  signals.meet_warp()  # the compiler would load later, when it is too late
  return loaded


def _scales(held: Sequence[U32], real: Bool) -> list[U32]:
  """Waits for what `_load` has loaded, and returns the scales for `widen`.

  The compiler counts all loads of a thread as one: it cannot wait for some
  while others are in flight. So none may be started until these have come.

  Args:
    held: What it has loaded.
    real: Whether it is a row; else all becomes 0.
  """
  scales = [
    real.where(x.pick_bytes(x, 0x3232), 0).opaque() for x in held[:_HALVES]
  ]
  signals.meet_warp()
  return scales


def _convert(
  part: plan.Part,
  row: int,
  places: Sequence[Place],
  held: Sequence[U32],
  scales: Sequence[U32],
) -> None:
  """Converts and stores what this thread has of a row's part.

  Args:
    part: The part.
    row: Among this thread's of the tile.
    places: Of both pieces of 8 columns, of this thread's first row in the first
      column tile.
    held: What `_load` has loaded.
    scales: Its scales, from `_scales`.
  """
  words = held[_HALVES:]
  for i, column in enumerate(_columns(part)):
    for j, place in enumerate(places):
      pair = words[_WORDS * i + 2 * j :][:2]
      fours = [y for x in pair for y in widen(x, scales[i // 2])]
      place.store(fours, _offset(part, row, column))


def _offset(part: plan.Part, row: int, column: int) -> int:
  """Bytes from a thread's first piece to that of one of its rows."""
  eights = _APART // 8 * row
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
  source: Place,
  pieces: Sequence[tuple[U32, Place]],
  chosen: Sequence[U32],
  real: Sequence[Bool],
) -> None:
  """Starts the copies of a part's RoPE columns.

  Args:
    part: The part.
    source: Rotated keys.
    pieces: Bytes at which each of this thread's pieces begins in a row, and the
      first row's place in the first column tile.
    chosen: Its rows.
    real: Whether each is one.
  """
  for j, (index, ok) in enumerate(zip(chosen, real, strict=True)):
    size = ok.where(copies.BYTES, 0)
    here = source.step(ok.where(index, 0), 2 * widths.R)
    for at, place in pieces:
      to = _offset(part, j, _ROPE)
      copies.start(place, here + at, size, prefetch=128, to=to)
