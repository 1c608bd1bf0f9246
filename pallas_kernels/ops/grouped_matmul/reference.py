"""The definition. Everything else in this folder must agree with it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import contraction


def grouped_matmul(
  x: Float[Array, "R D"], w: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
  """See `api.grouped_matmul`. Holds [R, D, F] in memory; 0 without a group."""
  f32 = jnp.float32
  row_R = jnp.arange(len(x))
  group_R = jnp.searchsorted(jnp.cumsum(sizes), row_R, side="right")
  # From fp32, so that the gradient of a matrix is summed in fp32.
  w_RDF = w.astype(f32).at[group_R].get(mode="fill", fill_value=0)
  y_RF = contraction.einsum("RD,RDF->RF", x, w_RDF.astype(w.dtype))
  return y_RF.astype(x.dtype)
