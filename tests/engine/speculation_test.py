"""Drafts change how fast tokens come, and nothing else."""

import dataclasses

import numpy as np
import pytest

import dsa_jax
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import SamplingParams
from tests.engine import engines
from tests.engine.engine_test import same
from tests.model import models


def hot(count, seed, temperature, max_tokens=24):
  """So hot that target and draft, of the same noise, often agree."""
  rng = np.random.default_rng(seed)
  return [
    Request(
      rng.integers(0, 64, int(rng.integers(1, 30))),
      SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=i),
    )
    for i in range(count)
  ]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 1e4])
def test_samples_are_those_without_drafts(temperature):
  """However many are accepted: rows of rejected ones are never read."""
  requests = hot(12, seed=1, temperature=temperature)
  plain = engines.run(engines.engine(), requests)
  engine = engines.engine(speculate=True)
  for a, b in zip(engines.run(engine, requests), plain):
    same(a, b, atol=1e-5)
  accepted = engine.stats.accepted / engine.stats.drafts
  low, high = {0.2: (0.01, 0.2), 1.0: (0.2, 0.6), 1e4: (0.98, 1)}[temperature]
  assert low <= accepted <= high
  # A draft is verified at every step but a sequence's first and last.
  steps = engine.stats.decoded_tokens - engine.stats.accepted
  assert steps - 24 <= engine.stats.drafts < steps


def test_greedy_and_sampled_slots_speculate_side_by_side():
  requests = [
    Request(r.tokens, dataclasses.replace(r.params, temperature=t))
    for r, t in zip(hot(12, 2, 1.0), [0, 1e4, 0, 2.0] * 3)
  ]
  plain = engines.run(engines.engine(), requests)
  engine = engines.engine(speculate=True)
  for a, b in zip(engines.run(engine, requests), plain):
    same(a, b, atol=1e-5)


def test_as_many_drafts_are_right_in_company_as_alone():
  requests = hot(6, seed=3, temperature=1.0)
  alone = [0, 0]
  for request in requests:
    engine = engines.engine(speculate=True)
    engines.run(engine, [request])
    alone[0] += engine.stats.drafts
    alone[1] += engine.stats.accepted
  engine = engines.engine(speculate=True)
  engines.run(engine, requests)
  assert [engine.stats.drafts, engine.stats.accepted] == alone


def test_a_token_that_stops_is_the_last_though_its_draft_was_right():
  (request,) = hot(1, seed=4, temperature=1e4)
  (whole,) = engines.run(engines.engine(speculate=True), [request])
  for at in range(3, 12):
    stop = int(whole.tokens[at])
    if stop in whole.tokens[:at]:
      continue
    params = dataclasses.replace(request.params, stop_ids=(stop,))
    (cut,) = engines.run(
      engines.engine(speculate=True), [Request(request.tokens, params)]
    )
    np.testing.assert_array_equal(cut.tokens, whole.tokens[: at + 1])
    assert cut.finish == "stop"


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4])
def test_no_more_tokens_come_than_were_asked_for(max_tokens):
  requests = hot(4, seed=5, temperature=1e4, max_tokens=max_tokens)
  for result in engines.run(engines.engine(speculate=True), requests):
    assert len(result.tokens) == max_tokens
    assert result.finish == "length"


def test_a_model_without_mtp_cannot_speculate():
  cfg = dataclasses.replace(models.CONFIG, num_mtp_layers=0)
  with pytest.raises(ValueError, match="speculate=True, but .* no MTP block"):
    dsa_jax.Engine(models.model(cfg), speculate=True)
