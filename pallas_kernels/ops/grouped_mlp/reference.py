"""The definition. Everything else in this folder must agree with it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import contraction


def grouped_mlp(
  x: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  gate: Float[Array, "X D F"],
  up: Float[Array, "X D F"],
  down: Float[Array, "X F D"],
  first: Int[Array, ""],
) -> Float[Array, "R D"]:
  """See `api.grouped_mlp`. Holds [R, D, F] in memory."""
  row_R = jnp.arange(len(x))
  group_R = jnp.searchsorted(jnp.cumsum(sizes), row_R, side="right")
  # Of no group: matrices of zeros.
  place_R = jnp.where(group_R < len(sizes), first + group_R, len(gate))

  def multiply(x, w):
    w_R = w.at[place_R].get(mode="fill", fill_value=0)
    return contraction.einsum("RD,RDF->RF", x, w_R).astype(x.dtype)

  return multiply(jax.nn.silu(multiply(x, gate)) * multiply(x, up), down)
