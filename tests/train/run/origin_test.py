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
from train.run import record


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
    save(folder / "checkpoints" / str(step), scaled)
  return folder


def save(path, tree):
  saved = record.Record(
    arrays=record.saved_arrays(tree), model=runs.MODEL.to_dict()
  )
  ocp.save_checkpointables(
    str(path), {"state": tree}, custom_metadata=saved.sealed()
  )


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
  flat = nnx.to_flat_state(state.params)
  dense = [(path, x) for path, x in flat if "indexer" not in path]
  path = tmp_path / "dense"
  save(path, dataclasses.replace(state, params=nnx.from_flat_state(dense)))
  with pytest.raises(ValueError, match="has no indexer .*14 more are missing"):
    open_origin(run_dir, path)


def test_reads_another_dtype_and_still_compares(run_dir, state):
  """Both ways: what is compared is what was saved, before it is cast."""
  origin = open_origin(run_dir, run_dir)
  _, init = step_lib.init(runs.MODEL, 0)
  like = jax.eval_shape(init, jax.random.key(0))
  half = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), like)
  params, _ = origin.restore(half, sharding.make_mesh())
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(state.params)):
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))


def test_what_says_nothing_of_its_arrays_is_refused(run_dir, state, tmp_path):
  path = tmp_path / "plain"
  ocp.save_checkpointables(str(path), {"state": state})
  with pytest.raises(record.Broken, match="plain: .*lacks parts|older version"):
    open_origin(run_dir, path)


@pytest.mark.parametrize(
  "name", ["999999", "99.bak", "²", "0012", "12.orbax-checkpoint-tmp"]
)
def test_what_else_lies_there_is_passed_over(run_dir, tmp_path, name):
  folder = tmp_path / "run" / "checkpoints"
  folder.mkdir(parents=True)
  (folder / "12").symlink_to(run_dir / "checkpoints" / "12")
  (folder / name).mkdir()
  (folder / "13").touch()
  (folder / "14").symlink_to(tmp_path / "nowhere")
  assert origin_lib.find(tmp_path / "run") == folder / "12"
