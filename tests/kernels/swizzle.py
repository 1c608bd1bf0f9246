"""Matrices in shared memory as tensor cores read them, in numpy."""

import numpy as np


def matrix(tile: np.ndarray, columns: int, atom: int = 128) -> np.ndarray:
  """Undoes the layout of a tile.

  Args:
    tile: 16-bit numbers as they lie in memory.
    columns: Columns of the matrix.
    atom: Bytes of a row that are swizzled together, 128 or 64: each piece of
      16 bytes stands at its index xor the row's, modulo 8, or the row's half,
      modulo 4.
  """
  pieces = atom // 16
  eights = tile.reshape(-1, 2 * columns // atom, 8, pieces, 8)
  row = np.arange(8)[:, None] // (8 // pieces)
  order = (np.arange(pieces)[None] ^ row)[..., None]
  order = np.broadcast_to(order, eights.shape)
  whole = np.take_along_axis(eights, order, axis=3)
  return whole.swapaxes(1, 2).reshape(-1, columns)
