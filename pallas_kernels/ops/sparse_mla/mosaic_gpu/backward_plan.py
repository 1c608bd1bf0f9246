"""Constants and layout shared by the threads of the backward kernel."""

import dataclasses
import math

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ops.sparse_mla.mosaic_gpu import instructions as gpu

HEADS = 64  # heads per tile of weights
KEYS = 64  # keys per tile
C, R = 512, 64
D = C + R
ROW = 4 * D  # bytes of a row of dKV
LOG2E = math.log2(math.e)
# Registers of a thread that multiplies, and of one that gathers: no more than
# a block of 384 threads starts with, 168 each.
MULTIPLY_REGISTERS, GATHER_REGISTERS = 240, 24
# Named barriers; Pallas takes the first ones.
P_FULL, DS_FULL, P_FREE, DS_FREE, ALONE = 10, 11, 12, 13, 14
BOTH = 256  # threads of the two warpgroups that multiply

# Barriers in shared memory, and who arrives: 128 threads that gather, or one of
# each warp that multiplies, or one that expects bytes.
FULL, FREE, S_HERE, DP_HERE, P_HERE, DS_HERE, DONE, READ = range(8)
ARRIVALS = (128, 8, 1, 1, 1, 1, 8, 4)
TILE_BYTES = 2 * KEYS * HEADS  # of weights

# Rows of 64 values in eights of 128-byte swizzle, of 32 in eights of 64-byte.
WIDE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
NARROW = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))


@dataclasses.dataclass(frozen=True)
class Plan:
  """Parameters known when the kernel is compiled."""

  blocks: int  # per query: 1, or the 2 of a cluster
  keys: int  # S
  tiles: int  # K / 64
  queries: int  # of one batch row
  scale: float
  deterministic: bool

  @property
  def wide(self) -> int:
    """Columns of a block without RoPE."""
    return C // self.blocks

  @property
  def narrow(self) -> int:
    return R // self.blocks

  def eights(self, name: str) -> int:
    """Bytes from 8 rows of an array in shared memory to the next 8."""
    if "wide" in name:
      return self.wide // 64 * 1024
    return self.narrow // 32 * 512 if "narrow" in name else 1024


def barrier(index_tile, which):
  """Address of a barrier; barriers are stored behind the indices."""
  return gpu.add(gpu.address(index_tile), 4 * KEYS + 8 * which)


def start_barriers(index_tile, plan):
  first = gpu.number(gpu.is_equal(utils.thread_idx(), 0))
  for which, arrivals in enumerate(ARRIVALS):
    gpu.start_barrier(barrier(index_tile, which), arrivals, first)
  gpu.emit("fence.mbarrier_init.release.cluster; bar.sync 0;")
  if plan.blocks == 2:
    gpu.meet_cluster()


def rank(plan):
  return gpu.rank() if plan.blocks == 2 else gpu.integer(0)


def first_row():
  """First of this thread's two rows of an accumulator, 8 apart."""
  thread = gpu.thread()
  return gpu.add(gpu.times(gpu.bits(thread, 5, 2), 16), gpu.bits(thread, 2, 3))


def quad():
  """Index of this thread among the four that share its rows."""
  return gpu.bits(gpu.thread(), 0, 2)
