"""Counts of the kernels' blocks, for static estimates of their time."""

from collections.abc import Mapping
import dataclasses
from typing import Final

from pallas_kernels.cases import counts
from pallas_kernels.tpu import heads


def forward(call: counts.Call, bT: int, bS: int, chunk: int) -> counts.Counts:
  shape = call.shape
  N, width = shape.N, heads.width(shape.H + shape.R) + shape.U
  nT = -(-shape.T // bT)
  seen, whole = counts.spans(call, bT, min(2 * chunk, bS))
  tiles, _ = counts.spans(call, bT, bS)
  longest = -(-shape.S // bS)
  return counts.Counts(
    steps=N * nT * longest,
    ends=N * nT,
    blocks=(N * seen, N * whole, N * (seen - whole)),
    bytes=2 * N * width * (tiles * bS + nT * bT),
  )


def masked_forward(
  call: counts.Call, bT: int, bS: int, chunk: int
) -> counts.Counts:
  """Counts with a mask, one word per query and 32 keys."""
  plain = forward(call, bT, bS, chunk)
  seen, _, _ = plain.blocks
  tiles, _ = counts.spans(call, bT, 32 * 128)
  words = 4 * call.shape.N * tiles * bT * 128
  return dataclasses.replace(plain, blocks=(seen,), bytes=plain.bytes + words)


def backward(call: counts.Call, bT: int, bS: int, chunk: int) -> counts.Counts:
  shape = call.shape
  N, HR = shape.N, heads.width(shape.H + shape.R)
  width = 2 * (HR + shape.U)
  nT, nS = -(-shape.T // bT), -(-shape.S // bS)
  seen, whole = counts.spans(call, bT, chunk)
  tiles, _ = counts.spans(call, bT, bS)
  return counts.Counts(
    steps=N * nS * nT,
    ends=N * nS,
    blocks=(N * tiles * (bS // chunk), N * whole, N * (seen - whole)),
    bytes=N * width * (tiles * bT + 2 * nS * bS) + 2 * N * nT * bT * HR,
  )


def masked_backward(
  call: counts.Call, bT: int, bS: int, chunk: int
) -> counts.Counts:
  plain = backward(call, bT, bS, chunk)
  chunks, whole, part = plain.blocks
  tiles, _ = counts.spans(call, bT, bS)
  words = 4 * call.shape.N * tiles * bT * 128
  return dataclasses.replace(
    plain, blocks=(chunks, whole + part), bytes=plain.bytes + words
  )


def mask_bits(call: counts.Call, bQ: int) -> counts.Counts:
  shape = call.shape
  words = 128 * -(-shape.S // (32 * 128))  # of a query
  return counts.Counts(
    steps=-(-shape.T // bQ),
    ends=0,
    blocks=(),
    bytes=4 * shape.T * (shape.K + words),
  )


KERNELS: Final[Mapping[str, counts.Count]] = {
  "dense_mla_forward": forward,
  "dense_mla_backward": backward,
  "dense_mla_masked_forward": masked_forward,
  "dense_mla_masked_backward": masked_backward,
  "dense_mla_mask_bits": mask_bits,
}
