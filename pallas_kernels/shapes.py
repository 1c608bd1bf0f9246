"""Named real shapes, shared by tests, benchmarks and tuning."""

import dataclasses
from typing import Final

_MOST: Final = 2**24  # of any size; no memory holds more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of one call of an op; the defaults are DeepSeek-V3.2's."""

  T: int = 4096
  """Queries."""
  S: int
  """Keys."""
  K: int = 2048
  """Selected keys per query."""
  N: int = 128
  """Attention heads."""
  H: int = 128
  """Width of a head's part without RoPE."""
  R: int = 64
  """Width of a head's part with RoPE."""
  U: int = 128
  """Width of a head's value."""
  C: int = 512
  """Rank of the key/value latent."""
  M: int = 64
  """Index heads."""
  I: int = 128
  """Width of an index head."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      size = getattr(self, field.name)
      if not 1 <= size <= _MOST:
        raise ValueError(
          f"{field.name}={size} must be at least 1 and at most {_MOST}."
        )
    if self.T > self.S:
      raise ValueError(
        f"{self.T=} queries exceed {self.S=} keys: the queries are the last "
        "tokens of the sequence. Lower T or raise S."
      )

  @property
  def scale(self) -> float:
    """Softmax scale."""
    return (self.H + self.R) ** -0.5


SHAPES: Final = {
  # Takes a CPU about a second; all sizes differ.
  "tiny": Shape(T=40, S=97, K=30, N=4, H=24, R=16, U=28, C=64, M=6, I=32),
  # A chunk of 4096 queries at the end of ever longer sequences.
  "8k": Shape(S=8192),
  "32k": Shape(S=32_768),
  "64k": Shape(S=65_536),
  "128k": Shape(S=131_072),
}
