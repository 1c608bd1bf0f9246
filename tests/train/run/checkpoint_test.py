"""Beginning with the parameters of another run."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from dsa_jax import sharding
from tests.model import models
from tests.train import runs
from train.learn import guards
from train.learn import step as step_lib
from train.run import origin as origin_lib


@pytest.fixture(scope="module")
def state():
  _, init = step_lib.init(runs.MODEL, 0)
  shapes = jax.eval_shape(init, jax.random.key(0))
  params, bias = models.filled(shapes, 0.1)
  bias = jax.tree.map(lambda x: x + 0.25, bias)
  # What an optimizer holds is not of interest.
  return step_lib.TrainState(
    jnp.int32(7), params, bias, {"mu": jnp.ones(3)}, guards.begin()
  )


@pytest.fixture(scope="module")
def run_dir(state, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  for step in (3, 12):  # the newest by number, not by name
    scaled = jax.tree.map(lambda x: x * (step - 11), state)  # noqa: B023
    path = folder / "checkpoints" / str(step)
    ocp.save_checkpointables(str(path), {"state": scaled})
  return folder


def open_origin(folder, init_from, **model):
  cfg = runs.config(folder)
  model = dataclasses.replace(cfg.model, **model)
  cfg = dataclasses.replace(cfg, model=model, init_from=str(init_from))
  return origin_lib.Origin(str(cfg.init_from), cfg.model)


def test_brings_back_parameters_and_biases(run_dir, state):
  origin = open_origin(run_dir, run_dir, top_k=4)
  assert str(origin).endswith("checkpoints/12")
  _, init = step_lib.init(runs.MODEL, 0)
  like = jax.eval_shape(init, jax.random.key(0))
  params, bias = origin.restore(like, sharding.make_mesh())
  for actual, expected in ((params, state.params), (bias, state.router_bias)):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
      np.testing.assert_array_equal(x, y)


def test_one_of_several_checkpoints(run_dir):
  origin = open_origin(run_dir, run_dir / "checkpoints" / "3")
  assert str(origin).endswith("checkpoints/3")


def test_another_model_is_refused(run_dir):
  with pytest.raises(ValueError, match="holds another model: .*ffn.*48.*40"):
    open_origin(run_dir, run_dir, dense_ffn_dim=40)


def test_a_model_without_an_indexer_is_refused(run_dir, state, tmp_path):
  params = nnx.to_pure_dict(state.params)
  for stack in ("dense_layers", "moe_layers"):
    del params[stack]["attention"]["indexer"]
  del params["mtp"]["block"]["attention"]["indexer"]
  path = tmp_path / "dense"
  ocp.save_checkpointables(str(path), {"state": {"params": params}})
  with pytest.raises(ValueError, match="has no indexer .*14 more are missing"):
    open_origin(run_dir, path)
