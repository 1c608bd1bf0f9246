"""Runs on a CPU what a kernel's threads do: doubles of `hopper`, in numpy.

They have the names of its modules and are computed at once for all threads of
one block, of one warpgroup, or of one warpgroup of each block of a cluster.
"""

from typing import Any
from unittest import mock

from tests.kernels.simulated import block
from tests.kernels.simulated import cluster
from tests.kernels.simulated import copies
from tests.kernels.simulated import instructions
from tests.kernels.simulated import memory
from tests.kernels.simulated import signals
from tests.kernels.simulated import threads

_DOUBLES: dict[str, Any] = {
  "cluster": cluster,
  "copies": copies,
  "instructions": instructions,
  "signals": signals,
  "threads": threads,
  "Bool": threads.Bool,
  "F32": threads.F32,
  "U32": threads.U32,
  "LazyRow": memory.LazyRow,
  "Memory": memory.Memory,
  "Place": memory.Place,
}


def run_as(n: int, module: Any):
  """Patches a module that uses threads: its code runs as one block of n."""
  block.now = block.Block(n)
  doubles = {name: x for name, x in _DOUBLES.items() if hasattr(module, name)}
  return mock.patch.multiple(module, **doubles)
