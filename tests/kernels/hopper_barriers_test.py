"""Barriers in shared memory are initialised, as simulated in numpy."""

from unittest import mock

import numpy as np
import pytest

from pallas_kernels.hopper import barriers
from tests.kernels import simulated
from tests.kernels.simulated import memory
from tests.kernels.simulated import threads


@pytest.mark.parametrize("arrivals", [[5], [7, 7, 1], [1, 128, 8] * 3])
def test_each_barrier_gets_its_number_of_arrivals(arrivals):
  words = np.zeros((9, 2), np.uint32)

  class Signals:
    def start(self, barrier, number, where):
      barrier.store([threads.U32(number)], where=where)

  with (
    simulated.run_as(256, barriers),
    mock.patch.object(barriers, "signals", Signals()),
  ):
    barriers.start(memory.Place(words, is_shared=True), arrivals)
  np.testing.assert_array_equal(words[: len(arrivals), 0], arrivals)
  assert not words[len(arrivals) :].any() and not words[:, 1].any()
