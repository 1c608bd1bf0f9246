"""Weights are numbers: a NaN or an infinity is found before it is used."""

from typing import Final

import numpy as np

from dsa_jax.hf import header

# The least magnitude that is refused, as bits; larger magnitudes are larger as
# integers, too. Of float32 it is what rounds to infinity in bfloat16.
_REFUSED: Final = {
  header.DTYPES["F32"]: 0x7F7F8000,
  header.DTYPES["BF16"]: 0x7F80,
  header.DTYPES["F8_E4M3"]: 0x7F,
}
_LARGEST_SCALE: Final = 2.0**119  # e4m3's 448 times it is a bfloat16


def check(array: np.ndarray, name: str) -> None:
  """Refuses NaN, infinity, and what becomes infinite as bfloat16.

  Two maxima of integers, at the memory's speed and without a copy.

  Args:
    array: float32, bfloat16 or e4m3.
    name: How the error calls it.

  Raises:
    ValueError: Names the first such value and its place.
  """
  width, refused = array.itemsize, _REFUSED[array.dtype]
  signed, unsigned = array.view(f"i{width}"), array.view(f"u{width}")
  sign = 1 << 8 * width - 1
  if signed.max(initial=0) < refused and (
    unsigned.max(initial=0) < sign + refused
  ):
    return
  at = np.unravel_index(
    np.argmax(unsigned & (sign - 1) >= refused), array.shape
  )
  raise ValueError(
    f"{name} has {array[at]} at {[int(i) for i in at]}, which is no weight: it"
    " must be finite, as a bfloat16 too."
  )


def check_scale(scale: np.ndarray, name: str) -> None:
  """Refuses scales of FP8 blocks that are no positive numbers.

  Raises:
    ValueError: Names the first such scale and its place.
  """
  values = scale.astype(np.float32)
  usable = (values > 0) & (values <= _LARGEST_SCALE)
  if not usable.all():
    at = np.unravel_index(np.argmin(usable), scale.shape)
    raise ValueError(
      f"{name} has {values[at]} at {[int(i) for i in at]}, which is no scale:"
      f" it must be above 0 and at most {_LARGEST_SCALE:.3g}."
    )
