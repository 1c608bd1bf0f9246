"""What counts as a right answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
