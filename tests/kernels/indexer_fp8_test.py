"""Index queries and keys in 8 bits, against numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.indexer_topk import fp8
from tests.kernels import eight_bits


def numbers(*shape, dtype=jnp.bfloat16, seed=0):
  x = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
  return x.astype(dtype)


@pytest.mark.parametrize("width", [2, 64, 128])
def test_rotation_is_that_of_the_butterflies(width):
  x = numbers(5, 3, width)
  got, want = (
    np.asarray(y, np.float32) for y in (fp8.rotate(x), eight_bits.rotated(x))
  )
  # Sums in another order: now and then the other neighbour in bfloat16.
  np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-6)
  assert np.mean(got == want) > 0.99


def test_rotation_keeps_products():
  q, k = (
    numbers(7, 128, dtype=jnp.float32),
    numbers(9, 128, dtype=jnp.float32),
  )
  got = fp8.rotate(q) @ fp8.rotate(k).T
  np.testing.assert_allclose(got, q @ k.T, rtol=1e-4, atol=1e-4)


def test_rotation_of_three_numbers_is_refused():
  with pytest.raises(ValueError, match="power of 2"):
    fp8.rotate(numbers(5, 3))


def test_values_and_scales():
  size = 10.0 ** jnp.arange(-9, 9)[:, None, None]
  x = (numbers(18, 4, 128) * size).astype(jnp.bfloat16)
  values, scales = jax.jit(fp8.quantize)(x)
  want_values, want_scales = eight_bits.quantized(
    jax.jit(fp8.rotate)(x), eight_bits.LEAST["index"]
  )
  np.testing.assert_array_equal(scales, want_scales)
  np.testing.assert_array_equal(
    np.asarray(values, np.float32), want_values.astype(np.float32)
  )
  assert np.abs(np.asarray(values, np.float32)).max() <= 448


def test_a_greatest_number_of_448_needs_no_larger_scale():
  """Powers of two stay; what lies above takes the next one."""
  # Only the first row of the Hadamard matrix sees equal numbers: 448, 0, 0...
  level = 448 / 128**0.5
  x = jnp.full((3, 128), level) * jnp.array([0.99, 1.01, 4.04])[:, None]
  _, scales = fp8.quantize(x)
  np.testing.assert_array_equal(scales, [1, 2, 8])


def test_zeros_have_a_scale():
  values, scales = fp8.quantize(jnp.zeros((2, 128), jnp.bfloat16))
  np.testing.assert_array_equal(np.asarray(values, np.float32), 0)
  np.testing.assert_array_equal(scales, np.float32(2.0**-22))


def test_scores_stay_close():
  """A percent of their spread, with the scales where the module says."""
  q, k, w = (
    numbers(6, 8, 128, seed=1),
    numbers(50, 128, seed=2),
    numbers(6, 8),
  )
  relu = lambda q, k: jax.nn.relu(jnp.einsum("TMI,SI->TMS", q, k))
  f32 = lambda x: x.astype(jnp.float32)
  want = jnp.einsum("TMS,TM->TS", relu(f32(q), f32(k)), f32(w))
  (q, q_scale), (k, k_scale) = fp8.quantize(q), fp8.quantize(k)
  got = jnp.einsum("TMS,TM->TS", relu(f32(q), f32(k)), w * q_scale)
  got *= k_scale[None]
  np.testing.assert_array_less(jnp.abs(got - want).max(1), 0.2 * want.std(1))
  assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rounding_survives_a_compiler_that_undoes_conversions(dtype):
  """XLA on a GPU takes float32 -> e4m3 -> float32 for nothing, unless there is
  something between."""
  x = jax.ShapeDtypeStruct((64, 128), jnp.dtype(dtype))
  text = jax.jit(fp8.rounded).lower(x).as_text()
  back = re.findall(r"convert (%\S+) : \(tensor<64x128xf8E4M3FN>\)", text)
  kept = re.findall(r"(%\S+) = stablehlo.optimization_barrier", text)
  assert len(back) == 1 and back == kept
