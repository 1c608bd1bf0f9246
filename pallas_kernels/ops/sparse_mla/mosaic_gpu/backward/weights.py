"""Weights P^T of a tile of keys, and their sums over heads."""

from collections.abc import Sequence

from pallas_kernels import softmax
from pallas_kernels.hopper import instructions
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import exchange
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import lanes
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import products
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import warpgroup
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import weight_tile


def write(
  group: warpgroup.Warpgroup, tile: U32, parity: U32, valid: Sequence[Bool]
) -> None:
  """Writes P^T to shared memory, and its sums to device memory.

  Args:
    group: The first warpgroup.
    tile: Index of the tile.
    parity: Of that index.
    valid: For each of this thread's two rows, whether there is such a key.
  """
  own, others = products.by_queries(group)
  group.await_own_free()
  if group.plan.is_pair:
    here = group.signal(plans.Signal.S_HERE)
    buffer = group.memory.products
    own = exchange.completed(own, others, buffer, here, parity)
  packed, sums = of_products(own, group.per_head(), valid, group.plan.scale)
  weight_tile.store(group.memory.p, packed)
  group.announce(plans.Meeting.P_FULL)
  if group.plan.is_pair:
    group.meet_alone()
    here = group.signal(plans.Signal.P_HERE)
    exchange.send_weights(group.memory.p, here)
  store_sums(group.p, tile, over_quad(sums))


def of_products(
  logits: Sequence[F32], biases: Place, valid: Sequence[Bool], scale: float
) -> tuple[list[U32], list[F32]]:
  """Computes this thread's weights.

  Args:
    logits: Accumulator of the unscaled logits.
    biases: Of each head's logits, in powers of two.
    valid: For each of the thread's two rows.
    scale: Of the logits.

  Returns:
    Pairs of weights, and their sum in each row.
  """
  factor, zero = F32(scale * softmax.LOG2E), F32(0.0)
  sums, packed = [zero, zero], []
  place = biases + lanes.quad() * 8
  for j in range(plans.HEADS // 8):
    pair = place.load_floats(2, 32 * j)
    for half in range(2):
      two = []
      for x, bias in zip(logits[4 * j + 2 * half :][:2], pair, strict=True):
        x = instructions.exp2(instructions.multiply_add(x, factor, bias))
        x = valid[half].where_float(x, zero)
        sums[half] = sums[half] + x
        two.append(x)
      packed.append(instructions.pack(*two))
  return packed, sums


def over_quad(sums):
  """Sums over the four threads that share the rows."""
  for distance in (1, 2):
    sums = [x + instructions.exchange(x, distance) for x in sums]
  return sums


def store_sums(p: Place, tile: U32, sums: Sequence[F32]) -> None:
  """Stores the sums of this thread's two rows of a tile."""
  at = p + (tile * plans.KEYS + lanes.first_row()) * 4
  leads_quad = lanes.quad().equals(0)
  for half, x in enumerate(sums):
    at.store([x], 32 * half, where=leads_quad)
