"""Bits of active heads, as threads make and use them, simulated in numpy."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper import fragments
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import active_bits
from tests.kernels import by_thread
from tests.kernels import simulated
from tests.kernels.simulated import memory

HEADS = active_bits.HEADS
BF16 = jnp.bfloat16


@contextlib.contextmanager
def warpgroup():
  with simulated.run_as(128, fragments), simulated.run_as(128, active_bits):
    yield


def random(seed):
  return np.random.default_rng(seed)


def is_active(words):
  """[2, ...] -> whether each head is active: [64, ...]."""
  heads = []
  for head in range(HEADS):
    word, h = divmod(head, 32)
    heads.append(words[word] >> (h // 2 + 16 * (h % 2)) & 1)
  return np.stack(heads) != 0


def some_words(seed, keys):
  """Bits of active heads, of which each head's and each key's differ."""
  return random(seed).integers(-(2**31), 2**31, (2, keys)).astype(np.int32)


def test_every_head_has_a_step():
  heads = [int(active_bits.head(jnp.int32(i))) for i in range(HEADS)]
  assert sorted(heads) == list(range(HEADS))


@pytest.mark.parametrize("columns", [8, 128])
def test_adds_heads_and_their_bits(columns):
  x, shape = random(0), (64, columns)
  similarity = x.normal(size=(HEADS, *shape)).astype(np.float32)
  # Zero is inactive, and as small as a normal number gets is active.
  small = np.array([0.0, -0.0, 2.0**-126, -(2.0**-126)], np.float32)
  similarity = np.where(
    x.random(similarity.shape) < 0.3,
    x.choice(small, similarity.shape),
    similarity,
  )
  half_w = x.normal(size=(HEADS, 64, 1)).astype(np.float32)
  words, step = [], 0
  with warpgroup():
    scores = by_thread.registers(np.zeros(shape, np.float32))
    for _ in range(2):
      halves = []
      for _ in range(2):
        bits = by_thread.words(np.zeros(shape, np.int16))
        for _ in range(16):
          head = int(active_bits.head(jnp.int32(step)))
          scores, bits = active_bits.add_head_registers(
            by_thread.registers(similarity[head]),
            by_thread.registers(np.broadcast_to(half_w[head], shape)),
            *(scores, bits),
          )
          step += 1
        halves.append(bits)
      words.append(active_bits.join_registers(*halves))
  words = np.stack([by_thread.matrix(x, np.int32) for x in words])
  np.testing.assert_array_equal(is_active(words), similarity > 0)
  relu = np.maximum(similarity, 0).astype(np.float64)
  np.testing.assert_allclose(
    by_thread.matrix(scores, np.float32), (2 * half_w * relu).sum(0), 1e-5, 1e-5
  )


@pytest.mark.parametrize("keys", [8, 128])
def test_heads_by_keys(keys):
  words, d_scores = some_words(0, keys), random(1).normal(size=keys)
  d_scores = d_scores.astype(BF16)
  with warpgroup():
    g = active_bits.heads_by_keys_registers(
      memory.Array(d_scores), memory.Array(words), keys
    )
  expected = np.where(is_active(words), d_scores[None], BF16(0))
  np.testing.assert_array_equal(by_thread.matrix(g, BF16), expected)


def test_keys_by_heads():
  words, d_scores = some_words(0, 64), random(1).normal(size=64).astype(BF16)
  with warpgroup():
    g = active_bits.keys_by_heads_registers(
      memory.Array(d_scores), memory.Array(words)
    )
  expected = np.where(is_active(words), d_scores[None], BF16(0)).T
  np.testing.assert_array_equal(by_thread.matrix(g, BF16), expected)


def test_nothing_is_left_of_a_key_that_is_not_seen():
  d_scores, words = np.full(64, np.nan, BF16), np.zeros((2, 64), np.int32)
  with warpgroup():
    arrays = memory.Array(d_scores), memory.Array(words)
    by_head = active_bits.heads_by_keys_registers(*arrays, 64)
    by_key = active_bits.keys_by_heads_registers(*arrays)
  for g in by_head, by_key:
    np.testing.assert_array_equal(by_thread.matrix(g, BF16), 0)
