"""Fingerprints of arrays: the same on every mesh, in every order.

That of an array is a number for each of its parts, a layer's or an expert's,
of all the part's bits and where they stand: whoever reads a part alone can
compare it too.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32
import numpy as np

from dsa_jax.hf import tensors as tensors_lib
from train.host import processes

_ODD: Final = np.uint32(0x9E3779B1)  # with as many ones as zeros, about


def of(tree: Any) -> dict[str, np.ndarray]:
  """Fingerprints of a tree's arrays by name, uint32[layers and experts].

  An array that is neither stacked over layers nor over experts has a single
  number. All processes call it.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {name(path): x for path, x in leaves}
  marks: dict[str, Any] = {
    name: _marks(x, _stacked(name)) for name, x in named.items()
  }
  return processes.fetch(marks)


def of_part(part: np.ndarray) -> int:
  """Fingerprint of one part, a layer's or an expert's."""
  return int(_marks(part, 0))


def name(path: tuple[Any, ...]) -> str:
  """params.moe_layers.ffn.gate_EDF.value: an array's name in its tree."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def _stacked(name: str) -> int:
  """Leading dimensions of a parameter, or of a moment, that are its parts."""
  leaf = name.removesuffix(".value")
  for stack in ("dense_layers.", "moe_layers."):
    if f".{stack}" in leaf:
      leaf = stack + leaf.partition(stack)[2]
  return tensors_lib.stacked(leaf)


@functools.partial(jax.jit, static_argnames="stacked")
# Of one array: moments have their parameter's shape, in every stage.
def _marks(x: Array, stacked: int) -> UInt32[Array, "..."]:
  """Sums whole numbers: the same on every mesh, whatever the order."""
  bits = x
  if not jnp.issubdtype(x.dtype, jnp.integer):
    width = 8 * x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
  mixed = bits.astype(jnp.uint32)
  # Any odd number has an inverse: no place and no value is forgotten.
  for axis in range(stacked, x.ndim):
    place = jnp.arange(x.shape[axis], dtype=jnp.uint32)
    place = place.reshape([-1 if d == axis else 1 for d in range(x.ndim)])
    mixed = (mixed ^ place * _ODD) * _ODD
    mixed ^= mixed >> 15
  return mixed.sum(range(stacked, x.ndim), dtype=jnp.uint32)
