"""RoPE as config.json says it: the meaning is what transformers computes."""

import dataclasses
import math

import numpy as np
import pytest

from dsa_jax import config as config_lib
from dsa_jax import rope
from dsa_jax.hf import config_json
from tests.hf import folders


def parse(**changes):
  raw = {k: v for k, v in (folders.CONFIG | changes).items() if v != "none"}
  return config_json.parse(raw, None, {"model.layers.3.enorm.weight"})


def scaled(**changes):
  """A config whose rope_scaling has these keys, too."""
  found = folders.ROPE_SCALING | changes
  rope_scaling = {k: v for k, v in found.items() if v != "none"}
  return parse(rope_scaling=rope_scaling)


def scales(yarn):
  """Of cos and sin, and of the softmax, as transformers 5.23 has them."""
  all_dim = rope.yarn_mscale(yarn.factor, yarn.mscale_all_dim)
  return rope.yarn_mscale(yarn.factor, yarn.mscale) / all_dim, all_dim**2


@pytest.mark.parametrize(
  ("said", "cos", "softmax"),
  [
    (dict(mscale=0.7, mscale_all_dim=0.7), 1.0, (0.07, 2)),
    (dict(mscale="none", mscale_all_dim="none"), (0.1, 1), 1.0),
    (dict(mscale=None, mscale_all_dim=0), (0.1, 1), 1.0),
    (dict(mscale=1.0, mscale_all_dim="none"), (0.1, 1), 1.0),
    # The factor is what it says, whatever the rest.
    (dict(attention_factor=1.3), 1.3, (0.1, 2)),
    (dict(attention_factor=1), 1.0, (0.1, 2)),
    (dict(attention_factor=1.3, mscale_all_dim=0), 1.3, 1.0),
    (dict(attention_factor=1.0, mscale="none", mscale_all_dim=0), 1.0, 1.0),
    (dict(attention_factor=0.95, mscale=0.0), 0.95, (0.1, 2)),
  ],
)
def test_scales(said, cos, softmax):
  """A pair is 0.1 x mscale x ln(4) + 1, to a power."""
  number = lambda x: (
    x if isinstance(x, float) else (x[0] * math.log(4) + 1) ** x[1]
  )
  cfg = scaled(**said)
  np.testing.assert_allclose(
    scales(cfg.yarn), (number(cos), number(softmax)), rtol=1e-15
  )


@pytest.mark.parametrize(
  ("said", "key"),
  [
    (dict(mscale=0.7, mscale_all_dim="none"), "mscale"),
    (dict(mscale=0, mscale_all_dim=0), "mscale"),
    (dict(mscale="none"), "mscale_all_dim"),
    (dict(attention_factor=0.5), "attention_factor"),
    (dict(attention_factor=0), "attention_factor"),
    (dict(attention_factor=1.2, factor=1), "attention_factor"),
    (dict(truncate=False), "truncate"),
    (dict(truncate=None), "truncate"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(rope_type="default"), "type"),
    (dict(type="llama3"), "type"),
    (dict(type="longrope", long_factor=[1.0]), "type"),
    (dict(beta_slow=64), "beta_slow"),
    (dict(factor=None), "factor"),
    (dict(factor="4"), "factor"),
    (dict(factor=True), "factor"),
    (dict(original_max_position_embeddings="none"), "original_max_position"),
    (dict(original_max_position_embeddings=64.0), "original_max_position"),
    (dict(rope_theta=5e5), "rope_theta"),
    (dict(indexed_attention={"factor": 4.0}), "indexed_attention"),
  ],
)
def test_what_it_cannot_honour(said, key):
  with pytest.raises(ValueError, match=rf"^config\.json.*{key}"):
    scaled(**said)


@pytest.mark.parametrize(
  ("said", "key"),
  [
    (dict(rope_parameters=folders.ROPE_SCALING | dict(factor=8.0)), "contra"),
    (dict(rope_parameters=dict(rope_theta=5e5)), "rope_theta is"),
    (dict(rope_theta=0), "rope_theta"),
    (dict(rope_theta=[1e4]), "rope_theta"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(rope_parameters="yarn"), "rope_parameters"),
    (
      dict(
        rope_scaling=None,
        rope_parameters=dict(
          indexed_attention=folders.ROPE_SCALING,
          full_attention=dict(rope_type="default"),
        ),
      ),
      "indexed_attention",
    ),
  ],
)
def test_what_contradicts_itself(said, key):
  with pytest.raises(ValueError, match=rf"^config\.json.*{key}"):
    parse(**said)


def test_both_spellings_may_agree():
  both = folders.ROPE_SCALING | {"rope_theta": 10000.0}
  assert parse(rope_parameters=both) == parse()
  assert parse(rope_parameters={}) == parse()


@pytest.mark.parametrize(
  "yarn",
  [
    config_lib.YarnConfig(factor=4.0, mscale=0.7, mscale_all_dim=0.0),
    config_lib.YarnConfig(factor=4.0, mscale=0.0, mscale_all_dim=0.3),
    config_lib.YarnConfig(factor=4.0, mscale=0.0, mscale_all_dim=0.0),
    config_lib.YarnConfig(factor=4.0, mscale=1.0, mscale_all_dim=0.0),
    config_lib.YarnConfig(factor=4.0, mscale=0.7, mscale_all_dim=0.4),
  ],
)
def test_is_written_as_transformers_reads_it(yarn):
  """It takes one mscale without the other for neither."""
  cfg = dataclasses.replace(parse(), yarn=yarn, num_mtp_layers=0)
  raw = config_json.to_json(cfg, "bf16", folders.CONFIG)
  written = raw["rope_scaling"]
  if written["mscale"] and written["mscale_all_dim"]:
    assert "attention_factor" not in written
  else:
    assert written["attention_factor"] == scales(yarn)[0]


def test_an_attention_factor_comes_back():
  rope_scaling = folders.ROPE_SCALING | {"attention_factor": 1.3}
  like = folders.CONFIG | {"rope_scaling": rope_scaling}
  cfg = scaled(attention_factor=1.3)
  assert config_json.to_json(cfg, "bf16", like)["rope_scaling"] == rope_scaling
  longer = dataclasses.replace(cfg.yarn, factor=8.0)
  cfg = dataclasses.replace(cfg, yarn=longer)
  again = config_json.to_json(cfg, "bf16", like)
  assert config_json.parse(again, None, {"model.layers.3.x"}).yarn == longer
