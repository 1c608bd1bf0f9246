"""Sequences that begin alike share pages, and get what they would get alone."""

import numpy as np
import pytest

from dsa_jax.engine import request as request_lib
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import SamplingParams
from tests.engine import engines
from tests.engine.engine_test import same


def prompt(length, seed=0):
  return np.random.default_rng(seed).integers(0, 64, length)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("length", [4, 8, 9, 31, 32, 33])
def test_a_prompt_that_is_cached_gives_what_it_gave(length, speculate):
  """The whole of it, too, and at every place in a page."""
  request = Request(prompt(length), SamplingParams(max_tokens=9, seed=5))
  engine = engines.engine(speculate=speculate)
  (first,) = engines.run(engine, [request])
  computed = engine.stats.prefill_tokens
  assert (first.cached_tokens, computed) == (0, length - 1)
  for _ in range(2):
    (again,) = engines.run(engine, [request])
    same(again, first, atol=1e-6)
    # Of a full page, MTP's last row knows the token after it.
    assert again.cached_tokens == (length - 1) // 4 * 4
  assert engine.stats.prefill_tokens == computed + 2 * ((length - 1) % 4)
  assert engine.stats.found_tokens == 2 * ((length - 1) // 4 * 4)


@pytest.mark.parametrize("speculate", [False, True])
def test_prompts_that_begin_alike_give_what_each_gives_alone(speculate):
  beginning = prompt(30)
  requests = [
    Request(
      np.concatenate([beginning[: 30 - i], prompt(12, seed=i)]),
      SamplingParams(max_tokens=7, seed=i),
    )
    for i in range(12)
  ]
  engine = engines.engine(speculate=speculate)
  together = engines.run(engine, requests)
  assert engine.stats.found_tokens > 100
  for request, result in zip(requests, together):
    (alone,) = engines.run(engines.engine(speculate=speculate), [request])
    same(result, alone, atol=1e-6)


def test_a_conversation_finds_what_it_has_generated():
  engine = engines.engine()
  (first,) = engines.run(
    engine, [Request(prompt(10), SamplingParams(max_tokens=13, seed=1))]
  )
  longer = np.concatenate([first.prompt, first.tokens, prompt(5, seed=9)])
  request = Request(longer, SamplingParams(max_tokens=5, seed=2))
  (second,) = engines.run(engine, [request])
  assert second.cached_tokens == 20  # of 22 that were cached
  (alone,) = engines.run(engines.engine(), [request])
  same(second, alone, atol=1e-6)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("length", [1, 2, 17, 29])
def test_a_group_is_one_prefill(length, speculate):
  params = SamplingParams(max_tokens=11, seed=3, n=8)
  engine = engines.engine(slots=8, pool_tokens=1024, speculate=speculate)
  results = engine.submit(Request(prompt(length), params)).results()
  assert engine.stats.prefill_tokens == length - 1
  assert engine.stats.found_tokens == 7 * (length - 1)
  assert len({tuple(r.tokens) for r in results}) == 8  # each has its own seed
  for seed, result in zip(request_lib.seeds(params), results):
    alone = SamplingParams(max_tokens=11, seed=seed)
    engine = engines.engine(slots=8, pool_tokens=1024, speculate=speculate)
    same(result, *engines.run(engine, [Request(prompt(length), alone)]), 1e-6)


def test_a_group_larger_than_the_slots_is_one_prefill():
  params = SamplingParams(max_tokens=11, seed=3, n=15)
  engine = engines.engine()
  results = engine.submit(Request(prompt(25), params)).results()
  assert engine.stats.prefill_tokens == 24
  wide = engines.engine(slots=15, pool_tokens=2048)
  expected = wide.submit(Request(prompt(25), params)).results()
  for a, b in zip(results, expected):
    same(a, b, atol=1e-6)


def test_log_probs_of_a_prompt_are_those_of_teacher_forcing():
  """They come whole, whatever is cached."""
  params = SamplingParams(max_tokens=3, seed=0, n=3, prompt_log_probs=True)
  engine = engines.engine()
  for length in (1, 2, 12, 26, 26, 50):
    tokens = prompt(length)
    results = engine.submit(Request(tokens, params)).results()
    of_all = engines.log_softmax(engines.logits([tokens])[0])
    expected = of_all[np.arange(length - 1), tokens[1:]]
    for result in results:
      found = result.prompt_log_probs
      assert found is not None
      np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
