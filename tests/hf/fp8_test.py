"""FP8 by blocks, against loops."""

import ml_dtypes
import numpy as np
import pytest

from dsa_jax.hf import fp8

SHAPE = (300, 200)


def blocks():
  for i in range(3):
    for j in range(2):
      yield (i, j), np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]


def test_dequantises_exactly():
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 256, SHAPE).astype(np.uint8)
  bits[(bits & 127) == 127] = 0  # no NaN
  weight = bits.view(ml_dtypes.float8_e4m3fn)
  scale = rng.uniform(1e-6, 3, (3, 2)).astype(np.float32)
  actual = fp8.dequantise(weight, scale)
  assert actual.dtype == np.float32
  for at, block in blocks():
    expected = np.float32(
      weight[block].astype(np.float64) * np.float64(scale[at])
    )
    np.testing.assert_array_equal(actual[block], expected)
  powers = np.exp2(rng.integers(-9, 9, (3, 2))).astype(ml_dtypes.float8_e8m0fnu)
  np.testing.assert_array_equal(
    fp8.dequantise(weight, powers),
    fp8.dequantise(weight, powers.astype(np.float32)),
  )


def test_scales_are_the_least_powers_of_two():
  rng = np.random.default_rng(1)
  values = rng.normal(size=SHAPE).astype(np.float32)
  values[:128, :128] = 0
  values[128, 0] = 448 * 4.0  # exactly what 4 allows
  values[0, 128] = np.nextafter(np.float32(448), np.float32(449))
  weight, scale = fp8.quantise(values)
  assert scale[0, 0] == 1 and (scale[1, 0], scale[0, 1]) == (4, 2)
  for at, block in blocks():
    largest = np.abs(values[block]).max()
    assert np.log2(scale[at]) % 1 == 0
    assert largest <= 448 * scale[at]
    assert largest == 0 or largest > 224 * scale[at]
    back = weight[block].astype(np.float32) * scale[at]
    # Half of the last of 3 bits, or of the smallest of all.
    bound = np.maximum(np.abs(values[block]) * 2**-4, scale[at] * 2**-10)
    assert (np.abs(back - values[block]) <= bound).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_known_scales_bring_back_what_was(dtype):
  rng = np.random.default_rng(2)
  bits = rng.integers(0, 126, SHAPE).astype(np.uint8)
  bits[128:256, :128] %= 120  # a block without the largest values
  weight = bits.view(ml_dtypes.float8_e4m3fn)
  scale = rng.uniform(1e-3, 3, (3, 2)).astype(np.float32)
  values = fp8.dequantise(weight, scale).astype(dtype)
  values[0, 199] += np.asarray(1.0, dtype)  # block (0, 1) was trained
  actual, scales = fp8.quantise(values, scale)
  for at, block in blocks():
    if at == (0, 1):
      assert np.log2(scales[at]) % 1 == 0
    else:
      assert scales[at] == scale[at]
      np.testing.assert_array_equal(actual[block].view(np.uint8), bits[block])


def test_scales_that_are_none_are_not_used():
  values = np.ones((130, 128), np.float32)
  known = np.array([[np.inf], [0]], np.float32)
  weight, scale = fp8.quantise(values, known)
  np.testing.assert_array_equal(fp8.dequantise(weight, scale), values)
