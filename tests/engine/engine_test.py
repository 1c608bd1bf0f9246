"""The engine's samples are those of each sequence alone, and of training."""

import numpy as np
import pytest

from tests.engine import engines


def expected_log_probs(results, requests, **kwargs):
  """Of each sampled token: over all ids, and over those that were kept."""
  sequences = [np.concatenate([r.prompt, r.tokens]) for r in results]
  for result, request, of_all in zip(
    results, requests, engines.logits(sequences, **kwargs)
  ):
    P, T = len(result.prompt), len(result.tokens)
    logits = of_all[P - 1 : P - 1 + T]
    temperature = request.params.temperature
    untruncated = engines.log_softmax(logits / (temperature or 1))
    cut = untruncated.copy()
    if result.kept is not None:
      indptr, ids = result.kept
      mask = np.full(cut.shape, -np.inf)
      for t in range(T):
        mask[t, ids[indptr[t] : indptr[t + 1]]] = 0
      cut = engines.log_softmax(cut + mask)
    at = np.arange(T), result.tokens
    yield logits, untruncated[at], cut[at]


@pytest.mark.parametrize(
  "attention", ["sparse", pytest.param("dense", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("speculate", [False, True])
def test_log_probs_are_those_of_teacher_forcing(speculate, attention):
  count = 200 if attention == "sparse" else 24
  requests = engines.requests(count)
  engine = engines.engine(speculate=speculate, attention=attention)
  results = engines.run(engine, requests)
  expected = expected_log_probs(results, requests, attention=attention)
  for request, result, (logits, untruncated, cut) in zip(
    requests, results, expected
  ):
    np.testing.assert_allclose(
      result.untruncated, untruncated, atol=1e-5, rtol=0
    )
    np.testing.assert_allclose(result.log_probs, cut, atol=1e-5, rtol=0)
    if request.params.temperature == 0:
      np.testing.assert_array_equal(result.tokens, logits.argmax(-1))
    stops = np.isin(result.tokens, request.params.stop_ids)
    assert not stops[:-1].any()
    assert result.finish == ("stop" if stops[-1] else "length")
    assert stops[-1] or len(result.tokens) == request.params.max_tokens
  assert len({len(r.tokens) for r in results}) > 8


def same(a, b, atol=0.0):
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_allclose(a.log_probs, b.log_probs, atol=atol, rtol=0)
  np.testing.assert_allclose(a.untruncated, b.untruncated, atol=atol, rtol=0)
  np.testing.assert_array_equal(a.experts, b.experts)
  assert (a.kept is None) == (b.kept is None)
  if a.kept is not None:
    for x, y in zip(a.kept, b.kept):
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("speculate", [False, True])
def test_a_request_is_the_same_alone_and_in_any_company(speculate):
  requests = engines.requests(50, seed=1)
  make = lambda: engines.engine(speculate=speculate)
  alone = []
  for request in requests:
    alone += engines.run(make(), [request])
  rng = np.random.default_rng(2)
  engine, order = make(), rng.permutation(50)
  handles = {}
  for i in order:  # they come while others run
    handles[i] = engine.submit(requests[i])
    for _ in range(rng.integers(0, 3)):
      engine.step()
  for i, handle in handles.items():
    same(handle.results()[0], alone[i])
  assert engine.stats.preemptions == 0
