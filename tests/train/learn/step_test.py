"""The training step: accumulation, balancing, partitions, the memory law."""

import dataclasses
import functools
import pathlib
import re
from typing import Any

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import moe
from tests.kernels import hlo
from tests.train import runs
from train import config as config_lib
from train.learn import guards
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.learn import step as step_lib

OPTIMIZER = optimizer_lib.OptimizerConfig(peak_lr=1e-2, warmup=0.0)


def stage(kind: Any = "sparse", **kwargs: Any) -> stages_lib.StageConfig:
  sizes: dict[str, Any] = dict(steps=10, seq_len=32, batch_size=8) | kwargs
  return stages_lib.StageConfig(kind=kind, **sizes)


def batch(rows=8, length=32, seed=0):
  """Rows of two documents and padding, of uneven lengths."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 256, (rows, length)).astype(np.int32)
  segments = np.zeros((rows, length), np.int32)
  positions = np.zeros((rows, length), np.int32)
  for row in range(rows):
    first, second = 5 + row, length - row
    segments[row, :first], segments[row, first:second] = 1, 2
    positions[row, :first] = np.arange(first)
    positions[row, first:second] = np.arange(second - first)
  return {
    "tokens": tokens,
    "segment_ids": segments,
    "positions": positions,
    "bytes": np.ones((rows, length), np.float32),
    "sources": np.zeros((rows, length), np.int32),
  }


def start(
  stage_cfg, model_cfg=runs.MODEL, optimizer_cfg=OPTIMIZER, measure_every=1
):
  """The step and the state it begins with."""
  model, init = step_lib.init(model_cfg, 0)
  optimizer = optimizer_lib.make_optimizer(optimizer_cfg, stage_cfg)
  params, bias = init(jax.random.key(0))
  state = step_lib.begin_stage(optimizer_cfg, stage_cfg, params, bias)
  train_step = step_lib.make_train_step(
    model, stage_cfg, optimizer, guards.GuardConfig(), measure_every
  )
  return train_step, state


def cut(arrays, microbatches):
  return {
    name: x.reshape(microbatches, -1, x.shape[-1]) for name, x in arrays.items()
  }


def assert_close_each(actual, expected, tolerance):
  """Every tensor by its own scale."""
  for (path, a), e in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)
  ):
    scale = np.abs(e).max()
    np.testing.assert_allclose(
      a, e, atol=tolerance * scale, rtol=0, err_msg=jax.tree_util.keystr(path)
    )


def adam_states(opt_state):
  """The Adam state of each partition."""
  is_adam = lambda s: hasattr(s, "mu")  # noqa: E731
  found = jax.tree.leaves(opt_state, is_leaf=is_adam)
  return [s for s in found if is_adam(s)]


@pytest.mark.long
class AccumulationTest(chex.TestCase):
  def test_parts_of_a_batch_equal_the_whole(self):
    results = []
    for parts in (1, 2):  # 1 x 8 sequences and 2 x 4, of uneven lengths
      train_step, state = start(stage(microbatches=parts))
      state, metrics = train_step(state, cut(batch(), parts))
      # Adam's first moment after one step is a tenth of the clipped gradient.
      moments = [s.mu for s in adam_states(state.opt_state)]
      results.append((moments, metrics, state.router_bias))
    (one, metrics, bias), (other, other_metrics, other_bias) = results
    self.assertLen(one, 2)
    assert_close_each(other, one, 1e-5)
    chex.assert_trees_all_close(other_metrics, metrics, rtol=1e-5)
    chex.assert_trees_all_equal(other_bias, bias)


@pytest.mark.slow
class MomentsTest(chex.TestCase):
  def test_are_kept_in_the_dtype_asked_for(self):
    cfg = dataclasses.replace(OPTIMIZER, moments="bfloat16")
    results = []
    for optimizer in (OPTIMIZER, cfg):
      train_step, state = start(stage("pretrain"), optimizer_cfg=optimizer)
      for _ in range(3):
        state, _ = train_step(state, cut(batch(), 1))
      results.append(state)
    exact, rounded = results
    for x in jax.tree.leaves([s[1:] for s in adam_states(rounded.opt_state)]):
      self.assertEqual(x.dtype, jnp.bfloat16)
    one, other = (
      np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])
      for state in (exact, rounded)
    )
    before = start(stage("pretrain"))[1].params
    begun = np.concatenate([np.ravel(x) for x in jax.tree.leaves(before)])
    self.assertGreater(np.abs(other - one).max(), 0)
    # A hundredth of the way is rounding: bfloat16 has 8 bits.
    self.assertLess(
      np.linalg.norm(other - one), 0.02 * np.linalg.norm(one - begun)
    )


class RouterBiasTest(chex.TestCase):
  def test_moves_against_the_load(self):
    bias = {
      "moe_layers": jnp.zeros((1, 4)),
      "mtp": jnp.ones((4,)),
    }
    load = jnp.array([[4.0, 0, 2, 2], [0, 8.0, 0, 0]])
    moved = step_lib.balance(bias, load, 0.1)
    np.testing.assert_allclose(moved["moe_layers"], [[-0.1, 0.1, 0, 0]])
    np.testing.assert_allclose(moved["mtp"], [1.1, 0.9, 1.1, 1.1])

  def test_the_state_has_its_layers_in_the_order_of_the_loads(self):
    model, init = step_lib.init(runs.MODEL, 0)
    _, bias = init(jax.random.key(0))
    names = [
      jax.tree_util.keystr(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(bias)
    ]
    self.assertLen(names, 2)
    self.assertIn("moe_layers", names[0])
    self.assertIn("mtp", names[1])
    self.assertEqual(
      {
        type(b)
        for b in jax.tree.leaves(
          bias, is_leaf=lambda b: isinstance(b, moe.RouterBias)
        )
      },
      {moe.RouterBias},
    )


class StageTest(chex.TestCase):
  def test_pretraining_leaves_the_indexer_and_holds_nothing_for_it(self):
    train_step, state = start(stage("pretrain"))
    before = jax.tree.map(np.array, state.params)
    (adam,) = adam_states(state.opt_state)
    for path, _ in jax.tree_util.tree_leaves_with_path(adam.mu):
      self.assertNotIn("indexer", jax.tree_util.keystr(path))
    for _ in range(2):
      state, _ = train_step(state, cut(batch(), 1))
    changed = jax.tree.map(
      lambda a, b: bool((a != b).any()), before, state.params
    )
    for path, moved in jax.tree_util.tree_leaves_with_path(changed):
      name = jax.tree_util.keystr(path)
      self.assertEqual(moved, "indexer" not in name, name)

  @pytest.mark.slow
  def test_the_indexer_has_its_own_rate_and_clipping(self):
    states = []
    for lr in (1e-3, 1e-2):
      optimizer_cfg = dataclasses.replace(OPTIMIZER, indexer_lr=lr)
      train_step, state = start(stage(), optimizer_cfg=optimizer_cfg)
      states.append(train_step(state, cut(batch(), 1))[0].params)
    for (path, one), other in zip(
      jax.tree_util.tree_leaves_with_path(states[0]),
      jax.tree.leaves(states[1]),
    ):
      name = jax.tree_util.keystr(path)
      self.assertEqual(bool((one == other).all()), "indexer" not in name, name)

  def test_the_schedule(self):
    cfg = optimizer_lib.OptimizerConfig(
      peak_lr=1.0, warmup=0.2, decay=0.5, final=0.1
    )
    rate = optimizer_lib.schedule(cfg, 2.0, 10)
    values = [np.asarray(rate(i)).item() for i in range(11)]
    np.testing.assert_allclose(values[:3], [2 / 3, 4 / 3, 2], rtol=1e-6)
    np.testing.assert_allclose(values[3:6], 2, rtol=1e-6)
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * i / 5)) / 2 for i in range(6)]
    np.testing.assert_allclose(values[5:], 2 * np.array(cosine), rtol=1e-5)


class WarmupTest(chex.TestCase):
  """Twenty steps of warm-up, on rows of several documents and padding."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    model, _ = step_lib.init(runs.MODEL, 0)
    cls.train_step, state = start(stage("warmup", steps=20), measure_every=10)
    forward = jax.jit(
      lambda state, x: model.merge(state.params, state.router_bias)(
        x["tokens"], x["positions"], x["segment_ids"], attention="dense"
      )
    )
    cls.logits = [forward(state, batch())]
    cls.before = jax.tree.map(np.array, state)
    cls.metrics = []
    for _ in range(20):
      state, metrics = cls.train_step(state, cut(batch(), 1))
      cls.metrics.append(jax.device_get(metrics))
    cls.after = state
    cls.logits.append(forward(state, batch()))

  def test_the_dense_model_stays_bit_for_bit(self):
    np.testing.assert_array_equal(*self.logits)
    chex.assert_trees_all_equal(self.after.router_bias, self.before.router_bias)
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(self.before.params),
      jax.tree.leaves(self.after.params),
    ):
      name = jax.tree_util.keystr(path)
      self.assertEqual(bool((x == y).all()), "indexer" not in name, name)

  def test_the_optimizer_holds_the_indexer_alone(self):
    (adam,) = adam_states(self.after.opt_state)
    moments = jax.tree_util.tree_leaves_with_path(adam.mu)
    self.assertLen(moments, 3 * 5)  # dense, expert and MTP layers; 5 tensors
    for path, moment in moments:
      self.assertIn("indexer", jax.tree_util.keystr(path))
      self.assertGreater(np.abs(moment).max(), 0)

  def test_the_indexer_learns_and_is_measured_when_asked(self):
    for i, metrics in enumerate(self.metrics, 1):
      self.assertNotIn("lm", metrics)
      if i % 10:
        np.testing.assert_array_equal(metrics["index_per_layer"], 0)
        np.testing.assert_array_equal(metrics["recall_per_layer"], 0)
    first, last = self.metrics[9], self.metrics[19]
    self.assertEqual(first["index_per_layer"].shape, (3,))
    self.assertTrue((last["index_per_layer"] < first["index_per_layer"]).all())
    self.assertGreater(last["index_per_layer"].min(), 0)
    self.assertGreater(last["recall_per_layer"].min(), 0.3)
    self.assertLess(last["recall_per_layer"].max(), 1)


class InvarianceTest(chex.TestCase):
  """The same documents in other rows, padding and parts: the same step."""

  @parameterized.parameters("warmup", "sparse")
  @pytest.mark.slow
  def test_packing_padding_and_accumulation(self, kind):
    packed = batch(4)  # eight documents in four rows
    alone = {name: np.zeros((8, 32), x.dtype) for name, x in packed.items()}
    for row in range(4):
      for i in (1, 2):
        (places,) = np.nonzero(packed["segment_ids"][row] == i)
        for name, x in packed.items():
          alone[name][2 * row + i - 1, : len(places)] = x[row, places]
    alone["segment_ids"] = np.minimum(alone["segment_ids"], 1)
    results = []
    for arrays, parts in ((packed, 1), (alone, 2)):
      # The balance loss is a mean over rows, whatever they hold.
      cfg = stage(kind, microbatches=parts, balance_weight=0.0)
      train_step, state = start(cfg)
      state, metrics = train_step(state, cut(arrays, parts))
      metrics.pop("balance", None)
      moments = [s.mu for s in adam_states(state.opt_state)]
      results.append((moments, jax.device_get(metrics)))
    (one, metrics), (other, other_metrics) = results
    assert_close_each(other, one, 1e-5)
    self.assertGreater(metrics["index_per_layer"].min(), 1e-3)
    # Which queries recall samples hangs on their places in the rows.
    metrics.pop("recall_per_layer"), other_metrics.pop("recall_per_layer")
    chex.assert_trees_all_close(other_metrics, metrics, rtol=1e-5)


@functools.cache
def after_a_step(stage_cfg, model_cfg):
  """Names of the parameters that a step changes, and its metrics."""
  train_step, state = start(stage_cfg, model_cfg)
  before = jax.tree.map(np.array, state.params)
  state, metrics = train_step(state, cut(batch(4), 1))
  moved = jax.tree.map(lambda x, y: (x != y).any(), before, state.params)
  names = {
    jax.tree_util.keystr(path)
    for path, changed in jax.tree_util.tree_leaves_with_path(moved)
    if changed
  }
  return names, jax.device_get(metrics)


class ConfigsTest(chex.TestCase):
  @parameterized.parameters(*sorted(pathlib.Path("configs").glob("*.py")))
  def test_what_trains_the_model_has_a_language_loss(self, path):
    """Each stage of each config, with a model and batches of toy size."""
    cfg = config_lib.load(str(path))
    for given in cfg.stages:
      small = stage(given.kind, batch_size=4, mtp_weight=given.mtp_weight)
      model = dataclasses.replace(runs.MODEL, num_mtp_layers=0)
      names, metrics = after_a_step(small, model)
      trunk = {name for name in names if "indexer" not in name}
      self.assertEqual(bool(trunk), given.kind != "warmup")
      self.assertEqual(bool(names - trunk), given.kind in ("warmup", "sparse"))
      self.assertEqual("lm" in metrics, given.kind != "warmup")
      self.assertGreater(metrics.get("lm", 9), 3)


def optimized(kind, T, indexer_types=()):
  """The step of one sequence, compiled as a user's would be."""
  model = dataclasses.replace(
    runs.MODEL, num_mtp_layers=0, num_layers=3, indexer_types=indexer_types
  )
  train_step, state = start(stage(kind, seq_len=T, batch_size=1), model)
  jax.config.update("jax_disable_most_optimizations", False)
  try:
    return train_step.lower(state, cut(batch(1, T), 1)).compile()
  finally:
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["warmup", "sparse"])
def test_memory_grows_with_the_length(kind):
  """From 2K to 16K by no more than 8 times; T x T would grow by 64."""
  short, long = (hlo.temporary_bytes(optimized(kind, T)) for T in (2048, 16384))
  assert long < 8.5 * short


SHARED = ("full", "shared", "shared")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "indexer_types"),
  [
    ("pretrain", ()),
    ("warmup", ()),
    ("sparse", SHARED),
    pytest.param("warmup", SHARED, marks=pytest.mark.long),
    pytest.param("sparse", (), marks=pytest.mark.long),
  ],
)
def test_no_buffer_has_queries_times_keys(kind, indexer_types):
  """No buffer of the compiled training step is as large as T x S."""
  # A prime, and so large that nothing else of this model amounts to T x T.
  T = 1031
  text = str(optimized(kind, T, indexer_types).as_text())
  assert f"[1,{T}," in text
  assert square_buffers(text, T) == set()


def test_the_check_finds_a_square():
  square = jax.jit(lambda x: jnp.sin(x[:, None] * x[None]).sum(0))
  text = square.lower(jnp.ones(1031)).compile().as_text()
  assert square_buffers(str(text), 1031)


def square_buffers(hlo: str, T: int) -> set[str]:
  """Shapes, of any type, of at least T x T elements."""
  shapes = re.findall(r"\b[a-z]+[0-9]*\[([\d,]+)\]", hlo)
  return {
    dims
    for dims in set(shapes)
    if np.prod([int(size) for size in dims.split(",")]) >= T * T
  }


if __name__ == "__main__":
  absltest.main()
