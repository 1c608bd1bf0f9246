"""Counts of how often the blocks of a TPU kernel's schedule are issued.

The compiler's schedule gives the cost of a loop iteration, but not the number
of iterations, which depends on data. Each kernel's loops are counted beside
it, in `ops/<op>/mosaic_tpu/counts.py`, in the order of its source.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from pallas_kernels import shapes
from pallas_kernels.cases import data
from pallas_kernels.cases import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """Counts of one call, over all cores."""

  steps: int
  """Steps of the grid."""
  ends: int
  """Runs of the prologue or epilogue of a loop over keys: branches without a
  loop or a product."""
  blocks: tuple[int, ...]
  """Iterations of the loops, and runs of the other branches, in order.

  The grid's loop, branches that are a whole step, loops with constant bounds,
  and anything in a block that never runs are left out.
  """
  bytes: int
  """Bytes copied from and to HBM."""


# Called with a call's parameters and the tiles in the kernel's name, in order.
type Count = Callable[..., Counts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """Parameters of the counts."""

  shape: shapes.Shape
  visible: setting.Visible
  union: float | None
  """Keys that a block of neighbouring queries reads, over K; None: they have
  none in common."""
  cores: int = 1
  """Cores of the device."""


def spans(call: Call, rows: int, keys: int) -> tuple[int, int]:
  """Tiles of rows x keys that some query sees, and that all see in full."""
  start, end = (np.asarray(x)[0] for x in data.ranges(call.shape, call.visible))
  seen = whole = 0
  for first in range(0, len(start), rows):
    s, e = start[first : first + rows], end[first : first + rows]
    s, e = s[s < e], e[s < e]
    if len(s):
      seen += -(-int(e.max()) // keys) - int(s.min()) // keys
      whole += max(int(e.min()) // keys - -(-int(s.max()) // keys), 0)
  return seen, whole


def reads(call: Call, bQ: int, bK: int) -> tuple[int, int, int]:
  """Tiles of selected rows: all, those of unions, those of single queries."""
  K, nQ = call.shape.K, -(-call.shape.T // bQ)
  if call.union is None:
    tiles = nQ * bQ * -(-K // bK)
    return tiles, 0, tiles
  tiles = nQ * -(-round(call.union * K) // bK)
  return tiles, tiles, 0


def row_bytes(D: int) -> int:
  """Bytes of a selected row of keys, bf16, as it is copied."""
  return 512 * -(-D // 256)
