"""What counts as a right answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsa_jax
from tests.model import models
from tests.train import runs
from train import evaluation
from train.learn import step as step_lib


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_an_answer_is_right_if_all_of_its_tokens_are(attention):
  cfg = runs.ONE_LAYER
  model, init = step_lib.init(cfg, 0)
  shapes = jax.eval_shape(init, jax.random.key(0))
  params, bias = models.filled(shapes, cfg.init_std)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 256, (2, 32)).astype(np.int32)
  segments = np.ones((2, 32), np.int32)
  positions = np.tile(np.arange(32, dtype=np.int32), (2, 1))
  logits = jax.jit(
    lambda: model.merge(params, bias)(tokens, attention=attention)
  )
  best = np.asarray(logits().argmax(-1))
  at = rng.integers(0, 32, (2, 3, 2)).astype(np.int32)
  at[0, 1, 1] = -1  # an answer of one token
  answers = np.where(
    at < 0, -1, np.take_along_axis(best, at.reshape(2, 6), 1).reshape(at.shape)
  )
  answers[1, 0, 1] += 1  # half wrong
  answers[1, 2] += 1
  answers[0, 1, 1] = 99  # does not count
  probes = dict(
    tokens=tokens,
    segment_ids=segments,
    positions=positions,
    at=at,
    answers=answers.astype(np.int32),
  )
  step = evaluation.make_answer_step(model, attention)
  np.testing.assert_array_equal(
    step((params, bias), jax.tree.map(jnp.asarray, probes)),
    [[True, True, True], [False, True, False]],
  )


def greedy(model, attention, prefixes, count):
  """Continuations of each prefix by an engine."""
  engine = dsa_jax.Engine(
    model, slots=4, pool_tokens=256, page=4, chunk=12, attention=attention
  )
  params = dsa_jax.SamplingParams(max_tokens=count, temperature=0)
  return [result for (result,) in engine.generate(prefixes, params)]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_an_answer_is_right_if_the_engine_would_give_it(attention):
  cfg = dataclasses.replace(runs.ONE_LAYER, dtype="float32")
  model, init = step_lib.init(cfg, 0)
  shapes = jax.eval_shape(init, jax.random.key(0))
  parameters = models.filled(shapes, cfg.init_std)
  merged = model.merge(*parameters)
  B, T, D, A = 2, 40, 5, 3
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, 256, (B, T)).astype(np.int32)
  at_D = np.array([16, 20, 24, 28, 36])
  # Rows' answers become the engine's own, one question after the other.
  for d in (0, 1, 3):
    own = greedy(merged, attention, [*tokens_BT[:, : at_D[d] + 1]], A)
    tokens_BT[:, at_D[d] + 1 : at_D[d] + 1 + A] = [x.tokens for x in own]
  tokens_BT[1, at_D[1] + A] += 1  # its last token is not
  at_BDA = np.broadcast_to(at_D[:, None] + np.arange(A), (B, D, A))
  answers_BDA = np.stack(
    [row[at_D[:, None] + 1 + np.arange(A)] for row in tokens_BT]
  )
  probes = dict(
    tokens=tokens_BT,
    segment_ids=np.ones((B, T), np.int32),
    positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    at=at_BDA.astype(np.int32),
    answers=answers_BDA,
  )
  step = evaluation.make_answer_step(model, attention)
  right_BD = step(parameters, jax.tree.map(jnp.asarray, probes))
  prefixes = [row[: at + 1] for row in tokens_BT for at in at_D]
  given = greedy(merged, attention, prefixes, A)
  given_BDA = np.reshape([x.tokens for x in given], (B, D, A))
  np.testing.assert_array_equal(right_BD, (given_BDA == answers_BDA).all(-1))
  assert 0 < np.asarray(right_BD).sum() < B * D
  # A document is not computed again for each question.
  assert max(x.cached_tokens for x in given) >= at_D[0]
