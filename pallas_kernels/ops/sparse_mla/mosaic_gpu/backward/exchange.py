"""What the two blocks of a cluster send each other: products and weights."""

from collections.abc import Sequence

from pallas_kernels.hopper import cluster
from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import signals
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import lanes
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans


def completed(
  own: Sequence[F32],
  others: Sequence[F32],
  buffer: Place,
  here: Place,
  parity: U32,
) -> list[F32]:
  """Sums both blocks' products.

  Args:
    own: Products of this block's heads, from its columns.
    others: Those of the other block's heads, for that block.
    buffer: Where the other block's part arrives, [64, 64], float32.
    here: Barrier that counts its bytes.
    parity: Of that barrier's phase.

  Returns:
    Products of this block's heads, from all columns.
  """
  mine = buffer + instructions.thread() * 16
  place, signal = cluster.there(mine), cluster.there(here)
  fours = range(0, len(others), 4)
  for i in fours:
    cluster.send(others[i : i + 4], place, 512 * i, signal)
  signals.expect(here, 4 * plans.KEYS * plans.HEADS, lanes.leads())
  signals.wait(here, parity)
  got = [x for i in fours for x in mine.load_floats(4, 512 * i)]
  return [x + y for x, y in zip(own, got, strict=True)]


def send_weights(tile: Place, here: Place) -> None:
  """Sends weights to the other block, which does not own their heads.

  Args:
    tile: Those of this block's heads; behind it, those of the others arrive.
    here: Barrier that counts the bytes that arrive.
  """
  leader = lanes.leads()
  signals.expect(here, plans.TILE_BYTES, leader)
  cluster.send_bytes(
    tile,
    cluster.there(tile + plans.TILE_BYTES),
    plans.TILE_BYTES,
    cluster.there(here),
    leader,
  )


def signal(here: Place) -> None:
  """Arrives at the other block's barrier, once a warp."""
  cluster.arrive(cluster.there(here), lanes.leads_warp())
