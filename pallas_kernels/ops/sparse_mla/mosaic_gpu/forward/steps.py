"""Steps of a query: up to its last valid index, and which a block takes."""

from typing import Any, Final

from jaxtyping import Array, Int

from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import signals
from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import plan

_FOUR: Final = 4  # indices that a thread loads at once
_NOTED: Final = 4 * plan.ROWS * plan.Row.LAST  # in the array of `plan.Row`
_COUNTED: Final = (
  4 * plan.ROWS * plan.Row.BARRIERS + barriers.BYTES * plan.Barrier.COUNTED
)
_THREADS: Final = plan.CONSUMER_WARPS * threads.WARP


def note_last(indices: Any, shared: plan.Shared, keys: int) -> None:
  """Notes in shared memory, for each warp, the last valid index it has seen.

  All threads of both consumers call it: together they see all indices.

  Args:
    indices: [K] of this query in device memory; K is a multiple of `plan.STEP`.
    shared: Has room for what is noted.
    keys: S; an index is valid in [0, S).
  """
  number = indices.shape[0]

  @threads.code(threads.REF, threads.REF)
  def emit(indices, numbers):
    last = last_of_warp(Place.of(indices), number, keys)
    numbers = Place.of(numbers)
    first = threads.lane().equals(0)
    noted = numbers + _NOTED
    noted.step(threads.warp(), 4).store([last], where=first)
    signals.arrive(numbers + _COUNTED, first)

  emit(indices, shared.rows)


def last_of_warp(indices: Place, number: int, keys: int) -> U32:
  """Place after the last valid index that a thread of the warp loads, or 0."""
  fours = number // _FOUR
  last = U32(0)
  for first in range(0, fours, _THREADS):
    four = (threads.thread() + first).min(fours - 1)
    words = indices.step(four, 4 * _FOUR).load_constants(_FOUR)
    for i, index in enumerate(words):
      place = four * _FOUR + (i + 1)
      last = last.max((index < keys).where(place, 0))
  return threads.warp_max(last)


def count(
  shared: plan.Shared, rank: Int[Array, ""], blocks: int
) -> Int[Array, ""]:
  """Waits for the consumers, and counts as `count_own`."""

  @threads.code(threads.REF, threads.NUMBER, returns=threads.a_number())
  def emit(numbers, rank):
    return count_own(Place.of(numbers), rank, blocks)

  return emit(shared.rows, rank)


def count_own(numbers: Place, rank: U32, blocks: int) -> U32:
  """Counts the steps rank, rank + blocks and so on that the query has.

  At least 1, for a block without any as well: it has step `rank` of all those
  that there are room for, in which no index is valid.

  Args:
    numbers: The array of `plan.Row`. Both consumers note, or have noted, the
      last valid index there.
    rank: Of this block in its cluster.
    blocks: Of the cluster.
  """
  signals.wait(numbers + _COUNTED, U32(0))
  last = U32(0)
  for i in range(0, plan.CONSUMER_WARPS, _FOUR):
    for word in numbers.load_words(_FOUR, _NOTED + 4 * i):
      last = last.max(word)
  steps = (last + (plan.STEP - 1)) // plan.STEP
  return ((steps + (blocks - 1) - rank) // blocks).max(1)
