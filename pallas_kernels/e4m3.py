"""Vectors in 8 bits, e4m3, each with a scale that is a power of two.

Division by such a scale is exact, and so is the way back: only the 4
significant bits of e4m3 round.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

LARGEST: Final = 448.0
_MANTISSA: Final = 23  # bits, of float32
_BIAS: Final = 127  # of float32's exponent


def quantize(
  x: Float[Array, "*N I"], least: int
) -> tuple[Float[Array, "*N I"], Float[Array, "*N"]]:
  """Divides vectors by their scales, and rounds to e4m3.

  Args:
    x: The vectors.
    least: Exponent of the least scale that a vector may have.

  Returns:
    The numbers divided by their scale, float8_e4m3fn; and the scale of each
    vector, float32: the least power of two, from 2^least on, that brings its
    largest number to at most 448.
  """
  x = x.astype(jnp.float32)
  exponent = jnp.maximum(_exponent(jnp.max(jnp.abs(x), axis=-1)), least)
  # Products with a power of two are exact, and faster than quotients.
  scaled = x * _power_of_two(-exponent)[..., None]
  scaled = jnp.clip(scaled, -LARGEST, LARGEST)
  return scaled.astype(jnp.float8_e4m3fn), _power_of_two(exponent)


def dequantize(
  values: Float[Array, "*N I"], scale: Float[Array, "*N"], dtype: DTypeLike
) -> Float[Array, "*N I"]:
  """Multiplies by the scales; exact in bfloat16 and float32."""
  # Else XLA on a GPU leaves out a conversion to 8 bits and back.
  values = jax.lax.optimization_barrier(values)
  return (values.astype(jnp.float32) * scale[..., None]).astype(dtype)


def _exponent(greatest: Float[Array, "*N"]) -> Int[Array, "*N"]:
  """Exponent of the least power of two not below `greatest / LARGEST`."""
  ratio = greatest * jnp.float32(1 / LARGEST)
  bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
  is_between = (bits & ((1 << _MANTISSA) - 1)) != 0
  return (bits >> _MANTISSA) - _BIAS + is_between


def _power_of_two(exponent: Int[Array, "*N"]) -> Float[Array, "*N"]:
  return jax.lax.bitcast_convert_type(
    (exponent + _BIAS) << _MANTISSA, jnp.float32
  )
