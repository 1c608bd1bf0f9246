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
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels import contraction

LARGEST: Final = 448.0  # of e4m3
_LEAST: Final = 1e-4  # lower bound of a vector's largest number
_MANTISSA: Final = 23  # bits, of float32
_BIAS: Final = 127  # of float32's exponent


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
  rotated = rotate(x).astype(jnp.float32)
  exponent = _exponent(jnp.max(jnp.abs(rotated), axis=-1))
  # Products with a power of two are exact, and faster than quotients.
  scaled = rotated * _power_of_two(-exponent)[..., None]
  scaled = jnp.clip(scaled, -LARGEST, LARGEST)
  return scaled.astype(jnp.float8_e4m3fn), _power_of_two(exponent)


def rounded(x: Float[Array, "*N I"]) -> Float[Array, "*N I"]:
  """Rotates, quantises and dequantises, in the dtype of `x`.

  The dequantisation is exact: a number has 4 significant bits.
  """
  values, scale = quantize(x)
  return (values.astype(jnp.float32) * scale[..., None]).astype(x.dtype)


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


def _exponent(greatest: Float[Array, "*N"]) -> Int[Array, "*N"]:
  """Exponent of the least power of two not below `greatest / LARGEST`."""
  ratio = jnp.maximum(greatest, _LEAST) * jnp.float32(1 / LARGEST)
  bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
  is_between = (bits & ((1 << _MANTISSA) - 1)) != 0
  return (bits >> _MANTISSA) - _BIAS + is_between


def _power_of_two(exponent: Int[Array, "*N"]) -> Float[Array, "*N"]:
  return jax.lax.bitcast_convert_type(
    (exponent + _BIAS) << _MANTISSA, jnp.float32
  )
