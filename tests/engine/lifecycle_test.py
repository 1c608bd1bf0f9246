"""Sequences lose their pages, are cancelled, and outlive their weights."""

import dataclasses

from flax import nnx
import jax
import numpy as np
import pytest

from dsa_jax.engine.request import Request
from tests.engine import engines
from tests.engine.engine_test import same
from tests.model import models


def is_empty(engine) -> bool:
  """Whether all slots are free, and all pages nobody's."""
  stats, pages = engine.stats, engine._scheduler._pages
  return stats.waiting == stats.running == 0 and stats.free_pages == sum(
    p.count for p in pages
  )


@pytest.mark.parametrize("speculate", [False, True])
def test_sequences_that_lose_their_pages_go_on_as_if_they_had_not(speculate):
  requests = [
    Request(request.tokens[:24], request.params)
    for request in engines.requests(18, seed=4, max_tokens=40, stop_ids=())
  ]
  expected = engines.run(engines.engine(speculate=speculate), requests)
  # Six slots, but pages for two or three sequences.
  tight = engines.engine(pool_tokens=128, speculate=speculate)
  results = engines.run(tight, requests)
  assert tight.stats.preemptions > 3
  assert sum(r.preemptions for r in results) == tight.stats.preemptions
  for result, whole in zip(results, expected):
    same(result, whole, atol=1e-5)
  assert is_empty(tight)


def test_what_is_cancelled_is_gone_and_harms_no_other():
  requests = engines.requests(30, seed=6)
  expected = engines.run(engines.engine(), requests)
  engine = engines.engine()
  rng = np.random.default_rng(0)
  handles = [engine.submit(request) for request in requests]
  doomed = set(rng.choice(30, 12, replace=False).tolist())
  left = sorted(doomed)
  while engine.step():
    if left and rng.random() < 0.7:
      handles[left.pop(0)].cancel()
  for i, (handle, whole) in enumerate(zip(handles, expected)):
    (result,) = handle.results()
    if i in doomed and result.finish == "cancelled":
      T = len(result.tokens)
      np.testing.assert_array_equal(result.tokens, whole.tokens[:T])
      np.testing.assert_array_equal(result.log_probs, whole.log_probs[:T])
    else:
      same(result, whole, atol=1e-6)
  assert is_empty(engine)


@pytest.fixture
def compiled():
  """A function that notes what is compiled from its call on."""
  names: list[str] = []

  def note(event: str, duration_secs: float, **kwargs: str | int):
    del duration_secs
    if event.endswith("backend_compile_duration"):
      names.append(event)

  def begin():
    jax.monitoring.register_event_duration_secs_listener(note)
    return names

  yield begin
  jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize(
  "speculate", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_thousand_requests_leak_nothing_and_compile_nothing(
  speculate, compiled
):
  engine = engines.engine(pool_tokens=128, speculate=speculate)
  engine.warm_up()
  names = compiled()
  rng = np.random.default_rng(7)
  live, done = [], 0
  while done < 1000:
    for request in engines.requests(int(rng.integers(0, 5)), seed=done):
      params = dataclasses.replace(
        request.params,
        n=int(rng.choice([1, 1, 1, 5])),
        max_tokens=int(rng.integers(1, 40)),
        prompt_log_probs=bool(rng.random() < 0.1),
      )
      live.append(engine.submit(Request(request.tokens, params)))
    engine.step()
    for handle in live:
      if rng.random() < 0.04:
        handle.cancel()
    done += sum(len(h.sequences) for h in live if h.done)
    live = [h for h in live if not h.done]
  for handle in live:
    handle.cancel()
  engine.step()
  assert not engine.step()
  assert is_empty(engine)
  assert not names
  assert engine.stats.preemptions > 0


@pytest.mark.parametrize("speculate", [False, True])
def test_no_row_of_older_weights_is_read(speculate):
  other = models.model(dataclasses.replace(models.CONFIG, init_std=0.22))
  requests = engines.requests(
    10, seed=8, max_tokens=12, temperature=1.0, stop_ids=()
  )
  requests = [
    Request(r.tokens[:30], dataclasses.replace(r.params, top_k=0, top_p=1.0))
    for r in requests
  ]
  engine = engines.engine(speculate=speculate)
  engines.run(engine, requests)  # their prompts are cached
  handles = [engine.submit(request) for request in requests]
  for _ in range(2):
    engine.step()
  engine.swap_weights(nnx.split(other)[1], version=3)
  results = [handle.results()[0] for handle in handles]
  versions = {tuple(sorted(set(r.versions.tolist()))) for r in results}
  assert (0, 3) in versions and (3,) in versions
  sequences = [np.concatenate([r.prompt, r.tokens]) for r in results]
  by_version = {
    version: engines.logits(sequences, model=model)
    for version, model in ((0, models.model()), (3, other))
  }
  for i, result in enumerate(results):
    P = len(result.prompt)
    for t, (token, version) in enumerate(zip(result.tokens, result.versions)):
      logits = by_version[int(version)][i, P - 1 + t]
      expected = engines.log_softmax(logits)[token]
      np.testing.assert_allclose(result.untruncated[t], expected, atol=1e-5)


def test_weights_of_another_model_are_refused_and_change_nothing():
  engine = engines.engine()
  other = dataclasses.replace(models.CONFIG, kv_rank=24)
  requests = engines.requests(3, seed=11)
  expected = engines.run(engine, requests)
  with pytest.raises(ValueError, match="attention.k_b_CNH of shape"):
    engine.swap_weights(nnx.split(models.model(other))[1], version=1)
  with pytest.raises(ValueError, match="version=-1"):
    engine.swap_weights(nnx.split(models.model())[1], version=-1)
  for a, b in zip(engines.run(engine, requests), expected):
    same(a, b, atol=1e-6)
  assert engine.version == 0
