"""A warpgroup gathers rows of device memory, or adds to them.

Each thread copies, or adds, its own few bytes of arbitrary rows.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import copies
from pallas_kernels.hopper import fragments
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32


def numbers(
  indices: Int[Array, "*K"], num_rows: int, first: Int[Array, ""]
) -> Int[Array, "*K"]:
  """Row numbers of indices, counted from `first`; -1 if out of range."""
  real = (indices >= 0) & (indices < num_rows)
  return jnp.where(real, indices + first, -1)


def start_copy(
  source: Any,
  rows: Any,
  tile: Any,
  first: Int[Array, ""],
  column: int = 0,
) -> None:
  """Starts copying rows to a tile; rows of number -1 become 0.

  Args:
    source: [rows, columns] in device memory, bf16.
    rows: Numbers of rows, in shared memory, int32.
    tile: [64, columns] in shared memory, `tiles.SWIZZLED`.
    first: Copy from `rows[first]` on.
    column: First column to copy.
  """
  sizes = dict(
    width=source.shape[1],
    columns=math.prod(tile.shape) // tiles.ROWS,
    column=column,
  )

  @threads.code(
    *(threads.REF, threads.REF, plgpu.RefType(tiles.SWIZZLED), threads.NUMBER)
  )
  def emit(source, rows, tile, first):
    copy(Place.of(source), Place.of(rows), Place.of(tile), first, **sizes)

  emit(source, rows, tile, first)


def copy(
  source: Place,
  rows: Place,
  tile: Place,
  first: U32,
  *,
  width: int,
  columns: int,
  column: int,
) -> None:
  """Starts this thread's copies of `start_copy`.

  Neighbouring threads copy neighbouring pieces; a group of them has a row.
  """
  pieces = 2 * columns // copies.BYTES
  groups = threads.WARPGROUP // pieces
  thread = threads.thread_of_warpgroup()
  group, piece = thread // pieces, thread % pieces
  target = swizzled(tile, group, piece, 16 * columns)
  source = source + (piece << 4) + 2 * column
  rows = rows.step(first + group, 4)
  for i in range(0, tiles.ROWS, groups):
    row = rows.load(4 * i)
    size = row.is_natural().where(copies.BYTES, 0)
    at = source.step(row.signed_max(0), 2 * width)
    copies.start(target, at, size, to=2 * columns * i)


def swizzled(tile: Place, row: U32, piece: U32, eight: int) -> Place:
  """Place of a 16-byte piece of a row in a tile of `tiles.SWIZZLED`.

  Args:
    tile: First byte of the tile.
    row: Row of the tile.
    piece: Index among the row's pieces.
    eight: Bytes of eight rows.
  """
  of_eight = row & 7
  turned = (piece & 7) ^ of_eight
  offset = (row >> 3) * eight + ((piece >> 3) << 10)
  return tile + (offset + (of_eight << 7) + (turned << 4))


def commit_copies() -> None:
  """Commits a group of copies, which may be empty."""
  threads.code()(copies.commit)()


def wait_copies(in_flight: int) -> None:
  """Waits until at most `in_flight` groups are pending, in all threads.

  Afterwards every thread's copies are visible, also to WGMMA.
  """
  threads.code()(lambda: copies.wait(in_flight))()
  plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class Ring:
  """Tiles of gathered rows, copied before they are read.

  A tile has 64 rows; where these are long, it comes in pieces by columns.
  """

  source: Any
  """[rows, pieces * columns] in device memory, bf16."""
  rows: Any
  """Numbers of rows, in shared memory, int32; those of number -1 become 0."""
  slots: Any
  """[n, 64, columns] in shared memory, `tiles.SWIZZLED`."""
  number: Int[Array, ""] | int
  """Tiles to read."""
  ahead: int
  """Pieces that are copied while an earlier one is read, below n."""
  pieces: int = 1
  first: Int[Array, ""] | int = 0
  """The tiles are those of `rows[first]` and after."""

  def start(self) -> None:
    """Starts copying the first pieces."""
    for piece in range(self.ahead):
      self._copy(jnp.int32(0), piece)

  def get(self, tile: Int[Array, ""], piece: int = 0) -> Any:
    """Waits for a piece; pieces are to be got in order.

    Starts copying a later one in place of the earliest, which must have been
    read.
    """
    wait_copies(self.ahead - 1)
    self._copy(tile, piece + self.ahead)
    return self._slot(tile, piece)

  def _copy(self, tile, piece):
    tile += piece // self.pieces
    piece %= self.pieces

    @pl.when(tile < self.number)
    def _():
      _, bK, columns = self.slots.shape
      slot, first = self._slot(tile, piece), self.first + tile * bK
      start_copy(self.source, self.rows, slot, first, piece * columns)

    commit_copies()

  def _slot(self, tile, piece):
    n = self.slots.shape[0]
    return self.slots.at[lax.rem(tile * self.pieces + piece, n)]


def add(
  target: Any,
  rows: Any,
  tile: Float[Array, "64 columns"],
  first: Int[Array, ""],
  column: Int[Array, ""],
) -> None:
  """Adds a tile to rows in device memory; rows of number -1 are skipped.

  The order of the warpgroups' additions is not fixed.

  Args:
    target: [rows, columns] in device memory, f32.
    rows: Numbers of rows, in shared memory, int32.
    tile: Accumulator to add, in the WGMMA layout.
    first: Add to `rows[first]` and those after it.
    column: Add to this column and those after it.
  """
  width = target.shape[1]

  @threads.code(
    *(threads.REF, threads.REF, tiles.MATRIX, threads.NUMBER, threads.NUMBER)
  )
  def emit(target, rows, tile, first, column):
    target = Place.of(target) + (column << 2)
    args = target, Place.of(rows), fragments.floats(tile), first
    add_registers(*args, width=width)

  emit(target, rows, tile, first, column)


def add_registers(
  target: Place, rows: Place, tile: Sequence[F32], first: U32, *, width: int
) -> None:
  """Adds this thread's numbers of a tile, see `fragments`, to rows.

  For each 8 columns, four lanes hold two columns each of a row, and of the
  eighth row after it. They swap until eight lanes hold 128 bytes of a row,
  which is the fastest to add: first with the adjacent lane, to have four
  consecutive columns, then with a lane of the row above or below.
  """
  thread = threads.thread_of_warpgroup()
  warp, lane = thread >> 5, thread & (threads.WARP - 1)
  right, down = (lane & 1).differs(0), (lane & 4).differs(0)
  for bit, shift in ((1, 5), (2, 3), (4, 4)):
    target = target + ((lane & bit) << shift)
  rows = rows.step((warp << 4) + ((lane >> 2) & 6) + first, 4)
  for half in range(2):
    numbers = [rows.load(4 * (8 * half + below)) for below in range(2)]
    places = [target.step(x.signed_max(0), 4 * width) for x in numbers]
    pairs = [tile[i : i + 2] for i in range(2 * half, len(tile), 4)]
    for i in range(0, len(pairs), 4):
      left, further = (
        [number for pair in _swap(x, y, right, 1) for number in pair]
        for x, y in (pairs[i : i + 2], pairs[i + 2 : i + 4])
      )
      fours = _swap(left, further, down, 4)
      for four, place, number in zip(fours, places, numbers, strict=True):
        place.add(four, offset=32 * i, where=number.is_natural())


def _swap(
  x: Sequence[F32], y: Sequence[F32], second: Bool, distance: int
) -> tuple[list[F32], list[F32]]:
  """Swaps between two lanes: the first gets both x, the `second` both y, in the
  order of the lanes."""
  theirs = [
    threads.exchange(second.where_float(a, b), distance)
    for a, b in zip(x, y, strict=True)
  ]
  first_has = [second.where_float(a, b) for a, b in zip(theirs, x)]
  second_has = [second.where_float(a, b) for a, b in zip(y, theirs)]
  return first_has, second_has
