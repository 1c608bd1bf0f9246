"""Whole registers and tiles: widths rounded up to lanes, and padded arrays."""

from typing import Any, Final

import jax
import jax.numpy as jnp

LANES: Final = 128  # of a vector register


def whole(width: int) -> int:
  """Rounds up to whole registers."""
  return -(-width // LANES) * LANES


def pad(x: jax.Array, *multiples: int, fill: Any = 0) -> jax.Array:
  """Pads the axes after the first to multiples of these, with `fill`."""
  padding = [(0, 0)] * x.ndim
  for axis, multiple in enumerate(multiples, 1):
    padding[axis] = 0, -x.shape[axis] % multiple
  return jnp.pad(x, padding, constant_values=fill)
