"""What results in bf16 of sums in fp32 may differ by."""

import dataclasses
from typing import Final


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
  """Largest errors against the reference in float32."""

  absolute: float
  """Of a number: either this, or `relative` times it."""
  relative: float
  rms: float | None = None
  """Where the root mean square of a row is above this, `absolute` grows with
  it."""
  cosine: float | None = None
  """Of a row: 1 - cosine."""


# `absolute` is for averages of many keys. Of few, numbers are larger, and so is
# what bf16 probabilities do to one that is small among them.
OUT: Final = Tolerance(absolute=8e-4, relative=3.01 / 128, rms=0.1, cosine=7e-6)
# Near zero, which takes few keys, it is a difference of numbers of the logits'
# size: `absolute` is about a last bit in fp32 of 16.
LSE: Final = Tolerance(absolute=2e-6, relative=2.01 / 65536)
LOSS: Final = Tolerance(absolute=1e-5, relative=1e-3)
