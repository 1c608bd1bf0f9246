"""Combines what the blocks of a cluster have of a query: its output and lse.

Each block has attended to other keys, and holds 64 heads' sums of weighted
values in registers. When all have come, each sends of every consumer's columns
a part to each block, and what its weights refer to and sum up to. A block adds
up what it gets, scaled, in the order of the blocks and writes it. What it gets
lies where its keys and queries were.

A block leaves when it has everyone's part: none reads another's memory.
"""

from collections.abc import Sequence
import math
from typing import Any, Final

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import cluster
from pallas_kernels.hopper import fragments
from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import signals
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper import widths
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import plan
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward.plan import Row
from pallas_kernels.softmax import LOG2E

_EIGHTS: Final = widths.C // 2 // 8  # eights of columns that a consumer keeps
_EIGHT: Final = 16 * threads.WARPGROUP  # bytes of an eight: 4 floats a thread
_SUMS: Final = 8 * plan.ROWS  # bytes of 64 heads' tops and sums
_CONSUMERS: Final = 2


def combine(
  out: Float[Array, "64 256"],
  shared: plan.Shared,
  out_ref: Any,
  lse_ref: Any,
  which: int,
  blocks: int,
) -> None:
  """Writes this block's part of what the cluster has; all its blocks call it.

  Args:
    out: Weighted values, summed over this block's keys.
    shared: Holds the top and the sums of the weights.
    out_ref: [64, C] in device memory.
    lse_ref: [64], likewise.
    which: Consumer that calls it, 0 or 1.
    blocks: Of the cluster.
  """

  swizzled = plgpu.RefType(tiles.SWIZZLED)

  @threads.code(
    *(tiles.MATRIX, swizzled, swizzled, threads.REF, threads.REF, threads.REF)
  )
  def emit(out, *refs):
    cluster.meet()
    places = map(Place.of, refs)
    exchange(fragments.floats(out), *places, which=which, blocks=blocks)

  emit(out, shared.kv, shared.q, shared.rows, out_ref, lse_ref)


def exchange(
  out: Sequence[F32],
  parts: Place,
  sums: Place,
  numbers: Place,
  target: Place,
  lse_target: Place,
  *,
  which: int,
  blocks: int,
) -> None:
  """Runs a thread of a consumer.

  Args:
    out: Its registers of the weighted values.
    parts: Where these arrive: of each block, [2, most, 128, 4] of consumers,
      eights of columns, threads and their floats.
    sums: Where arrives what they refer to: of each block, [2, 32, 2, 2] of
      consumers, pairs of heads, heads, and their top and sum of weights.
    numbers: The array of `plan.Row`.
    target: [64, C] in device memory.
    lse_target: [64], likewise.
    which: 0 or 1.
    blocks: Of the cluster.
  """
  warp, row, column = fragments.place()
  row = (warp << 4) + row
  rank = cluster.rank()
  thread = threads.thread_of_warpgroup()
  most = pl.cdiv(_EIGHTS, blocks)
  part = _CONSUMERS * most * _EIGHT
  parts = parts.step(thread, 16) + which * most * _EIGHT
  sums = sums.step(thread >> 2, 16) + which * _SUMS
  arrived = numbers + (
    4 * plan.ROWS * Row.BARRIERS
    + barriers.BYTES * (plan.Barrier.COMBINED_0 + which)
  )
  _send(out, parts.step(rank, part), arrived, rank, blocks)
  own = sums.step(rank, _CONSUMERS * _SUMS)
  _send_sums(numbers.step(row, 4), own, arrived, column, blocks)
  first = _first_eight(rank, blocks)
  number = _first_eight(rank + 1, blocks) - first
  size = number * (blocks * _EIGHT) + blocks * _SUMS
  signals.expect(arrived, size, thread.equals(0))
  signals.wait(arrived, U32(0))
  # Of each block and head, and by head then.
  pairs = [sums.load_floats(4, _CONSUMERS * _SUMS * b) for b in range(blocks)]
  heads = zip(*((x[:2], x[2:]) for x in pairs), strict=True)
  lses, factors = zip(*map(_lse_and_factors, heads), strict=True)
  target = target.step(row, 2 * widths.C) + ((first << 4) + (column << 2))
  for i in range(most):
    fours = [parts.load_floats(4, part * b + _EIGHT * i) for b in range(blocks)]
    at = widths.C * which + 16 * i
    for head in range(2):
      pair = [
        _sum([x[2 * head + j] for x in fours], factors[head]) for j in range(2)
      ]
      pair = [pair[0].pack(pair[1])]
      target.store(pair, at + 16 * widths.C * head, where=number > i)
  if not which:
    writes = rank.equals(0) & column.equals(0)
    for i, lse in enumerate(lses):
      lse_target.step(row, 4).store([lse], 32 * i, where=writes)


def _first_eight[T: (int, U32)](block: T, blocks: int) -> T:
  """First eight of a consumer's columns that a block gets."""
  return block * _EIGHTS // blocks


def _send(
  out: Sequence[F32], place: Place, arrived: Place, rank: U32, blocks: int
) -> None:
  """Sends each block its eights of columns.

  A block begins with its own, so that no two send to the same at a time.
  """
  every = range(blocks)
  there = [cluster.in_block(place, U32(b)) for b in every]
  signal = [cluster.in_block(arrived, U32(b)) for b in every]

  def send_from(first):
    for block in (*every[first:], *every[:first]):
      first_eight = _first_eight(block, blocks)
      for eight in range(first_eight, _first_eight(block + 1, blocks)):
        at = _EIGHT * (eight - first_eight)
        four = out[4 * eight : 4 * eight + 4]
        cluster.send(four, there[block], at, signal[block])

  for first in every:
    threads.when(rank.equals(first))(lambda first=first: send_from(first))


def _send_sums(
  row: Place, place: Place, arrived: Place, column: U32, blocks: int
) -> None:
  """Sends tops and sums of two heads, which four threads share, to all blocks.

  Args:
    row: Place of the first head's number in the first `plan.Row`.
    place: Where it goes in each block.
    arrived: Barrier, likewise.
    column: Of the four, this thread.
    blocks: Of the cluster.
  """
  both = []
  for i in range(2):
    top, *halves = (
      row.load_floats(1, 4 * plan.ROWS * number + 32 * i)[0]
      for number in (Row.TOP_1, Row.SUM_0, Row.SUM_1)
    )
    both += [top, halves[0] + halves[1]]
  for first in range(0, blocks, 4):
    block = (column + first).min(blocks - 1)
    there, signal = (cluster.in_block(x, block) for x in (place, arrived))
    cluster.send(both, there, 0, signal, where=column + first < blocks)


def _lse_and_factors(
  tops_and_sums: Sequence[Sequence[F32]],
) -> tuple[F32, list[F32]]:
  """Computes a head's logsumexp, and the factor of each block's values."""
  tops, sums = zip(*tops_and_sums, strict=True)
  top = tops[0]
  for x in tops[1:]:
    top = top.max(x)
  total = _sum(sums, [instructions.exp2(x - top) for x in tops])
  has_keys = total.differs(0.0)
  # Without a key all values are 0, whatever the factor.
  log = has_keys.where_float(instructions.log2(total), 0.0)
  lse = has_keys.where_float((top + log) * F32(1 / LOG2E), -math.inf)
  return lse, [instructions.exp2(x - top - log) for x in tops]


def _sum(parts: Sequence[F32], factors: Sequence[F32]) -> F32:
  total = parts[0] * factors[0]
  for x, factor in zip(parts[1:], factors[1:], strict=True):
    total = x.multiply_add(factor, total)
  return total
