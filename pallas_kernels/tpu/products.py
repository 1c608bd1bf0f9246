"""Matrix products on a TPU: factors in bfloat16, or exactly in fp32."""

from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import contraction

# Dimension numbers of x y, x y^T and x^T y.
NN: Final = ((1,), (0,)), ((), ())
NT: Final = ((1,), (1,)), ((), ())
TN: Final = ((0,), (0,)), ((), ())


def check(**factors: jax.Array) -> None:
  """Raises NotImplementedError unless all are bfloat16, or all float32."""
  dtypes = {x.dtype for x in factors.values()}
  if dtypes not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")}):
    given = ", ".join(f"{name} in {x.dtype}" for name, x in factors.items())
    raise NotImplementedError(
      f"{given}: kernels take all in bfloat16, or all in float32."
    )


def exact_bytes(numbers: int, itemsize: int) -> int:
  """Bytes of VMEM beside the factors of a product of so many numbers.

  An exact product splits each in three of bfloat16.
  """
  return 3 * 2 * numbers if itemsize == 4 else 0


def dot(x: jax.Array, y: jax.Array, dimensions: Any) -> jax.Array:
  """Multiplies two matrices of one dtype, with sums in fp32."""
  return jax.lax.dot_general(
    x,
    y,
    dimensions,
    precision=contraction.precision(x, y),
    preferred_element_type=jnp.float32,
  )
