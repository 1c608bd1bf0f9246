"""Fingerprints of arrays: the same on every mesh, in every order."""

from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32
import numpy as np

_ODD: Final = np.uint32(0x9E3779B1)  # with as many ones as zeros, about


def of(tree: Any) -> list[int]:
  """A number for each array, of all its bits and where they stand."""
  marks = [_mark(x) for x in jax.tree.leaves(tree)]
  return [int(mark) for mark in jax.device_get(marks)]


@jax.jit  # of one array: moments have their parameter's shape, in every stage
def _mark(x: Array) -> UInt32[Array, ""]:
  """Sums whole numbers: the same on every mesh, whatever the order."""
  bits = x
  if not jnp.issubdtype(x.dtype, jnp.integer):
    width = 8 * x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
  mixed = bits.astype(jnp.uint32)
  # Any odd number has an inverse: no place and no value is forgotten.
  for axis in range(x.ndim):
    place = jnp.arange(x.shape[axis], dtype=jnp.uint32)
    place = place.reshape([-1 if d == axis else 1 for d in range(x.ndim)])
    mixed = (mixed ^ place * _ODD) * _ODD
    mixed ^= mixed >> 15
  return mixed.sum(dtype=jnp.uint32)
