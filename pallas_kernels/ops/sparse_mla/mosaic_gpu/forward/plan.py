"""Shared memory of the forward kernel, and the barriers that guard it."""

import dataclasses
import enum
from typing import Any, Final

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import cluster
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper import widths
from pallas_kernels.hopper.threads import WARP
from pallas_kernels.hopper.threads import WARPGROUP

ROWS: Final = tiles.ROWS  # keys a tile, and heads a block
STEP: Final = 2 * ROWS  # keys of both tiles
THREADS: Final = 3 * WARPGROUP  # two that multiply, and the producer
CONSUMER_WARPS: Final = 2 * WARPGROUP // WARP
COLUMNS: Final = 64  # of a column tile
COLUMN_TILES: Final = widths.CR // COLUMNS
# Bytes that lie together: eight rows of a column tile, eight rows, a tile.
BLOCK: Final = 2 * 8 * COLUMNS
EIGHT: Final = COLUMN_TILES * BLOCK
TILE: Final = ROWS // 8 * EIGHT


def blocks(work: int, steps: int) -> int:
  """Chooses how many blocks share the keys of 64 heads of a query.

  Of the numbers with which all blocks run at once, the least that leaves a
  block the fewest steps; 1 if there is none.

  Args:
    work: Times of 64 heads of a query.
    steps: Of a query, K / `STEP`.
  """
  fitting = [n for n, most in enumerate(cluster.AT_ONCE, 1) if work <= most]
  return min(fitting, key=lambda n: pl.cdiv(steps, n), default=1)


class Barrier(enum.IntEnum):
  """Barriers in shared memory: part of a tile is full, or empty again; the
  query's steps are noted; what a consumer combines has come from all blocks."""

  READY_0L = 0
  READY_0R = enum.auto()
  READY_1L = enum.auto()
  READY_1R = enum.auto()
  MASKED = enum.auto()
  FREE_0L = enum.auto()
  FREE_0R = enum.auto()
  FREE_1L = enum.auto()
  FREE_1R = enum.auto()
  COUNTED = enum.auto()
  COMBINED_0 = enum.auto()
  COMBINED_1 = enum.auto()

  def arrivals(self, converts: bool) -> int:
    """Counts arrivals at it; `converts`: the producer converts its rows."""
    if self >= Barrier.COMBINED_0:
      return 1
    if self == Barrier.COUNTED:
      return CONSUMER_WARPS
    # A thread that stores some of a part and copies the rest arrives for each.
    both = converts and self in (Barrier.READY_0R, Barrier.READY_1R)
    return 2 * WARPGROUP if both else WARPGROUP


class Meeting(enum.IntEnum):
  """Named barriers of the two consumers."""

  WEIGHTS_0 = barriers.FIRST
  WEIGHTS_1 = enum.auto()
  SUMS = enum.auto()


@dataclasses.dataclass(frozen=True)
class Part:
  """Columns of a tile that are filled, and are free again, together."""

  tile: int
  columns: range
  """Column tiles."""
  ready: Barrier
  free: Barrier


_LEFT: Final = range(4)  # half of the latents
_RIGHT: Final = range(4, COLUMN_TILES)  # the other half, and RoPE's
LEFT_0: Final = Part(0, _LEFT, Barrier.READY_0L, Barrier.FREE_0L)
RIGHT_0: Final = Part(0, _RIGHT, Barrier.READY_0R, Barrier.FREE_0R)
LEFT_1: Final = Part(1, _LEFT, Barrier.READY_1L, Barrier.FREE_1L)
RIGHT_1: Final = Part(1, _RIGHT, Barrier.READY_1R, Barrier.FREE_1R)


class Row(enum.IntEnum):
  """Rows of `Shared.rows`: of each tile's, or consumer's, numbers."""

  MASK_0 = 0  # added to logits: 0, or -inf if the key is none
  MASK_1 = enum.auto()
  TOP_0 = enum.auto()  # maximum that weights refer to
  TOP_1 = enum.auto()
  SUM_0 = enum.auto()  # of weights
  SUM_1 = enum.auto()
  LAST = enum.auto()  # each consumer warp's place after the last valid index
  BARRIERS = enum.auto()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
  """Shared memory of a block."""

  q: Any
  """[9, 64, 64]: 64 heads, by column tiles; at the end, their output."""
  kv: Any
  """[2, 64, C+R]: both tiles of keys."""
  weights_1: Any
  """[64, 64]: weights of tile 1."""
  rows: Any
  """[8, 64]: see `Row`; one array, since each begins a kilobyte of its own."""
  q_here: Any

  @classmethod
  def types(cls) -> Any:
    """The same, of what Pallas allocates."""
    return cls(
      q=tiles.shared((COLUMN_TILES, ROWS, COLUMNS)),
      kv=tiles.shared((2, ROWS, widths.CR)),
      weights_1=tiles.shared((ROWS, ROWS)),
      rows=plgpu.SMEM((len(Row), ROWS), jnp.float32),
      q_here=plgpu.Barrier(num_arrivals=COLUMN_TILES),
    )

  @property
  def weights_0(self) -> Any:
    """[64, 64]: weights of tile 0, in place of its RoPE part, which its logits
    have used."""
    return self.kv.at[0, :, pl.ds(widths.C, ROWS)]

  @property
  def barriers(self) -> barriers.Barriers:
    return barriers.Barriers(self.rows.at[Row.BARRIERS])

  def load(self, row: int, layout: Any = tiles.BY_ROW) -> Float[Array, "64"]:
    """Loads a `Row` into a layout."""
    return plgpu.load(self.rows.at[row], layout=layout)

  def start(self, converts: bool) -> None:
    """Initialises the barriers, as `Barrier.arrivals` counts; each thread of
    the block calls it."""
    self.barriers.start([barrier.arrivals(converts) for barrier in Barrier])
