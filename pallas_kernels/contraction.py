"""Sums of products, in fp32, of factors that are not rounded.

At JAX's default precision a TPU rounds fp32 factors to bfloat16, and a GPU to
TF32.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jax.typing import DTypeLike


def precision(*factors: ArrayLike | DTypeLike) -> jax.lax.Precision | None:
  """Precision at which no factor, or dtype of one, is rounded."""
  is_fp32 = jnp.result_type(*factors) == jnp.float32
  return jax.lax.Precision.HIGHEST if is_fp32 else None


def einsum(
  subscripts: str,
  *factors: jax.Array,
  dtype: DTypeLike = jnp.float32,
  out_sharding: jax.P | None = None,
) -> jax.Array:
  """`jnp.einsum` of factors as they are, with a result of `dtype`."""
  return jnp.einsum(
    subscripts,
    *factors,
    precision=precision(*factors),
    preferred_element_type=dtype,
    out_sharding=out_sharding,
  )
