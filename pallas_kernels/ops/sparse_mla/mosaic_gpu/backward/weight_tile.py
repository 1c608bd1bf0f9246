"""P^T or dS^T in shared memory: [64 keys, 64 heads], bfloat16, swizzled.

A thread has its rows' pairs of columns 8 j + 2 quad, in the order of an
accumulator.
"""

from collections.abc import Sequence

from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import signals
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import lanes
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans


def _place(tile: Place) -> Place:
  """Place of this thread's first pair; that of column 8 j is xor 16 j."""
  row, quad = lanes.first_row(), lanes.quad()
  return tile + (row * 128 + row.bits(0, 3) * 16 + quad * 4)


def store(tile: Place, packed: Sequence[U32]) -> None:
  """Stores this thread's pairs, for tensor cores and bulk copies too."""
  place = _place(tile)
  for i, pair in enumerate(packed):
    place.store([pair], 1024 * (i % 2), turn=16 * (i // 2))
  signals.fence_async()


def multiply(tile: Place, factors: Sequence[F32]) -> list[U32]:
  """Multiplies this thread's numbers of the tile by factors; packs them."""
  place = _place(tile)
  packed = []
  for i in range(plans.HEADS // 4):
    [pair] = place.load_words(1, 1024 * (i % 2), turn=16 * (i // 2))
    low, high = instructions.unpack(pair)
    packed.append(
      instructions.pack(low * factors[2 * i], high * factors[2 * i + 1])
    )
  return packed
