"""How prompts are cut, and slots are filled, changes how fast tokens come."""

import numpy as np
import pytest

from dsa_jax.engine.request import Request
from dsa_jax.engine.request import SamplingParams
from tests.engine import engines
from tests.engine.engine_test import same


@pytest.mark.parametrize(
  "sizes",
  [
    dict(chunk=1),
    pytest.param(dict(chunk=7, page=8), marks=pytest.mark.slow),
    pytest.param(dict(chunk=64, page=16), marks=pytest.mark.slow),
    pytest.param(dict(chunk=5, lanes=3), marks=pytest.mark.slow),
    pytest.param(dict(chunk=12, page=1), marks=pytest.mark.slow),
    pytest.param(dict(chunk=12, steps=1), marks=pytest.mark.slow),
    pytest.param(dict(chunk=12, steps=17), marks=pytest.mark.slow),
  ],
)
def test_chunks_pages_and_calls_change_no_sample(sizes):
  """Later chunks select keys of earlier ones."""
  requests = engines.requests(12, seed=31)
  expected = engines.run(engines.engine(), requests)
  for a, b in zip(engines.run(engines.engine(**sizes), requests), expected):
    same(a, b, atol=1e-5)


@pytest.mark.parametrize(
  "sigma, times", [(1.3, 1.8), (0, 0.9)], ids=["log-normal", "alike"]
)
def test_slots_are_not_idle_while_others_are_long(sigma, times):
  """Steps of batches, each as long as its longest row, over the engine's."""
  rng = np.random.default_rng(0)
  lengths = np.exp(rng.normal(0, sigma, 60))
  lengths = np.maximum(lengths * 20 / lengths.mean(), 1).astype(int)
  assert sigma == 0 or lengths.max() / lengths.mean() > 4
  engine = engines.engine(pool_tokens=2048)
  prompt = rng.integers(0, 64, 9)
  requests = [
    Request(prompt, SamplingParams(max_tokens=int(T), seed=i))
    for i, T in enumerate(lengths)
  ]
  results = engines.run(engine, requests)
  assert [len(r.tokens) for r in results] == lengths.tolist()
  batches = lengths.reshape(-1, 6).max(1).sum()
  assert batches / engine.stats.steps >= times
