"""Ring buffer of a block: one warpgroup fills its slots, two others read them.

The buffer itself is any number of arrays in shared memory, whose first
dimension is that of slots. Step i of a loop uses slot i modulo their number.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int


def divide_work(
  wg: Int[Array, ""], fill: Callable[[], None], read: Callable[[], None]
) -> None:
  """Runs `fill` in warpgroup 2 and `read`, with most registers, in 0 and 1."""

  @pl.when(wg == 2)
  def _():
    plgpu.set_max_registers(40, action="decrease")
    fill()

  @pl.when(wg < 2)
  def _():
    plgpu.set_max_registers(232, action="increase")
    read()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
  """What those who fill the slots and those who read them tell each other.

  Attributes:
    full: Barriers of slots, at which copies to them arrive.
    free: Barriers of slots, at which their readers arrive.
    slots: Number of slots.
    in_cluster: Whether some copies go to both blocks of a cluster; a slot is
      free when it is free in both.
  """

  full: Any
  free: Any
  slots: int = dataclasses.field(metadata={"static": True})
  in_cluster: bool = dataclasses.field(metadata={"static": True})

  @classmethod
  def types(
    cls, slots: int, copies: int, *, in_cluster: bool = False
  ) -> "Ring":
    """Types of the barriers, for so many copies to a slot."""
    numbers = dict(num_arrivals=2, num_barriers=slots)
    if in_cluster:
      free = plgpu.ClusterBarrier(collective_axes=("cluster",), **numbers)
    else:
      free = plgpu.Barrier(**numbers)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
    return cls(full, free, slots, in_cluster)

  def slot(self, step: Int[Array, ""]) -> Int[Array, ""]:
    return lax.rem(step, self.slots)

  def fill(
    self,
    steps: int | Int[Array, ""],
    start_copies: Callable[[Int[Array, ""], Int[Array, ""]], None],
  ) -> None:
    """Calls `start_copies(step, slot)` for each step, once its slot is free."""

    def step(i, _):
      slot = self.slot(i)
      pl.when(i >= self.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))
      if self.in_cluster:
        pl.when(i < steps)(lambda: start_copies(i, slot))
      else:
        start_copies(i, slot)

    # A block stays until the other has sent its last signal.
    rest = self.slots if self.in_cluster else 0
    lax.fori_loop(0, steps + rest, step, None)

  def wait(self, slot: Int[Array, ""]) -> None:
    """Waits, as a reader, until the slot is full."""
    plgpu.barrier_wait(self.full.at[slot])

  def release(self, slot: Int[Array, ""]) -> None:
    """Signals that this reader no longer needs the slot."""
    plgpu.barrier_arrive(self.free.at[slot])
