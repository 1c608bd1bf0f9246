"""Barriers as single threads use them: named ones, and those in shared memory.

A named barrier is one of the 16 that every block has; a barrier in shared
memory (PTX: mbarrier) has 8 bytes, and its phases alternate in parity.
"""

from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import U32


def meet(barrier: int, number: int) -> None:
  """Waits at a named barrier until `number` threads have come or signalled."""
  threads.assembly(f"bar.sync {barrier}, {number};", convergent=True)


def announce(barrier: int, number: int) -> None:
  """Signals at a named barrier of `number` threads, without waiting."""
  threads.assembly(f"bar.arrive {barrier}, {number};", convergent=True)


def meet_warp() -> None:
  """Synchronises the threads of a warp."""
  threads.assembly("bar.warp.sync 0xffffffff;", convergent=True)


def start(barrier: Place, arrivals: int, where: Bool) -> None:
  """Initialises a barrier; `open_all` must follow before it is used."""
  text = f"@$1 mbarrier.init.shared::cta.b64 [$0], {arrivals};"
  threads.assembly(text, [barrier.value, where.value])


def open_all() -> None:
  """Publishes initialised barriers to all threads; each thread calls it."""
  threads.assembly("fence.mbarrier_init.release.cluster; bar.sync 0;")


def arrive(barrier: Place, where: Bool | None = None) -> None:
  """Arrives at a barrier, once per thread."""
  _at(barrier, "mbarrier.arrive.shared::cta.b64 _, [$0];", where)


def arrive_after_copies(barrier: Place) -> None:
  """Arrives as soon as this thread's copies so far are complete."""
  _at(barrier, "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", None)


def expect(barrier: Place, size: U32 | int, where: Bool) -> None:
  """Arrives, and expects `size` bytes before the phase completes."""
  text = "@$2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
  args = [barrier.value, U32(size).value, where.value]
  threads.assembly(text, args)


def _at(barrier, text, where):
  args = [barrier.value]
  if where is not None:
    text, args = f"@$1 {text}", [*args, where.value]
  threads.assembly(text, args)


def wait(barrier: Place, parity: U32) -> None:
  """Waits for the phase of this parity."""
  threads.assembly(
    "{ .reg .pred done; again${:uid}: "
    "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; "
    "@!done bra again${:uid}; }",
    [barrier.value, parity.value],
  )


def fence_async() -> None:
  """Makes this thread's stores visible to tensor cores and bulk copies.

  Waits for all its pending operations, additions to device memory included.
  """
  threads.assembly("fence.proxy.async.shared::cta;")
