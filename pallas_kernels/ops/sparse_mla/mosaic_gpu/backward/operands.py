"""Arrays in shared memory as operands of products."""

import dataclasses

from pallas_kernels.hopper import wgmma
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import shared_memory


@dataclasses.dataclass(frozen=True)
class Matrix:
  """Matrix in shared memory: `tiles.SWIZZLED` or `tiles.NARROW`."""

  start: U32
  """Result of `wgmma.start_of`."""
  eight: int
  """Bytes from 8 rows to the next 8."""
  swizzle: int = 128
  """Bytes of a row of a tile."""

  def along_columns(self, column: int = 0, half: int = 0) -> wgmma.Operand:
    """A [rows, columns] or B [columns, rows]; contracted over columns.

    Args:
      column: First tile of columns, of 64 (narrow: 32).
      half: First row, in units of 64.
    """
    return wgmma.Operand(
      self.start,
      offset=column * 8 * self.swizzle + half * 8 * self.eight,
      leading=0,
      stride=self.eight,
      swizzle=self.swizzle,
      step=32,
    )

  def along_rows(self, column: int = 0, half: int = 0) -> wgmma.Operand:
    """A [columns, rows] or B [rows, columns]; contracted over rows."""
    return dataclasses.replace(
      self.along_columns(column, half),
      leading=8 * self.swizzle,
      step=2 * self.eight,
      transposed=True,
    )


@dataclasses.dataclass(frozen=True)
class Operands:
  """Those arrays of `SharedMemory` that are multiplied."""

  q_wide: Matrix
  q_narrow: Matrix
  do_wide: Matrix
  kv_wide: Matrix
  kv_narrow: Matrix
  p: Matrix
  ds: Matrix

  @classmethod
  def of(
    cls, memory: shared_memory.SharedMemory, plan: plans.Plan
  ) -> "Operands":
    def matrix(place: Place, *sizes: int) -> Matrix:
      return Matrix(wgmma.start_of(place), *sizes)

    return cls(
      q_wide=matrix(memory.q_wide, plan.wide_eight),
      q_narrow=matrix(memory.q_narrow, plan.narrow_eight, 64),
      do_wide=matrix(memory.do_wide, plan.wide_eight),
      kv_wide=matrix(memory.kv_wide, plan.wide_eight),
      kv_narrow=matrix(memory.kv_narrow, plan.narrow_eight, 64),
      p=matrix(memory.p, 2 * 8 * plans.HEADS),
      ds=matrix(memory.ds, 2 * 8 * plans.HEADS),
    )
