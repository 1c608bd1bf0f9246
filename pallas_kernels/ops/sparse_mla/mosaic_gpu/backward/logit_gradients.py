"""Gradients dS^T of a tile's logits."""

from collections.abc import Sequence

from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import signals
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import exchange
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import lanes
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import products
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import warpgroup
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import weight_tile


def write(group: warpgroup.Warpgroup, parity: U32) -> None:
  """Writes dS^T to shared memory; the second warpgroup does."""
  memory, is_pair = group.memory, group.plan.is_pair
  own, others = products.by_cotangents(group)
  group.await_own_free()
  if is_pair:
    # The tile of dS receives the products before it receives dS.
    signals.wait(group.signal(plans.Signal.DONE), parity ^ 1)
    here = group.signal(plans.Signal.DP_HERE)
    own = exchange.completed(own, others, memory.ds, here, parity)
  factors = per_weight(own, group.per_head(), group.plan.scale)
  if is_pair:
    signals.meet_warp()
    exchange.signal(group.signal(plans.Signal.READ))
    group.meet_alone()
  group.meet(plans.Meeting.P_FULL)
  weight_tile.store(memory.ds, weight_tile.multiply(memory.p, factors))
  if is_pair:
    group.meet_alone()
    signals.wait(group.signal(plans.Signal.READ), parity)
    here = group.signal(plans.Signal.DS_HERE)
    exchange.send_weights(memory.ds, here)


def per_weight(
  d_weights: Sequence[F32], offsets: Place, scale: float
) -> list[F32]:
  """Computes what each weight is multiplied by: scale (dP^T - delta).

  Args:
    d_weights: Accumulator dP^T.
    offsets: Of each head: -scale delta.
    scale: Of the logits.
  """
  factor, factors = F32(scale), []
  place = offsets + lanes.quad() * 8
  for j in range(plans.HEADS // 8):
    pair = place.load_floats(2, 32 * j)
    for half in range(2):
      factors += [
        instructions.multiply_add(x, factor, offset)
        for x, offset in zip(d_weights[4 * j + 2 * half :][:2], pair)
      ]
  return factors
