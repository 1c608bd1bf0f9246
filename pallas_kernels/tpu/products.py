"""Matrix products on a TPU: factors in bfloat16, or exactly in fp32."""

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Dimension numbers of x y, x y^T and x^T y.
NN: Final = ((1,), (0,)), ((), ())
NT: Final = ((1,), (1,)), ((), ())
TN: Final = ((0,), (0,)), ((), ())
_DTYPES: Final = jnp.bfloat16, jnp.float32


def check(**factors: jax.Array) -> None:
  """Raises NotImplementedError unless all are bfloat16, or all float32."""
  dtypes = {jnp.dtype(x.dtype) for x in factors.values()}
  if len(dtypes) > 1 or not dtypes <= {jnp.dtype(x) for x in _DTYPES}:
    given = ", ".join(f"{name} in {x.dtype}" for name, x in factors.items())
    raise NotImplementedError(
      f"{given}: kernels take all in bfloat16, or all in float32."
    )


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
  """Precision at which fp32 factors are not rounded to bfloat16."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(x: jax.Array, y: jax.Array, dimensions: Any) -> jax.Array:
  """Multiplies two matrices of one dtype, with sums in fp32."""
  return jax.lax.dot_general(
    x,
    y,
    dimensions,
    precision=precision(x.dtype),
    preferred_element_type=jnp.float32,
  )
