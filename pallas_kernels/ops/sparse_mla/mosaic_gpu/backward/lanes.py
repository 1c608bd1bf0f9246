"""A thread's place in its warpgroup's products, computed anew at each use.

It has two rows of an accumulator, 8 apart, and shares them with three others.
"""

from pallas_kernels.hopper import instructions
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import U32


def first_row() -> U32:
  """First of this thread's two rows."""
  thread = instructions.thread()
  return thread.bits(5, 2) * 16 + thread.bits(2, 3)


def even_row() -> U32:
  """First of its rows, or the one before: the even one of the two."""
  return first_row() & ~1


def has_odd_row() -> Bool:
  return first_row().bits(0, 1).equals(1)


def quad() -> U32:
  """Index of this thread among the four that share its rows."""
  return instructions.thread().bits(0, 2)


def leads() -> Bool:
  """Whether it is the warpgroup's first thread."""
  return instructions.thread().equals(0)


def leads_warp() -> Bool:
  return instructions.thread().bits(0, 5).equals(0)
