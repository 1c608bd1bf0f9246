"""Gathers the selected rows, tile by tile, into shared memory."""

from pallas_kernels.hopper import copies
from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import rows as rows_lib
from pallas_kernels.hopper import signals
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import widths
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import shared_memory

_STEP = 16  # rows that the warpgroup copies at once, eight threads a row


def gather(
  kv: Place,
  indices: Place,
  memory: shared_memory.SharedMemory,
  tiles: U32,
  rank: U32,
  plan: plans.Plan,
) -> None:
  """Runs the warpgroup that gathers; a key out of range becomes zeros.

  Each thread copies one 16-byte piece of every 128 bytes of a row.

  Args:
    kv: [S, C+R] in device memory, bfloat16.
    indices: [K] in device memory.
    memory: Places of the block's arrays.
    tiles: Tiles to gather, at least 1.
    rank: Of the block in its cluster.
    plan: The kernel's.
  """
  thread = instructions.thread()
  group, piece = thread.bits(3, 4), thread.bits(0, 3)
  wide = rows_lib.swizzled(memory.kv_wide, group, piece, plan.wide_eight)
  narrow = _narrow_place(memory.kv_narrow, group, piece, plan.narrow_eight)
  in_narrow = piece < plan.narrow // 8
  source = kv + (piece * 16 + rank * (2 * plan.wide))
  # From this block's first column to its first rotated one.
  rotated = 2 * widths.C - rank * (2 * (plan.wide - plan.narrow))
  copies_indices = thread < plans.KEYS * 4 // copies.BYTES
  full = memory.signal(plans.Signal.FULL)
  free = memory.signal(plans.Signal.FREE)

  def load_indices(tile):
    at = indices + group * 4 + tile * (4 * plans.KEYS)
    return [at.load_constant(4 * _STEP * i) for i in range(plans.KEYS // _STEP)]

  def step(tile, *rows):
    # After the last tile, the last one again.
    next_rows = load_indices((tile + 1).min(tiles - 1))
    signals.wait(free, (tile + 1) & 1)
    for i, row in enumerate(rows):
      valid = row < plan.keys
      size = valid.where(copies.BYTES, 0)
      at = source.step(valid.where(row, 0), 2 * widths.CR)
      for column in range(plan.wide // 64):
        to = 2 * i * plan.wide_eight + 1024 * column
        copies.start(wide, at, size, prefetch=256, to=to, at=128 * column)
      to = 2 * i * plan.narrow_eight
      copies.start(narrow, at + rotated, size, to=to, where=in_narrow)
    at = indices + thread * 16 + tile * (4 * plans.KEYS)
    copies.start(memory.indices + thread * 16, at, where=copies_indices)
    copies.wait_all()
    signals.fence_async()
    signals.arrive(full)
    return next_rows

  threads.loop(tiles, step, load_indices(U32(0)))


def _narrow_place(tile: Place, row: U32, piece: U32, eight: int) -> Place:
  """Place of a 16-byte piece of a row in a tile of `tiles.NARROW`."""
  of_eight = row & 7
  turned = piece.bits(0, 2) ^ of_eight.bits(1, 2)
  offset = (row >> 3) * eight + piece.bits(2, 1) * 512
  return tile + (offset + of_eight * 64 + turned * 16)
