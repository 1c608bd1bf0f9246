"""FP8 weights in blocks of 128 x 128, as DeepSeek-V3 and V3.2 are released.

A weight is e4m3, and its blocks' scales ("weight_scale_inv": what to multiply
by) are float32, in newer releases powers of two ("ue8m0").
"""

from typing import Final

import ml_dtypes
import numpy as np

BLOCK: Final = 128
_MAX: Final = np.float32(448)  # e4m3's largest
_E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
# All 256 values: a table is faster than a cast.
_VALUES: Final = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """Blocks of a matrix; the last ones may be smaller."""
  rows, columns = shape
  return -(-rows // BLOCK), -(-columns // BLOCK)


def dequantise(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """weight x its block's scale in float32, rounded once.

  Args:
    weight: e4m3, [out, in].
    scale: float32 or e8m0, [out / 128, in / 128], rounded up.
  """
  values = _VALUES[weight.view(np.uint8)]
  values *= _spread(scale.astype(np.float32), weight.shape)
  return values


def quantise(
  weight: np.ndarray, known: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """The e4m3 weight and float32 scales of a matrix.

  A block gets the smallest power of two under which nothing overflows, as the
  release has it. But a block that a known scale gives back exactly, bit by bit,
  has that one: a weight that came from FP8 and was not changed since returns to
  what it was.

  Args:
    weight: float32 or bfloat16, [out, in].
    known: Scales that the weight may have come from.
  """
  values = weight.astype(np.float32)
  blocks = scale_shape(weight.shape)
  largest = np.zeros(blocks, np.float32)
  edges = [np.arange(0, size, BLOCK) for size in weight.shape]
  largest = np.maximum.reduceat(
    np.maximum.reduceat(np.abs(values), edges[0], 0), edges[1], 1
  )
  scale = _powers_of_two(largest)
  if known is not None:
    known = known.astype(np.float32)
    usable = np.isfinite(known) & (known > 0)
    trial = np.where(usable, known, scale)
    back = dequantise(_round(values, trial), trial).astype(weight.dtype)
    same = back.view(f"u{back.itemsize}") == weight.view(f"u{back.itemsize}")
    exact = np.logical_and.reduceat(
      np.logical_and.reduceat(same, edges[0], 0), edges[1], 1
    )
    scale = np.where(exact, trial, scale)
  return _round(values, scale), scale


def _powers_of_two(largest: np.ndarray) -> np.ndarray:
  """2^ceil(log2(largest / 448)), at least the smallest normal; 1 for zeros."""
  fraction, exponent = np.frexp(largest / _MAX)
  exponent = exponent - (fraction == 0.5)
  scale = np.ldexp(np.float32(1), np.maximum(exponent, -126)).astype(np.float32)
  return np.where(largest > 0, scale, np.float32(1))


def _round(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
  scaled = values / _spread(scale, values.shape)
  return np.clip(scaled, -_MAX, _MAX, out=scaled).astype(_E4M3)


def _spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """One scale for each element."""
  rows, columns = shape
  wide = np.repeat(scale, BLOCK, 1)[:, :columns]
  return np.repeat(wide, BLOCK, 0)[:rows]
