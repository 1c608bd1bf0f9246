"""Peaks of the device, as measured in the run that they are compared with."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench import timing


@dataclasses.dataclass
class Peak:
  """A rate that no program exceeds; one that does disproves it."""

  program: str
  """Program that it was measured with."""
  unit: str
  """Unit of 1e12 a second."""
  doubt: str
  """What may have been wrong if another program is faster."""
  rate: float | None
  """Per second; None once it is disproved."""

  def __str__(self) -> str:
    return f"{self._format(self.rate)} ({self.program})"

  def seconds(self, amount: float) -> float | None:
    """Least time for an amount of work."""
    return None if self.rate is None else amount / self.rate

  def disprove(self, what: str, rate: float) -> str | None:
    """Compares with the rate of a program; says so if that is higher."""
    if self.rate is None or rate <= self.rate:
      return None
    peak, self.rate = self.rate, None
    return (
      f"the measured peak of {self._format(peak)} is below the "
      f"{self._format(rate)} of {what}: no share of it counts, and no floor; "
      f"{self.doubt}"
    )

  def _format(self, rate: float | None) -> str:
    return f"{'?' if rate is None else format(rate / 1e12, '.3g')} {self.unit}"


class Peaks(NamedTuple):
  flops: Peak
  bytes: Peak
  """Reads and writes together."""


def measure() -> Peaks:
  """Measures a large matmul and a large copy of random numbers."""
  on_cpu = jax.default_backend() == "cpu"
  side, length = (256, 1 << 20) if on_cpu else (8192, 1 << 30)
  a, b = (
    jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16)
    for i in range(2)
  )
  matmul = timing.measure(jax.jit(jnp.matmul), [(a, b)])
  x = jax.random.bits(jax.random.key(2), (length // 4,), jnp.uint32)
  copy = timing.measure(jax.jit(lambda x: x ^ 1), [(x,)])
  return Peaks(
    Peak(
      *("a bf16 matmul", "TFLOP/s", "is autotuning off?"),
      2 * side**3 / matmul.seconds,
    ),
    Peak(
      *("a copy", "TB/s", "was its data in a cache?"),
      2 * x.nbytes / copy.seconds,
    ),
  )
