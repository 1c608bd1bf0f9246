"""What is added over a token's experts is added in fp32, and rounded once."""

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax import experts
from dsa_jax import parameter

B, T, D, F, E, J = 2, 16, 32, 24, 12, 8


def inputs():
  rng = np.random.default_rng(0)
  x, d_y = rng.normal(size=(2, B, T, D)).astype("bfloat16")
  chosen = np.argsort(rng.random((B, T, E)))[..., :J].astype(np.int32)
  weights = rng.random((B, T, J), np.float32)
  matrices = [
    parameter.rounded(jnp.asarray(rng.normal(size=shape)), "bfloat16")
    for shape in ((E, D, F), (E, D, F), (E, F, D))
  ]
  return x, d_y.astype(np.float32), chosen, weights, matrices


@jax.jit
def output_and_gradient(x, d_y, chosen, weights, matrices):
  y, pullback = jax.vjp(
    lambda x: experts.routed_experts(
      *(x, chosen, weights, *matrices), experts_axis=None, ffn_axis=None
    ),
    x,
  )
  return y, pullback(d_y)[0]


def test_a_token_is_the_sum_of_what_each_expert_makes_of_it():
  """By itself, an expert adds nothing: its rounding is what it has."""
  x, d_y, chosen, weights, matrices = inputs()
  y, d_x = output_and_gradient(x, d_y, chosen, weights, matrices)
  assert y.dtype == jnp.float32 and d_x.dtype == jnp.bfloat16
  sums = np.zeros((2, B, T, D))
  for j in range(J):
    one, weight = chosen[..., j : j + 1], weights[..., j : j + 1]
    of_y, _ = output_and_gradient(x, d_y, one, np.ones_like(weight), matrices)
    _, of_x = output_and_gradient(x, d_y, one, weight, matrices)
    assert (of_y == of_y.astype("bfloat16")).all()
    sums += [weight * np.float64(of_y), np.float64(of_x)]
  scale = np.abs(sums).max(-1, keepdims=True)
  np.testing.assert_allclose(y / scale[0], sums[0] / scale[0], atol=1e-6)
  # Rounded once; of a tie, the sum's last bit in fp32 decides.
  rounded = sums[1].astype("bfloat16")
  assert np.mean(np.asarray(d_x) == rounded) > 0.999
