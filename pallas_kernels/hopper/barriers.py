"""Barriers of a kernel that Pallas does not have; whole warpgroups call them.

Named barriers cost less than those in shared memory. Threads that copy rows
arrive individually, which Pallas's barriers do not support: `Barriers`.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, Final

from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.hopper import signals
from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import WARP
from pallas_kernels.hopper.threads import WARPGROUP

# Named barriers of a kernel begin here: Pallas uses the ones before.
FIRST: Final = 8
BYTES: Final = 8  # of a barrier in shared memory


def meet(barrier: int, warpgroups: int = 2) -> None:
  """Waits at a named barrier until all warpgroups have come or signalled."""
  threads.code()(lambda: signals.meet(barrier, warpgroups * WARPGROUP))()


def announce(barrier: int, warpgroups: int = 2) -> None:
  """Signals at a named barrier of `meet`, without waiting."""
  threads.code()(lambda: signals.announce(barrier, warpgroups * WARPGROUP))()


def fence_async() -> None:
  """Makes each thread's own stores visible to the tensor cores and TMA."""
  threads.code()(signals.fence_async)()


def start(first: Place, arrivals: Sequence[int]) -> None:
  """Initialises barriers, by a warpgroup's warps in turn.

  One after the other they would take 0.3 us for ten.

  Args:
    first: Place of the first one.
    arrivals: As `Barriers.start` gets them.
  """
  thread = threads.thread()
  for i, number in enumerate(arrivals):
    starter = WARP * i % WARPGROUP
    signals.start(first + BYTES * i, number, thread.equals(starter))


@dataclasses.dataclass(frozen=True)
class Barriers:
  """Array of barriers in shared memory, at which single threads arrive."""

  ref: Any
  """Words in shared memory, int32 or float32, two for each barrier."""

  def start(self, arrivals: Sequence[int]) -> None:
    """Initialises them; every thread of the block calls it once.

    Args:
      arrivals: Threads whose arrival completes a phase, for each barrier.
    """

    @threads.code(threads.REF)
    def emit(ref):
      start(Place.of(ref), arrivals)
      signals.open_all()

    emit(self.ref)

  def wait(self, which: int, parity: Int[Array, ""]) -> None:
    """Waits, in every thread, for the phase of this parity."""

    @threads.code(threads.REF, threads.NUMBER)
    def emit(ref, parity):
      signals.wait(Place.of(ref) + BYTES * which, parity)

    emit(self.ref, parity)

  def arrive(self, which: int) -> None:
    """Arrives in every thread: 128 arrivals."""

    @threads.code(threads.REF)
    def emit(ref):
      signals.arrive(Place.of(ref) + BYTES * which)

    emit(self.ref)


@dataclasses.dataclass(frozen=True)
class PingPong:
  """Turns of two warpgroups: one multiplies while the other reduces."""

  warpgroup: Int[Array, ""]
  """This one, 0 or 1."""

  def start(self) -> None:
    """Gives the first turn to warpgroup 0; both call it."""
    pl.when(self.warpgroup == 1)(lambda: _turn("arrive", 0))

  def wait(self) -> None:
    """Waits for this warpgroup's turn."""
    _turn("sync", self.warpgroup)

  def signal(self) -> None:
    """Gives the turn to the other warpgroup, without waiting."""
    _turn("arrive", 1 - self.warpgroup)


def _turn(action, warpgroup):
  @threads.code(threads.NUMBER)
  def emit(barrier):
    text = f"bar.{action} $0, {2 * WARPGROUP};"
    threads.assembly(text, [barrier.value])

  emit(jnp.asarray(warpgroup + FIRST, jnp.int32))
