"""Counts of the kernels' blocks, for static estimates of their time."""

from collections.abc import Mapping
from typing import Final

from pallas_kernels.cases import counts


def forward(call: counts.Call, bQ: int, bK: int) -> counts.Counts:
  shape = call.shape
  nQ, D, C = -(-shape.T // bQ), shape.C + shape.R, shape.C
  tiles, union, apart = counts.reads(call, bQ, bK)
  return counts.Counts(
    steps=nQ,
    ends=nQ,
    blocks=(
      call.cores,  # before each one's first block
      *(tiles, union * _groups(shape.N, bQ), apart),
    ),
    bytes=tiles * bK * counts.row_bytes(D) + 2 * nQ * bQ * shape.N * (D + C),
  )


def backward(call: counts.Call, bQ: int, bK: int) -> counts.Counts:
  shape = call.shape
  nQ, D, C = -(-shape.T // bQ), shape.C + shape.R, shape.C
  tiles, union, apart = counts.reads(call, bQ, bK)
  sums = 2 * 4 * 128 * -(-D // 128)  # a row is read and written
  return counts.Counts(
    steps=nQ,
    ends=nQ,
    blocks=(
      call.cores,  # before each one's first block
      *(tiles, union, apart),
      0,  # no key stands twice in a tile
    ),
    bytes=tiles * bK * (counts.row_bytes(D) + sums)
    + 2 * nQ * bQ * shape.N * (2 * D + C),
  )


def _groups(N: int, bQ: int) -> int:
  """Number of products of a union's tile, each of up to 512 rows."""
  return -(-bQ // max(1, 512 // N))


KERNELS: Final[Mapping[str, counts.Count]] = {
  "sparse_mla_forward": forward,
  "sparse_mla_backward": backward,
}
