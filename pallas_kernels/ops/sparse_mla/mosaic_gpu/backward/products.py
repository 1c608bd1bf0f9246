"""Products of a tile of keys by all heads, of the block's columns."""

from collections.abc import Sequence

from pallas_kernels.hopper import wgmma
from pallas_kernels.hopper.threads import F32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import warpgroup


def by_queries(
  group: warpgroup.Warpgroup,
) -> tuple[Sequence[F32], Sequence[F32]]:
  """K Q^T: products of the 64 heads that the block owns, and of others."""
  operands, plan = group.operands, group.plan
  acc = wgmma.fence(wgmma.zeros(plan.heads))
  acc = _add_wide(acc, group, operands.q_wide)
  for column in range(plan.narrow // 32):
    keys = operands.kv_narrow.along_columns(column)
    queries = operands.q_narrow.along_columns(column)
    acc = wgmma.multiply(acc, keys, queries, 2)
  return _finish(acc)


def by_cotangents(
  group: warpgroup.Warpgroup,
) -> tuple[Sequence[F32], Sequence[F32]]:
  """V dO^T, likewise."""
  acc = wgmma.fence(wgmma.zeros(group.plan.heads))
  return _finish(_add_wide(acc, group, group.operands.do_wide))


def _add_wide(acc, group, by):
  for column in range(group.plan.wide // 64):
    keys = group.operands.kv_wide.along_columns(column)
    acc = wgmma.multiply(acc, keys, by.along_columns(column), 4)
  return acc


def _finish(acc):
  wgmma.commit()
  acc = wgmma.wait(0, acc)
  return acc[: plans.HEADS // 2], acc[plans.HEADS // 2 :]
