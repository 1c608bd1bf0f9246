"""Recall against softmax by hand, and the same from both ways of attending."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import recall
from tests.model import models

B, Q, N, C, R, S, K = 2, 7, 3, 6, 4, 20, 5


def test_is_the_mass_on_the_chosen_keys():
  rng = np.random.default_rng(0)
  q = rng.normal(size=(B, Q, N, C + R)).astype(np.float32)
  kv = 2 * rng.normal(size=(B, S, C + R)).astype(np.float32)
  start = rng.integers(0, 6, (B, Q)).astype(np.int32)
  end = start + rng.integers(6, 14, (B, Q)).astype(np.int32)
  end[0, 0] = start[0, 0]  # sees nothing
  indices = np.full((B, Q, K), -1, np.int32)
  expected = np.zeros((B, Q))
  for b, t in np.ndindex(B, Q):
    keys = np.arange(start[b, t], end[b, t])
    if not len(keys):
      continue
    chosen = np.sort(rng.permutation(len(keys))[:K])
    indices[b, t] = keys[chosen]
    logits = 0.4 * q[b, t] @ kv[b, keys].T
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected[b, t] = weights[:, chosen].sum(-1).mean()
  args: Any = map(jnp.asarray, (q, kv, indices, start, end))
  actual = recall.recall(*args, C, 0.4)
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  assert expected.max() - expected[0, 1:].min() > 0.2


def test_samples_evenly():
  places = jnp.arange(1000)[None]
  sampled = np.asarray(recall.sample(places))[0]
  assert 64 <= len(sampled) <= 127
  np.testing.assert_array_equal(np.diff(sampled), 15)
  assert sampled[0] == 7
  np.testing.assert_array_equal(recall.sample(places[:, :40]), places[:, :40])


@pytest.mark.slow
def test_both_ways_of_attending_agree():
  """The first layer has the same input, whatever the attention."""
  tokens = models.tokens(2, 32)

  @functools.partial(jax.jit, static_argnums=1)
  def losses(model, attention):
    return model.losses(
      tokens,
      models.POSITIONS,
      models.SEGMENTS,
      attention=attention,
      lm_loss=False,
      index_loss=True,
    )

  dense, sparse = (losses(models.model(), w) for w in ("dense", "sparse"))
  np.testing.assert_array_equal(dense.recall_queries, sparse.recall_queries)
  # Of the packed row: 11 - 8 and 17 - 8 queries see more than K keys.
  np.testing.assert_array_equal(dense.recall_queries.sum(1), [12, 24])
  counted = np.asarray(dense.recall_queries)
  first, other = (np.asarray(x.recall)[:, counted] for x in (dense, sparse))
  np.testing.assert_allclose(first[0], other[0], atol=1e-6)
  assert first.max() < 1
  assert first.min() > 0
  assert np.abs(first[1] - other[1]).max() > 1e-4
  assert dense.lm is None
  assert dense.mtp is None
