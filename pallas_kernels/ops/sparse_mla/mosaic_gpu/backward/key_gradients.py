"""Gradients dKV of a tile of keys, by columns, from registers to device memory.

A thread's keys are the four of its two rows and of their neighbours: it adds to
whole 128-byte lines of these.
"""

from collections.abc import Sequence
import dataclasses
from typing import Final

from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import wgmma
from pallas_kernels.hopper import widths
from pallas_kernels.hopper.memory import LazyRow
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import exchange
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import lanes
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import warpgroup

_ROWS: Final = (0, 1, 8, 9)  # of a thread's keys, from its even row


@dataclasses.dataclass(frozen=True)
class Columns:
  """Columns of dKV that are multiplied at once."""

  index: int
  """Among the block's columns of this kind."""
  is_narrow: bool = False
  """Whether they are 32 rotated columns, or 64 others."""

  @property
  def number(self) -> int:
    return 32 if self.is_narrow else 64


def columns_of(group: warpgroup.Warpgroup) -> list[Columns]:
  """Columns of this warpgroup.

  The rotated ones are last: they are less work, and in a cluster fall to the
  warpgroup that arrives earlier.
  """
  wide = group.plan.wide // 128
  columns = [Columns(wide * group.which + i) for i in range(wide)]
  if not (group.plan.is_pair and group.which):
    columns.append(Columns(group.which, is_narrow=True))
  return columns


def start(group: warpgroup.Warpgroup, columns: Columns) -> list[F32]:
  """Starts P^T dO + dS^T Q, over all heads; rotated: dS^T Q."""
  operands, index = group.operands, columns.index
  queries = operands.q_narrow if columns.is_narrow else operands.q_wide
  acc = wgmma.fence(wgmma.zeros(columns.number))
  for half in range(group.plan.blocks):
    if not columns.is_narrow:
      weights = operands.p.along_columns(half=half)
      cotangents = operands.do_wide.along_rows(index, half)
      acc = wgmma.multiply(acc, weights, cotangents, 4)
    gradients = operands.ds.along_columns(half=half)
    acc = wgmma.multiply(acc, gradients, queries.along_rows(index, half), 4)
  wgmma.commit()
  return acc


def load_keys(indices: Place) -> list[U32]:
  """Loads the indices of this thread's keys."""
  place = indices + lanes.even_row() * 4
  return [place.load(4 * i) for i in _ROWS]


@dataclasses.dataclass(frozen=True)
class Target:
  """Row of `Warpgroup.d_kv` for a key."""

  key: U32
  number: U32
  further: int = 0


def targets_of(
  keys: Sequence[U32], tile: U32, slot: U32, plan: plans.Plan
) -> list[Target]:
  """Rows for this thread's keys: the keys' own, or, where `deterministic`,
  those from `slot` on, the first of this query's."""
  if not plan.deterministic:
    return [Target(key, key) for key in keys]
  first = slot + tile * plans.KEYS + lanes.even_row()
  return [Target(key, first, i) for key, i in zip(keys, _ROWS, strict=True)]


def finish(
  group: warpgroup.Warpgroup,
  columns: Sequence[Columns],
  acc: Sequence[F32],
  targets: Sequence[Target],
) -> None:
  """Adds all columns to device memory, each while the next are multiplied.

  Args:
    group: This warpgroup.
    columns: All of its columns.
    acc: Result of `start` for the first of them.
    targets: Rows for this thread's keys.
  """
  plan, place = group.plan, place_of(group.d_kv)
  for i, these in enumerate(columns):
    rest = columns[i + 1 :]
    following = start(group, rest[0]) if rest else []
    acc = wgmma.wait(1 if rest else 0, acc)
    if not rest:
      group.announce_others_free()
      if plan.is_pair:
        exchange.signal(group.signal(plans.Signal.DONE))
    width = plan.narrow if these.is_narrow else plan.wide
    block = group.rank() * (4 * width)
    add(place + block, these, acc, targets, plan)
    acc = following


def place_of(d_kv: Place) -> Place:
  """Place of this thread's 16 bytes of 128 in the first row."""
  return d_kv + (lanes.first_row().bits(0, 1) * 64 + lanes.quad() * 16)


def add(
  place: Place,
  columns: Columns,
  acc: Sequence[F32],
  targets: Sequence[Target],
  plan: plans.Plan,
) -> None:
  """Adds columns to dKV; deterministic: stores them, to rows of their own.

  Args:
    place: Result of `place_of`, moved on by the columns of this kind that
      blocks before this one have.
    columns: What the accumulator has.
    acc: Accumulator.
    targets: Rows for this thread's keys.
    plan: The kernel's.
  """
  rows = [
    LazyRow(place, plans.ROW, x.number, x.further, x.key, plan.keys)
    for x in targets
  ]
  put = LazyRow.store if plan.deterministic else LazyRow.add
  column = columns.number * columns.index + widths.C * columns.is_narrow
  _put_lines(acc, rows, 4 * column, put)


def _put_lines(acc, rows, offset, put):
  """Puts an accumulator's columns into rows, whole 128-byte lines at once.

  A thread has 4 neighbouring columns of each 16 (see `permutation`), of two
  rows, so four threads have 64 bytes. They swap with the four that have the
  next row: then each has a piece of both rows' 128 bytes.
  """
  odd = lanes.has_odd_row()
  select = lambda xs, ys: [
    odd.where_float(x, y) for x, y in zip(xs, ys, strict=True)
  ]
  for line in range(len(acc) // 16):
    for half in range(2):
      starts = [16 * line + 8 * i + 2 * half for i in range(2)]
      near, far = ([*acc[i:][:2], *acc[i + 4 :][:2]] for i in starts)
      got = [instructions.exchange(x, 4) for x in select(near, far)]
      pieces = select(got, near), select(far, got)
      for row, piece in zip(rows[2 * half :][:2], pieces, strict=True):
        put(row, piece, offset + 128 * line)
