"""Absorbed and expanded attention are one function."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsa_jax
from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import mla
from tests.model import models

# K > T: sparse attention reads all that dense attention does.
CONFIG = dataclasses.replace(
  models.CONFIG,
  top_k=40,
  yarn=config_lib.YarnConfig(factor=8.0, original_context=16),
)


def run(attention, layer, x, positions, segments, cfg=CONFIG):
  frame = frame_lib.make_frame(
    cfg, x.shape[:2], positions, segments, attention=attention
  )
  return layer(x, frame).y


@pytest.fixture
def layer():
  return mla.MLA(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(1), (2, 32, 32))


@pytest.mark.slow
def test_absorbed_equals_expanded(layer, x):
  for segments in (None, models.SEGMENTS):
    dense, sparse = (
      jax.jit(run, static_argnums=0)(way, layer, x, models.POSITIONS, segments)
      for way in ("dense", "sparse")
    )
    assert np.abs(dense).max() > 0.1
    np.testing.assert_allclose(sparse, dense, atol=1e-5, rtol=1e-5)


def test_their_gradients_are_equal(layer, x):
  target = jax.random.normal(jax.random.key(2), x.shape)

  def loss(layer, x, attention):
    y = run(attention, layer, x, models.POSITIONS, models.SEGMENTS)
    return jnp.sum(y * target)

  grad = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  dense, sparse = (grad(layer, x, way) for way in ("dense", "sparse"))
  for (path, d), s in zip(
    jax.tree_util.tree_leaves_with_path(dense), jax.tree.leaves(sparse)
  ):
    scale = np.abs(d).max()
    name = jax.tree_util.keystr(path)
    if "indexer" in name:
      np.testing.assert_array_equal(s, 0, name)
    else:
      assert scale > 0, name
    np.testing.assert_allclose(s, d, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.slow
def test_fewer_keys_give_another_result(x):
  cfg = dataclasses.replace(CONFIG, top_k=8)
  layer = mla.MLA(cfg, rngs=nnx.Rngs(0))
  dense, sparse = (
    run(way, layer, x, None, None, cfg) for way in ("dense", "sparse")
  )
  np.testing.assert_allclose(sparse[:, :8], dense[:, :8], atol=1e-5)
  for t in range(12, 32):
    assert np.abs(sparse - dense)[:, t].max() > 1e-3


def test_alone_as_a_function_of_its_parameters(layer, x):
  graphdef, params = nnx.split(layer)

  @jax.jit
  def attend(params, x):
    frame = dsa_jax.make_frame(CONFIG, x.shape[:2], attention="sparse")
    return nnx.merge(graphdef, params)(x, frame).y

  expected = run("dense", layer, x, None, None)
  np.testing.assert_allclose(attend(params, x), expected, atol=1e-5)


def test_the_scale_is_that_of_the_expanded_width():
  mscale = 0.1 * np.log(8.0) + 1
  assert mla.softmax_scale(CONFIG) == pytest.approx(
    mscale**2 / np.sqrt(20), abs=5e-8
  )
