"""What attention's weights are recomputed from, and their logits' gradient."""

import math
from typing import Final

import jax.numpy as jnp
from jaxtyping import Array, Float

LOG2E: Final = math.log2(math.e)  # the hardware computes powers of two


def lse_and_delta(
  out: Float[Array, "B T N X"],
  lse: Float[Array, "B T N"],
  d_out: Float[Array, "B T N X"],
  d_lse: Float[Array, "B T N"],
  *,
  base2: bool = False,
) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
  """Computes the numbers of each query that a backward pass needs.

    weights = exp(logits - lse)
    d logits = weights (d weights - delta)

  A query that sees no key gets inf and 0, so that its weights are 0 whatever
  its d_lse: its lse is -inf, of which most functions have no finite gradient.

  Args:
    out: Result of the forward pass.
    lse: Logsumexp of the forward pass, natural; -inf if no key is seen.
    d_out: Cotangent of `out`.
    d_lse: Cotangent of `lse`; arbitrary if no key is seen.
    base2: Whether to return lse in base 2, for `exp2`.

  Returns:
    lse and delta.
  """
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
  dead = jnp.isneginf(lse)
  delta = jnp.where(dead, 0.0, delta - d_lse)  # d lse enters as -delta does
  return jnp.where(dead, jnp.inf, lse * LOG2E if base2 else lse), delta


def bias(lse: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
  """Bias of logits in base 2 that makes them weights of `exp2`.

  It is -inf for a query that sees no key, whose lse is -inf.
  """
  return jnp.where(jnp.isneginf(lse), -jnp.inf, -lse * LOG2E)
