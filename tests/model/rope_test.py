"""Rotary position against complex numbers, YaRN against its definition."""

import dataclasses
import math

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import config as config_lib
from dsa_jax import rope
from tests.model import models


def rotated(x_R, position, frequency, interleaved):
  """Each pair as a complex number, turned."""
  half = len(x_R) // 2
  pairs = [
    (2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)
  ]
  y_R = np.zeros(len(x_R))
  for (a, b), f in zip(pairs, frequency):
    z = complex(x_R[a], x_R[b]) * np.exp(1j * position * f)
    y_R[a], y_R[b] = z.real, z.imag
  return y_R


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotates_pairs(interleaved):
  cfg = dataclasses.replace(models.CONFIG, rope_head_dim=8, rope_theta=100.0)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
  positions = rng.integers(0, 50, (2, 5)).astype(np.int32)
  cos, sin = rope.angles(jnp.asarray(positions), cfg)
  y = rope.rotate(jnp.asarray(x), cos, sin, interleaved=interleaved)
  without_heads = rope.rotate(
    jnp.asarray(x[:, :, 0]), cos, sin, interleaved=interleaved
  )
  frequency = [100.0 ** (-2 * i / 8) for i in range(4)]
  for b, t, n in np.ndindex(2, 5, 3):
    expected = rotated(x[b, t, n], positions[b, t], frequency, interleaved)
    np.testing.assert_allclose(y[b, t, n], expected, atol=1e-5)
  np.testing.assert_array_equal(without_heads, y[:, :, 0])


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
  yarn = config_lib.YarnConfig(
    factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=0.5
  )
  cfg = dataclasses.replace(
    models.CONFIG, rope_head_dim=64, index_head_dim=64, yarn=yarn
  )
  position = jnp.array([[1]])
  cos, sin = rope.angles(position, cfg)
  scale = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
  np.testing.assert_allclose(np.hypot(cos, sin), scale, rtol=1e-6)
  angle = np.arctan2(sin, cos)[0, 0]
  plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
  # 32 turns in 4096 tokens: pair 10.47; 1 turn: pair 22.51 (rounded outward).
  np.testing.assert_allclose(angle[:11], plain[:11], rtol=1e-4)
  np.testing.assert_allclose(angle[23:], plain[23:] / 40, rtol=1e-4)
  ramp = (np.arange(10, 24) - 10) / 13
  between = plain[10:24] * (1 - ramp) + plain[10:24] / 40 * ramp
  np.testing.assert_allclose(angle[10:24], between, rtol=1e-4)


def test_a_factor_of_one_is_plain_rope():
  plain = rope.angles(jnp.arange(9)[None], models.CONFIG)
  longer = dataclasses.replace(
    models.CONFIG, yarn=config_lib.YarnConfig(original_context=8)
  )
  chex.assert_trees_all_equal(rope.angles(jnp.arange(9)[None], longer), plain)


@pytest.mark.parametrize(
  ("theta", "original", "share"),
  [
    # One turn in 3 tokens would be before the first pair, at -2: no pair is
    # slowed.
    (1e4, 3, 0.0),
    # 32 turns in 2^20 tokens would be after the last, at 118: every pair is.
    (10.0, 2**20, 1.0),
  ],
)
def test_a_ramp_of_yarn_that_falls(theta, original, share):
  """As DeepSeek's code and transformers have it: (i - low) / (high - low)."""
  cfg = dataclasses.replace(
    models.CONFIG,
    rope_head_dim=64,
    index_head_dim=64,
    rope_theta=theta,
    yarn=config_lib.YarnConfig(factor=4.0, original_context=original),
  )
  cos, sin = rope.angles(jnp.array([[1]]), cfg)
  plain = theta ** (-np.arange(0, 64, 2) / 64)
  np.testing.assert_allclose(
    np.arctan2(sin, cos)[0, 0], plain * (1 - 0.75 * share), rtol=1e-5
  )
