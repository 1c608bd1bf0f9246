"""Counts of the kernels' blocks, for static estimates of their time."""

from collections.abc import Mapping
from typing import Final

from pallas_kernels.cases import counts
from pallas_kernels.tpu import heads


def scores(call: counts.Call, bT: int, bS: int) -> counts.Counts:
  shape, M, I = call.shape, call.shape.M, call.shape.I
  tiles, chunks = _chunks(call, bT, bS)
  return counts.Counts(
    steps=tiles,
    ends=chunks,
    blocks=(),
    bytes=tiles * bS * (2 * I + 4 * bT)
    + 2 * chunks * bT * M * I
    + 4 * shape.T * M,
  )


def target(call: counts.Call, bT: int, bS: int, bN: int) -> counts.Counts:
  shape = call.shape
  tiles, _ = _chunks(call, bT, bS)
  steps = tiles * (shape.N // bN)
  HR = shape.H + shape.R
  of_heads = bT * bN * heads.width(HR) + bS * heads.width(HR, bN)
  return counts.Counts(
    steps=steps,
    ends=tiles,
    blocks=(steps * bN,),
    bytes=2 * steps * of_heads + 4 * tiles * bS * bT,
  )


def gradients(call: counts.Call, bT: int, bS: int) -> counts.Counts:
  M, I = call.shape.M, call.shape.I
  tiles, chunks = _chunks(call, bT, bS)
  return counts.Counts(
    steps=tiles,
    ends=chunks,
    blocks=(),
    # Of a tile: keys both ways, their sums in and out, scores and target.
    bytes=tiles * bS * (2 * 2 * I + 2 * 4 * I + 2 * 4 * bT)
    + chunks * bT * M * I * (2 + 2 + 4),
  )


def _chunks(call: counts.Call, bT: int, bS: int) -> tuple[int, int]:
  """Tiles of keys that chunks of queries see, and chunks, over all cores."""
  rows = call.cores * bT
  seen, _ = counts.spans(call, rows, bS)
  return call.cores * seen, call.cores * -(-call.shape.T // rows)


KERNELS: Final[Mapping[str, counts.Count]] = {
  "dense_indexer_loss_scores": scores,
  "dense_indexer_loss_target": target,
  "dense_indexer_loss_gradients": gradients,
}
