"""Parts of the model have their names in a compiled step, for profiles."""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from dsa_jax import cache as cache_lib
from dsa_jax import frame as frame_lib
from tests.model import models

ALWAYS = {
  "embed",
  "dense_layers",
  "moe_layers",
  "mla",
  "indexer",
  "select",
  "recall",
  "mlp",
  "router",
  "experts",
  "shared_expert",
  "head",
  "cross_entropy",
  "mtp",
}


def names(lowered) -> set[str]:
  return set(re.split(r'[/"()]', lowered.as_text(debug_info=True)))


@pytest.mark.slow
@pytest.mark.parametrize(
  "attention, attend",
  [
    ("sparse", {"attend_and_index_loss"}),
    ("dense", {"attend", "index_loss"}),
  ],
)
def test_names_of_a_lowered_step(attention, attend):
  cfg = dataclasses.replace(models.CONFIG, num_mtp_layers=1)
  model = jax.eval_shape(lambda: models.model(cfg))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params, rest, tokens):
    losses = nnx.merge(graphdef, params, rest).losses(
      tokens, attention=attention, lm_loss=True, index_loss=True
    )
    return losses.lm.sum() + losses.mtp.sum() + losses.index.sum(), losses

  step = jax.jit(jax.grad(loss, has_aux=True))
  lowered = step.lower(params, rest, models.tokens(2, 32))
  assert not (ALWAYS | attend) - names(lowered)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_names_of_a_lowered_step_of_decoding(attention):
  cfg = models.CONFIG
  model = jax.eval_shape(lambda: models.model(cfg))

  @jax.jit
  def step(model, tokens, pages, length):
    pool = cache_lib.make_pool(cfg, 8, 4)
    frame = frame_lib.make_cached_frame(
      *(cfg, pages, 4, length, jnp.ones_like(length), 1), attention=attention
    )
    done = model.decode(tokens, frame, pool)
    drafts, pool = model.draft(tokens, done.hidden, frame, done.pool)
    return model.head(done.hidden), model.head(drafts), pool

  pages, length = jnp.arange(8).reshape(2, 4), jnp.asarray([3, 9])
  lowered = step.lower(model, models.tokens(2, 1), pages, length)
  asked = {"indexer", "select"} if attention == "sparse" else set()
  trained = {"recall", "cross_entropy", "indexer", "select"}
  assert not (ALWAYS - trained | asked | {"attend"}) - names(lowered)
