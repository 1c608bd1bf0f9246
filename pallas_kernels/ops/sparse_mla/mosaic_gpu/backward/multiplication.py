"""What a warpgroup that multiplies does: its loop over tiles."""

from collections.abc import Sequence

from pallas_kernels.hopper import cluster
from pallas_kernels.hopper import signals
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import wgmma
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import key_gradients
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import lanes
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import logit_gradients
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import permutation
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import query_gradients
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import warpgroup
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import weights


def run(group: warpgroup.Warpgroup, tiles: U32, slot: U32) -> None:
  """Computes the gradients of a query; both warpgroups run it.

  Args:
    group: This warpgroup.
    tiles: Tiles with a key, at most `plan.tiles`.
    slot: See `key_gradients.targets_of`.
  """
  plan = group.plan
  _permute(group)
  group.announce_others_free()
  columns = key_gradients.columns_of(group)

  def step(tile: U32, *d_q: F32) -> Sequence[F32]:
    parity = tile & 1
    signals.wait(group.signal(plans.Signal.FULL), parity)
    keys = key_gradients.load_keys(group.memory.indices)
    if group.which:
      logit_gradients.write(group, parity)
    else:
      weights.write(group, tile, parity, _valid(keys, plan.keys))
    _await_weights(group, parity)
    started = query_gradients.start(group, d_q)
    first = key_gradients.start(group, columns[0])
    added = wgmma.wait(1, started)
    signals.arrive(group.signal(plans.Signal.FREE), lanes.leads_warp())
    targets = key_gradients.targets_of(keys, tile, slot, plan)
    key_gradients.finish(group, columns, first, targets)
    return added

  d_q = threads.loop(tiles, step, query_gradients.zeros())
  group.await_own_free()
  if not group.which:
    _store_no_sums(group, tiles)
  query_gradients.store(group.d_q, d_q, group.which, group.rank(), plan)
  if plan.is_pair:
    cluster.meet()


def _permute(group: warpgroup.Warpgroup) -> None:
  """Permutes Q and dO, one of them for each warpgroup."""
  plan, memory = group.plan, group.memory
  sizes = dict(columns=plan.wide, eight=plan.wide_eight)
  if group.which:
    permutation.permute(memory.do_wide, plan.heads, **sizes)
  else:
    permutation.permute(memory.q_wide, plan.heads, **sizes)
    sizes = dict(columns=plan.narrow, eight=plan.narrow_eight, swizzle=64)
    permutation.permute(memory.q_narrow, plan.heads, **sizes)
  signals.fence_async()
  group.meet(plans.Meeting.DS_FULL)


def _valid(keys: Sequence[U32], available: int) -> list[Bool]:
  """Whether there are such keys as the thread's two rows have."""
  odd = lanes.has_odd_row()
  own = [odd.where(keys[i + 1], keys[i]) for i in (0, 2)]
  return [key < available for key in own]


def _await_weights(group: warpgroup.Warpgroup, parity: U32) -> None:
  """Waits until P^T and dS^T are complete."""
  group.meet(plans.Meeting.DS_FULL)
  if group.plan.is_pair:
    signals.wait(group.signal(plans.Signal.P_HERE), parity)
    signals.wait(group.signal(plans.Signal.DS_HERE), parity)


def _store_no_sums(group: warpgroup.Warpgroup, tiles: U32) -> None:
  """Stores zeros as sums of weights of the tiles without a key."""

  def step(i):
    weights.store_sums(group.p, tiles + i, [F32(0.0)] * 2)
    return []

  threads.loop(group.plan.tiles - tiles, step, [])
