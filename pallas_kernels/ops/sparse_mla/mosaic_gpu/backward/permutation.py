"""Order of columns in which a thread's numbers of a product are neighbours.

In an accumulator a thread has columns 0, 1 and 8, 9 of 16, or 2, 3 and 10, 11,
and so on. In this order they are four neighbours of the array, which are added
to device memory at once. The rows of Q, dO and K all have it.
"""

from jaxtyping import Array, Shaped

from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import U32


def permuted(
  x: Shaped[Array, "*rows columns"],
) -> Shaped[Array, "*rows columns"]:
  """Permutes the last dimension, each 16 columns of it, into this order."""
  fours = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 4, 2, 2)
  return fours.swapaxes(-3, -2).reshape(x.shape)


def permute(
  array: Place, rows: int, columns: int, *, eight: int, swizzle: int = 128
) -> None:
  """Permutes a warpgroup's array in shared memory, rows [rows, columns].

  Several threads share a row; each has a part of whole tiles.

  Args:
    array: `tiles.SWIZZLED` or `tiles.NARROW`, bfloat16.
    rows: At most 128.
    columns: Of the array.
    eight: Bytes from 8 rows to the next 8.
    swizzle: Bytes of a row of a tile: 128, or 64.
  """
  threads_a_row = threads.WARPGROUP // rows
  thread = instructions.thread()
  row, share = thread // threads_a_row, thread % threads_a_row
  columns //= threads_a_row
  row8 = row.bits(0, 3)
  start = (
    array
    + (row >> 3) * eight
    + row8 * swizzle
    + share * (8 * 2 * columns)  # eight rows of these columns
    + _turn(row8, swizzle) * 16
  )
  for i in range(columns // 16):
    tile, byte = divmod(32 * i, swizzle)
    offset = tile * 8 * swizzle
    near = start.load_words(4, offset, turn=byte)
    far = start.load_words(4, offset, turn=byte ^ 16)
    start.store([*near[::2], *far[::2]], offset, turn=byte)
    start.store([*near[1::2], *far[1::2]], offset, turn=byte ^ 16)


def _turn(row8: U32, swizzle: int) -> U32:
  return row8 if swizzle == 128 else row8.bits(1, 2)
