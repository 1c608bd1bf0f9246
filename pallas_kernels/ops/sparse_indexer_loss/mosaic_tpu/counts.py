"""Counts of the kernels' blocks, for static estimates of their time."""

from collections.abc import Mapping
from typing import Final

from pallas_kernels.cases import counts
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import op


def distributions(call: counts.Call, bQ: int, bK: int) -> counts.Counts:
  shape = call.shape
  index = 2 * bQ * shape.M * shape.I
  keys = counts.row_bytes(128 * -(-(shape.C + shape.R) // 128) + shape.I)
  block = index + 2 * bQ * shape.N * (shape.C + shape.R)
  return _walk(call, bQ, bK, row=keys, block=block, arrays=2)


def gradients(call: counts.Call, bQ: int, bK: int) -> counts.Counts:
  shape = call.shape
  sums = 2 * 4 * 128 * -(-shape.I // 128)  # a row is read and written
  index = (2 + 2 + 4) * bQ * shape.M * shape.I
  row = counts.row_bytes(shape.I) + sums
  return _walk(call, bQ, bK, row=row, block=index, arrays=1)


def _walk(
  call: counts.Call, bQ: int, bK: int, *, row: int, block: int, arrays: int
) -> counts.Counts:
  """Counts, from bytes per row and per block and `arrays` [places, bQ, bK]."""
  nQ = -(-call.shape.T // bQ)
  tiles, union, apart = counts.reads(call, bQ, bK)
  longest = min(op.LONGEST_UNION, bQ)
  places = -(-longest * call.shape.K // bK)
  return counts.Counts(
    steps=nQ,
    ends=nQ,
    blocks=(call.cores, tiles, union, apart),
    bytes=tiles * bK * row + nQ * (block + 4 * arrays * places * bQ * bK),
  )


KERNELS: Final[Mapping[str, counts.Count]] = {
  "sparse_indexer_loss_distributions": distributions,
  "sparse_indexer_loss_gradients": gradients,
}
