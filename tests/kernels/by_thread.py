"""Matrices as the registers of a warpgroup's threads: `hopper.fragments`."""

import numpy as np

from tests.kernels.simulated import threads


def registers(*matrices):
  """Numbers of each thread of a warpgroup in a matrix [64, columns], in the
  order of `hopper.fragments`; or of several, with a matrix each."""
  warpgroups = [_by_thread(matrix) for matrix in matrices]
  return [threads.F32(x) for x in np.concatenate(warpgroups, 1)]


def words(matrix):
  """Registers of each thread in a matrix of 16-bit numbers, likewise."""
  numbers = _by_thread(matrix.view(np.uint16)).astype(np.uint32)
  pairs = zip(numbers[::2], numbers[1::2], strict=True)
  return [threads.U32(low | high << 16) for low, high in pairs]


def _by_thread(matrix):
  eights = matrix.reshape(4, 2, 8, -1, 4, 2)  # warp, half, r, eight, c, column
  return eights.transpose(3, 1, 5, 0, 2, 4).reshape(-1, threads.WARPGROUP)


def matrix(numbers, dtype):
  """Matrix [64, columns] of each thread's registers: undoes the above."""
  by_thread = np.stack([x.value for x in numbers], 1).view(dtype).T
  eights = by_thread.reshape(-1, 2, 2, 4, 8, 4)
  return eights.transpose(3, 1, 4, 0, 5, 2).reshape(64, -1)


def pairs(numbers):
  """Registers of each thread that hold its numbers as bfloat16."""
  return [x.pack(y) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def by_row(numbers):
  """Numbers of each thread in a row's number for each of 64 rows."""
  return registers(np.repeat(numbers[:, None], 8, 1))[::2]


def by_column(numbers):
  """Numbers of each thread in a column's number for each column."""
  every = registers(np.tile(numbers, (64, 1)))
  return [x for i in range(0, len(every), 4) for x in every[i : i + 2]]
