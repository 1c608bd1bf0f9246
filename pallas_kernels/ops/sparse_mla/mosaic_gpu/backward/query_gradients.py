"""Gradients dQ of a query's heads, in registers until all tiles are added.

Alone, a warpgroup has half of the columns of all heads; in a cluster, all of
the block's columns of 64 heads.
"""

from collections.abc import Sequence
from typing import Final

from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import wgmma
from pallas_kernels.hopper import widths
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import lanes
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import warpgroup

_WIDE, _NARROW = widths.C // 2, widths.R // 2  # columns of a warpgroup
_WIDE_REGISTERS: Final = _WIDE // 2


def zeros() -> list[F32]:
  """Zero accumulator: of columns without RoPE, then of rotated ones."""
  return [*wgmma.zeros(_WIDE), *wgmma.zeros(_NARROW)]


def start(group: warpgroup.Warpgroup, d_q: Sequence[F32]) -> list[F32]:
  """Starts d_q += dS K for this tile."""
  operands, is_pair = group.operands, group.plan.is_pair
  wide = wgmma.fence(d_q[:_WIDE_REGISTERS])
  narrow = wgmma.fence(d_q[_WIDE_REGISTERS:])
  gradients = operands.ds.along_rows(half=group.which if is_pair else 0)
  part = 0 if is_pair else group.which
  keys = operands.kv_wide.along_rows(_WIDE // 64 * part)
  wide = wgmma.multiply(wide, gradients, keys, 4)
  keys = operands.kv_narrow.along_rows(_NARROW // 32 * part)
  narrow = wgmma.multiply(narrow, gradients, keys, 4)
  wgmma.commit()
  return [*wide, *narrow]


def store(
  target: Place, d_q: Sequence[F32], which: int, rank: U32, plan: plans.Plan
) -> None:
  """Stores a warpgroup's part.

  Args:
    target: [heads, C+R] in device memory, bfloat16.
    d_q: Accumulator.
    which: The warpgroup, 0 or 1.
    rank: Of the block in its cluster.
    plan: The kernel's.
  """
  row, part = lanes.first_row(), U32(which)
  if plan.is_pair:
    row, part = row + (rank ^ which) * plans.HEADS, rank
  place = target + (row * (2 * widths.CR) + lanes.quad() * 8)
  wide, narrow = part * (2 * _WIDE), part * (2 * _NARROW) + 2 * widths.C
  _store_columns(place + wide, d_q[:_WIDE_REGISTERS])
  _store_columns(place + narrow, d_q[_WIDE_REGISTERS:])


def _store_columns(place: Place, acc: Sequence[F32]) -> None:
  """Stores this thread's numbers, four neighbours of each 16: `permutation`.

  Args:
    place: Of the first four, in the thread's first row.
    acc: Accumulator of neighbouring columns.
  """
  for i in range(0, len(acc), 8):
    for half in range(2):
      pairs = [acc[i + j :][:2] for j in (2 * half, 4 + 2 * half)]
      four = [instructions.pack(*x) for x in pairs]
      place.store(four, 4 * i + half * 8 * 2 * widths.CR)
