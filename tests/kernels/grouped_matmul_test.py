"""grouped_matmul against a loop, and implementations against the reference."""

import functools
from unittest import mock
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.ops.grouped_matmul import chunked_xla
from pallas_kernels.ops.grouped_matmul import ragged_dot
from pallas_kernels.ops.grouped_matmul import reference

from . import inputs
from . import rows

R, E, D, F = 13, 4, 6, 5
SIZES = (
  (5, 0, 7, 1),
  (13, 0, 0, 0),
  (0, 0, 0, 13),
  (4, 4, 4, 1),
  (0, 3, 0, 6),  # four rows of no group
  (0, 0, 0, 0),
)
OPS = {
  "ragged_dot": ragged_dot.grouped_matmul,
  "chunked_xla": chunked_xla.grouped_matmul,
} | {
  f"blocks of {block}": functools.partial(
    chunked_xla.blocked_matmul, block=block
  )
  for block in (1, 4, 64)
}


def arrays(dtype=jnp.float32):
  """Rows, matrices, and a gradient of the results."""
  return (
    inputs.normal(0, R, D, dtype=dtype),
    inputs.normal(1, E, D, F, dtype=dtype),
    inputs.normal(2, R, F, dtype=dtype),
  )


@functools.cache  # tests share what they compile
def compiled(name):
  op = reference.grouped_matmul if name == "reference" else OPS[name]

  def value_and_vjp(x, w, d_y, sizes):
    y, pullback = jax.vjp(lambda x, w: op(x, w, sizes), x, w)
    return y, *pullback(d_y)

  return jax.jit(value_and_vjp)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_reference_matches_a_loop(sizes):
  x, w, d_y = (np.asarray(a, np.float64) for a in arrays())
  y, d_x, d_w = np.zeros((R, F)), np.zeros((R, D)), np.zeros((E, D, F))
  for r, group in enumerate(np.repeat(np.arange(E), sizes)):
    y[r] = x[r] @ w[group]
    d_x[r] = w[group] @ d_y[r]
    d_w[group] += np.outer(x[r], d_y[r])
  actual = compiled("reference")(*arrays(), jnp.asarray(sizes))
  for result, expected in zip(actual, (y, d_x, d_w), strict=True):
    rows.assert_close(result, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPS)
def test_matches_the_reference(name, sizes, dtype):
  args = *arrays(dtype), jnp.asarray(sizes)
  y, *gradients = compiled(name)(*args)
  expected, *expected_gradients = compiled("reference")(*args)
  assert y.dtype == expected.dtype == dtype
  assert np.isfinite(np.asarray(y, np.float32)).all()
  tolerance = 2e-6 if dtype == "float32" else 1e-2
  in_group = slice(sum(sizes))
  rows.assert_close(y[in_group], expected[in_group], tolerance, tolerance)
  for actual, gradient in zip(gradients, expected_gradients, strict=True):
    assert actual.dtype == dtype
    rows.assert_close(actual, gradient, tolerance, tolerance)


@pytest.mark.parametrize(
  "platform, name",
  [
    ("cpu", "chunked_xla"),
    ("gpu", "chunked_xla"),
    ("tpu", "ragged_dot"),
    ("rocm", "chunked_xla"),
  ],
)
def test_each_platform_takes_its_own_without_a_warning(platform, name):
  x, w, _ = arrays()
  with (
    mock.patch.object(dispatch, "platform", return_value=platform),
    dispatch.record() as chosen,
    warnings.catch_warnings(),
  ):
    warnings.simplefilter("error")
    pallas_kernels.grouped_matmul(x, w, jnp.asarray(SIZES[0]))
  assert chosen == {"grouped_matmul": [name]}
