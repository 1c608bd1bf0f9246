"""Combines what the blocks of a cluster have of a query: its output and lse.

Each block has attended to other keys, and holds 64 heads' sums of weighted
values in registers. When all have come, they read each other's maxima and sums
of weights; then each scales its own and sends of every consumer's columns a
part to each block, which adds up what it gets in the order of the blocks and
writes it. What it gets lies where its keys were.

A block leaves when it has everyone's part. None reads its memory any more then,
since each has read before it sends.
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

  @threads.code(
    *(tiles.MATRIX, plgpu.RefType(tiles.SWIZZLED), threads.REF),
    *(threads.REF, threads.REF),
  )
  def emit(out, kv, rows, out_ref, lse_ref):
    cluster.meet()
    exchange(
      fragments.floats(out),
      *(Place.of(kv), Place.of(rows), Place.of(out_ref), Place.of(lse_ref)),
      which=which,
      blocks=blocks,
    )

  emit(out, shared.kv, shared.rows, out_ref, lse_ref)


def exchange(
  out: Sequence[F32],
  buffer: Place,
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
    buffer: Where the parts arrive: of each block, [2, most, 128, 4] of
      consumers, eights of columns, threads and their floats.
    numbers: The array of `plan.Row`.
    target: [64, C] in device memory.
    lse_target: [64], likewise.
    which: 0 or 1.
    blocks: Of the cluster.
  """
  warp, row, column = fragments.place()
  row = (warp << 4) + row
  rank = cluster.rank()
  lses, factors = zip(
    *(_lse_and_factor(numbers.step(row + 8 * i, 4), blocks) for i in range(2))
  )
  most = pl.cdiv(_EIGHTS, blocks)
  own = buffer.step(threads.thread_of_warpgroup(), 16) + which * most * _EIGHT
  arrived = numbers + (
    4 * plan.ROWS * Row.BARRIERS
    + barriers.BYTES * (plan.Barrier.COMBINED_0 + which)
  )
  part = _CONSUMERS * most * _EIGHT
  _send(out, factors, own.step(rank, part), arrived, rank, blocks)
  first = _first_eight(rank, blocks)
  number = _first_eight(rank + 1, blocks) - first
  signals.expect(
    *(arrived, number * (blocks * _EIGHT)),
    threads.thread_of_warpgroup().equals(0),
  )
  signals.wait(arrived, U32(0))
  target = target.step(row, 2 * widths.C) + ((first << 4) + (column << 2))
  for i in range(most):
    sums = _sum(
      [own.load_floats(4, part * b + _EIGHT * i) for b in range(blocks)]
    )
    at = widths.C * which + 16 * i
    has = number > i
    target.store([sums[0].pack(sums[1])], at, where=has)
    target.store([sums[2].pack(sums[3])], at + 16 * widths.C, where=has)
  if not which:
    writes = rank.equals(0) & column.equals(0)
    for i, lse in enumerate(lses):
      lse_target.step(row, 4).store([lse], 32 * i, where=writes)


def _first_eight[T: (int, U32)](block: T, blocks: int) -> T:
  """First eight of a consumer's columns that a block gets."""
  return block * _EIGHTS // blocks


def _lse_and_factor(row: Place, blocks: int) -> tuple[F32, F32]:
  """Computes a head's logsumexp, and the factor of this block's values.

  Args:
    row: Place of the head's number in the first `plan.Row`.
    blocks: Of the cluster.
  """
  at = lambda number: 4 * plan.ROWS * number
  places = [cluster.in_block(row, U32(b)) for b in range(blocks)]
  tops = [cluster.load(x, at(Row.TOP_1)) for x in places]
  sums = [
    cluster.load(x, at(Row.SUM_0)) + cluster.load(x, at(Row.SUM_1))
    for x in places
  ]
  top, total = tops[0], F32(0.0)
  for x in tops[1:]:
    top = top.max(x)
  for x, y in zip(sums, tops, strict=True):
    total = total + x * instructions.exp2(y - top)
  [own] = row.load_floats(1, at(Row.TOP_1))
  has_keys = total.differs(0.0)
  # Without a key all values are 0, whatever the factor.
  lse = top + has_keys.where_float(instructions.log2(total), 0.0)
  factor = instructions.exp2(own - lse)
  return has_keys.where_float(lse * F32(1 / LOG2E), -math.inf), factor


def _send(
  out: Sequence[F32],
  factors: Sequence[F32],
  place: Place,
  arrived: Place,
  rank: U32,
  blocks: int,
) -> None:
  """Sends each block its eights of columns, scaled.

  A block begins with its own, so that no two send to the same at a time.
  """
  scaled = [x * factors[i // 2 % 2] for i, x in enumerate(out)]
  every = range(blocks)
  there = [cluster.in_block(place, U32(b)) for b in every]
  signal = [cluster.in_block(arrived, U32(b)) for b in every]

  def send_from(first):
    for block in (*every[first:], *every[:first]):
      first_eight = _first_eight(block, blocks)
      for eight in range(first_eight, _first_eight(block + 1, blocks)):
        at = _EIGHT * (eight - first_eight)
        four = scaled[4 * eight : 4 * eight + 4]
        cluster.send(four, there[block], at, signal[block])

  for first in every:
    threads.when(rank.equals(first))(lambda first=first: send_from(first))


def _sum(parts: Sequence[Sequence[F32]]) -> list[F32]:
  total = list(parts[0])
  for part in parts[1:]:
    total = [x + y for x, y in zip(total, part, strict=True)]
  return total
