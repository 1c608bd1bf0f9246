"""Double of `hopper.cluster`: a warpgroup of each block runs, all in step.

An array in shared memory holds that of all blocks, one after the other.
"""

import numpy as np

from tests.kernels.simulated import block
from tests.kernels.simulated import memory
from tests.kernels.simulated import threads


def rank():
  return threads.thread() // threads.WARPGROUP


def place(array):
  """First byte of each block's own part of an array."""
  first = memory.Place(array, is_shared=True)
  return first.step(rank(), _size(first))


def in_block(here, which):
  assert here.is_shared
  size = _size(here)
  own = rank().value.astype(np.int64)
  at = here.at + (which.value.astype(np.int64) - own) * size
  return memory.Place(here.array, is_shared=True, at=at)


def send(values, target, offset, barrier, where=None):
  """Stores, and counts the bytes in the barrier's first word."""
  active = block.now.active if where is None else block.now.active & where.value
  of_block = [(x.at // _size(x))[active] for x in (target, barrier)]
  np.testing.assert_array_equal(*of_block, "the barrier of another block")
  target.store(values, offset, where)
  _, at = barrier.touched(0, 4, where)
  np.add.at(barrier.array.view(np.int32), at[:, 0] // 4, 4 * len(values))


def _size(place):
  """Bytes of a block."""
  return place.array.size // (block.now.n // threads.WARPGROUP)
