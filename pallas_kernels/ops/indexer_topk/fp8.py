"""Quantises index queries and keys to 8 bits, as in DeepSeek-V3.2.

A vector of I numbers is rotated by a Hadamard matrix, which spreads outliers
over all of them and preserves every q.k, and then divided by a power of two
that brings its largest number to at most 448, the largest of e4m3. With
`q, q_scale` and `k, k_scale` of `quantize`,

  score[t, s] = k_scale[s] sum_j (w q_scale)[t, j] relu(q[t, j] . k[s])
"""

from typing import Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float
import numpy as np

from pallas_kernels import contraction
from pallas_kernels import e4m3

# Exponent of the least scale: a vector's largest number counts as 1e-4 at
# least.
_LEAST: Final = -22


def quantize(
  x: Float[Array, "*N I"],
) -> tuple[Float[Array, "*N I"], Float[Array, "*N"]]:
  """Rotates and rounds to e4m3.

  Args:
    x: Index queries or keys, I a power of two.

  Returns:
    The rotated numbers divided by their scale, float8_e4m3fn; and the scale of
    each vector, float32, a power of two (ue8m0 holds it exactly).
  """
  return e4m3.quantize(rotate(x), _LEAST)


def rounded(x: Float[Array, "*N I"]) -> Float[Array, "*N I"]:
  """Rotates, quantises and dequantises, in the dtype of `x`.

  The dequantisation is exact: a number has 4 significant bits.
  """
  return e4m3.dequantize(*quantize(x), x.dtype)


def rounded_keys(
  k: Float[Array, "*N I"], k_scale: Float[Array, "*N"] | None, dtype: DTypeLike
) -> Float[Array, "*N I"]:
  """The same of keys, which may be quantised already: these in `dtype`."""
  if k_scale is None:
    return rounded(k)
  return e4m3.dequantize(k, k_scale, dtype)


def rotate(x: Float[Array, "*N I"]) -> Float[Array, "*N I"]:
  """Computes I^-1/2 x H, with H the Hadamard matrix in Sylvester's order.

  Sums are in float32; the result has the dtype of `x`.

  Raises:
    ValueError: I is not a power of two.
  """
  I = x.shape[-1]
  if I & (I - 1):
    raise ValueError(f"Vectors of {I=} numbers: a rotation takes a power of 2.")
  rotated = contraction.einsum(
    "...I,IJ->...J",
    x,
    jnp.asarray(_hadamard(I), x.dtype),
  )
  # XLA may leave out a conversion to bfloat16 and back, but not this.
  kind = jnp.finfo(x.dtype)
  rotated = jax.lax.reduce_precision(rotated * I**-0.5, kind.nexp, kind.nmant)
  return rotated.astype(x.dtype)


def _hadamard(n: int) -> np.ndarray:
  """Hadamard matrix [n, n] of 1 and -1, the parity of both indices' bits."""
  i = np.arange(n, dtype=np.uint32)
  return 1 - 2 * (np.bitwise_count(i[:, None] & i) % 2).astype(np.int32)
