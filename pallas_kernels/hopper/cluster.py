"""What passes between the blocks of a cluster, by single threads."""

from collections.abc import Sequence
from typing import Final

from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32

# How many clusters of 1 to 8 blocks, a block a multiprocessor, run at once: by
# cudaOccupancyMaxActiveClusters on an H200. A device with fewer multiprocessors
# to a part that a cluster may span runs some of them later.
AT_ONCE: Final = (132, 66, 39, 30, 22, 17, 15, 15)


def rank() -> U32:
  """Index of this block in its cluster."""
  text = "mov.u32 $0, %cluster_ctarank;"
  return U32(*threads.assembly(text, results=[threads.i32()]))


def there(here: Place) -> Place:
  """Same place in the other block's shared memory, of two."""
  return in_block(here, rank() ^ 1)


def in_block(here: Place, which: U32) -> Place:
  """Same place in the shared memory of the block of this rank."""
  return here.in_block(which)


def arrive(barrier: Place, where: Bool) -> None:
  """Arrives at another block's barrier, without publishing stores to it."""
  text = "@$1 mbarrier.arrive.shared::cluster.b64 _, [$0];"
  threads.assembly(text, [barrier.value, where.value])


def send(
  values: Sequence[F32],
  target: Place,
  offset: int,
  barrier: Place,
  where: Bool | None = None,
) -> None:
  """Stores four floats in another block; its barrier counts the bytes."""
  text = (
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
    f"[$0+{offset}], {{$1, $2, $3, $4}}, [$5];"
  )
  args = [target.value, *(x.value for x in values), barrier.value]
  if where is not None:
    text, args = f"@$6 {text}", [*args, where.value]
  threads.assembly(text, args)


def send_bytes(
  source: Place, target: Place, size: int, barrier: Place, where: Bool
) -> None:
  """Copies `size` bytes to another block; its barrier counts them."""
  threads.assembly(
    "@$3 cp.async.bulk.shared::cluster.shared::cta"
    f".mbarrier::complete_tx::bytes [$0], [$1], {size}, [$2];",
    [target.value, source.value, barrier.value, where.value],
  )


def meet() -> None:
  """Waits until all threads of all blocks have come, and sees their writes."""
  text = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
  threads.assembly(text)
