"""Sequences of scores, read by a block of threads tile by tile."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
from typing import Final

from pallas_kernels.hopper import threads
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import U32

THREADS: Final = 4 * threads.WARPGROUP  # of a block
# A thread takes two times four neighbouring scores at once.
VECTOR: Final = 4
_LOADS: Final = 2


@dataclasses.dataclass(frozen=True)
class Tile:
  """Scores that a block holds at once, as one thread's registers.

  [load][element]: a load is `VECTOR` neighbours. In the order of the row come
  the warps, in a warp the loads, in a load the lanes, in a lane the elements.
  """

  positions: Sequence[U32]  # of each load's first element
  scores: Sequence[Sequence[U32]]  # bits of a float
  valid: U32  # a bit for each element

  def flags(self, test: Callable[[U32], Bool]) -> U32:
    """Sets a bit for each valid element whose score passes the test."""
    flags = U32(0)
    for j, load in enumerate(self.scores):
      for e, score in enumerate(load):
        flags = flags.with_bit(j * VECTOR + e, test(score))
    return flags & self.valid

  def elements(self) -> Iterator[tuple[U32, Bool]]:
    """Yields each score, and whether it is valid."""
    for j, load in enumerate(self.scores):
      for e, score in enumerate(load):
        yield score, flag(self.valid, j, e)


class Source:
  """Sequence of scores, [low, stop) of those that `load` reads, in tiles."""

  def __init__(self, load, low, stop, loads=_LOADS):
    self._load, self._stop, self._loads = load, U32(stop), loads
    self._first = U32(low) & -VECTOR
    self._size = THREADS * loads * VECTOR
    # Opaque, so that registers do not hold what two sources have in common.
    thread = threads.thread().opaque()
    warp, lane = thread >> 5, thread & 31
    self._mine = warp * (threads.WARP * loads * VECTOR) + lane * VECTOR
    # The elements of the first load that come before `low`.
    self._below = thread.equals(0).where(
      (U32(1) << U32(low) - self._first) - 1, 0
    )

  def tile(self, i: U32) -> Tile:
    step = threads.WARP * VECTOR
    first = self._first + i * self._size + self._mine
    last = (self._stop - 1) & -VECTOR
    positions = [(first + j * step).min(last) for j in range(self._loads)]
    scores = self._load(positions)
    # Of each load the elements before `stop`: as 2^n - 1, without a branch,
    # at which the loads would wait for each other.
    valid, left = U32(0), self._stop - first
    for j in range(self._loads):
      before = left.signed_clamp(j * step, j * step + VECTOR) - j * step
      valid = valid + (U32(1) << before + j * VECTOR) - (1 << j * VECTOR)
    below = i.opaque().equals(0).where(self._below, 0)
    return Tile(positions, scores, valid & ~below)

  def visit(self, body, carried):
    """Calls `body(i, tile, *carried)` for tile after tile."""
    tiles = divide(self._stop - self._first + self._size - 1, self._size)
    return threads.loop(
      tiles, lambda i, *carried: body(i, self.tile(i), *carried), carried
    )


class Held(Source):
  """Source of one tile, which stays in registers."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self._tile = self.tile(U32(0))

  def visit(self, body, carried):
    return body(U32(0), self._tile, *carried)


def divide(x: U32, power_of_two: int) -> U32:
  """Divides by a constant power of two."""
  return x >> (power_of_two.bit_length() - 1)


def flag(flags: U32, j: int, e: int) -> Bool:
  """Bit of an element of a load."""
  return (flags & (1 << j * VECTOR + e)) > 0
