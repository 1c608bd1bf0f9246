"""Parts of the model have their names in a compiled step, for profiles."""

import dataclasses
import re

from flax import nnx
import jax
import pytest

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
  text = lowered.as_text(debug_info=True)
  names = set(re.split(r'[/"()]', text))
  assert not (ALWAYS | attend) - names
