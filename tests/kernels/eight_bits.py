"""Rounding to 8 bits in NumPy, the oracle of what is kept and read so."""

import ml_dtypes
import numpy as np

LEAST = {"latents": 1e-4, "index": 1e-4 / 448}


def quantized(x, least: float) -> tuple[np.ndarray, np.ndarray]:
  """Vectors in e4m3 and their scales, by FlashMLA's formula in float64."""
  greatest = np.abs(np.asarray(x, np.float64)).max(-1)
  scale = 2.0 ** np.ceil(np.log2(np.maximum(greatest / 448, least)))
  values = np.asarray(x, np.float64) / scale[..., None]
  # Twice rounded where float32 is exact: a power of two takes no bit.
  values = values.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
  return values, scale.astype(np.float32)


def latents(kv, C: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Values, scales and rotated keys of rows `[c; kr]`."""
  kv = np.asarray(kv)
  groups = kv[..., :C].reshape(*kv.shape[:-1], -1, 128)
  values, scale = quantized(groups, LEAST["latents"])
  rope = kv[..., C:].astype(ml_dtypes.bfloat16)
  return values.reshape(*kv.shape[:-1], C), scale, rope


def rounded_latents(kv, C: int) -> np.ndarray:
  """What is read of them, float32."""
  values, scale, rope = latents(kv, C)
  c = values.astype(np.float32) * np.repeat(scale, 128, -1)
  c = c.astype(ml_dtypes.bfloat16).astype(np.float32)
  return np.concatenate([c, rope.astype(np.float32)], -1)


def rotated(x) -> np.ndarray:
  """The butterflies, in float32; rounded to the dtype of x."""
  y = np.asarray(x, np.float32).copy()
  half = 1
  while half < y.shape[-1]:
    pairs = y.reshape(*y.shape[:-1], -1, 2, half)
    low, high = pairs[..., 0, :], pairs[..., 1, :]
    y = np.stack([low + high, low - high], -2).reshape(y.shape)
    half *= 2
  return (y * np.float32(y.shape[-1] ** -0.5)).astype(x.dtype)


def index(x) -> tuple[np.ndarray, np.ndarray]:
  """Index queries or keys, rotated, in 8 bits, and their scales."""
  return quantized(rotated(x), LEAST["index"])


def rounded_index(x) -> np.ndarray:
  """What is read of them, float32."""
  values, scale = index(x)
  return values.astype(np.float32) * scale[..., None]
