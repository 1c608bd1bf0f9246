"""Sizes of the backward kernel, and the barriers of its threads."""

import dataclasses
import enum
from typing import Final

from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import widths

HEADS: Final = 64  # heads per tile of weights
MOST_HEADS: Final = 2 * HEADS  # of a launch
KEYS: Final = 64  # keys per tile
ROW: Final = 4 * widths.CR  # bytes of a row of dKV
TILE_BYTES: Final = 2 * KEYS * HEADS  # of weights
# Registers of a thread that multiplies, and of one that gathers: no more than
# a block of 384 threads starts with, 168 each.
MULTIPLY_REGISTERS, GATHER_REGISTERS = 240, 24


class Meeting(enum.IntEnum):
  """Named barriers of the two warpgroups that multiply, and of each alone."""

  P_FULL = barriers.FIRST  # P^T is in shared memory
  DS_FULL = enum.auto()  # dS^T is
  P_FREE = enum.auto()  # P^T is no longer read
  DS_FREE = enum.auto()  # dS^T is not
  ALONE_0 = enum.auto()
  ALONE_1 = enum.auto()


class Signal(enum.Enum):
  """Barriers in shared memory: index, and the threads that arrive.

  The last six are of clusters.
  """

  # By those that gather: keys and their indices are there.
  FULL = 0, 128
  # By one of each warp that multiplies: they are no longer read.
  FREE = 1, 8
  # By one that expects bytes of the other block: its part of S^T or dP^T, P^T
  # or dS^T.
  S_HERE = 2, 1
  DP_HERE = 3, 1
  P_HERE = 4, 1
  DS_HERE = 5, 1
  # By one of each of the other block's warps: it no longer reads P^T and dS^T,
  # or has read dP^T.
  DONE = 6, 8
  READ = 7, 4

  @property
  def index(self) -> int:
    return self.value[0]

  @property
  def arrivals(self) -> int:
    return self.value[1]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Parameters known when the kernel is compiled."""

  heads: int
  """Multiple of 64, at most 128."""
  keys: int
  """S."""
  tiles: int
  """K / 64."""
  queries: int
  """Of one batch row."""
  scale: float
  deterministic: bool

  @property
  def blocks(self) -> int:
    """Blocks of a query: 1, or the 2 of a cluster."""
    return self.heads // HEADS

  @property
  def is_pair(self) -> bool:
    return self.blocks == 2

  @property
  def wide(self) -> int:
    """Columns of a block without RoPE."""
    return widths.C // self.blocks

  @property
  def narrow(self) -> int:
    """Rotated columns of a block."""
    return widths.R // self.blocks

  # From 8 rows of an array in shared memory to the next 8, in bytes.

  @property
  def wide_eight(self) -> int:
    return self.wide // 64 * 1024

  @property
  def narrow_eight(self) -> int:
    return self.narrow // 32 * 512
