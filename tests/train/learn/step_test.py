"""The training step: accumulation, balancing, partitions, the memory law."""

import dataclasses
import functools
import re
from typing import Any, get_args, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import moe
from tests.kernels import hlo
from tests.model import models
from tests.train import runs
from train.learn import guards
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.learn import step as step_lib

# A layer of experts, and MTP's: a layer with a dense MLP attends like them.
MODEL = dataclasses.replace(runs.MODEL, num_layers=1, num_dense_layers=0)
OPTIMIZER = optimizer_lib.OptimizerConfig(peak_lr=1e-2, warmup=0.0)
# Extending is pretraining on longer sequences.
KINDS = ("pretrain", "warmup", "sparse")


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


def start(stage_cfg, model_cfg=MODEL, measure_every=1):
  """The step and the state it begins with."""
  model, init = step_lib.init(model_cfg, 0)
  shapes = jax.eval_shape(init, jax.random.key(0))
  parameters = models.filled(shapes, model_cfg.init_std)
  state = step_lib.begin_stage(OPTIMIZER, stage_cfg, *parameters)
  train_step = step_lib.make_train_step(
    model,
    stage_cfg,
    optimizer_lib.make_optimizer(OPTIMIZER, stage_cfg),
    guards.GuardConfig(),
    measure_every,
  )
  return train_step, state


def cut(arrays, microbatches):
  return {
    name: x.reshape(microbatches, -1, x.shape[-1]) for name, x in arrays.items()
  }


def named(tree):
  """Name and value of each leaf."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path), leaf


def assert_close_each(actual, expected, tolerance):
  """Every tensor by its own scale."""
  for (name, a), e in zip(named(actual), jax.tree.leaves(expected)):
    scale = np.abs(e).max()
    np.testing.assert_allclose(
      a, e, atol=tolerance * scale, rtol=0, err_msg=name
    )


def adam_states(opt_state):
  """The Adam state of each partition."""
  is_adam = lambda s: hasattr(s, "mu")  # noqa: E731
  found = jax.tree.leaves(opt_state, is_leaf=is_adam)
  return [s for s in found if is_adam(s)]


class Trained(NamedTuple):
  """Some steps of a stage, on the same batch."""

  before: step_lib.TrainState
  after: step_lib.TrainState
  metrics: list[step_lib.Metrics]


@functools.cache  # tests share what they compile
def trained(kind: str) -> Trained:
  """Twenty steps of warm-up, measured every tenth; two of the others."""
  is_warmup = kind == "warmup"
  train_step, state = start(
    stage(kind, steps=20), measure_every=10 if is_warmup else 1
  )
  before = jax.tree.map(np.array, state)
  metrics = []
  for _ in range(20 if is_warmup else 2):
    state, found = train_step(state, cut(batch(), 1))
    metrics.append(jax.device_get(found))
  return Trained(before, state, metrics)


@functools.cache
def gradients(seed):
  """Normal numbers in place of a gradient, or of parameters."""
  _, init = step_lib.init(runs.MODEL, 0)
  params, _ = jax.eval_shape(init, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
  )


def test_microbatches_are_added_in_fp32():
  # In bfloat16, the dtype of the parameters, the sum would end at 256.
  ones = lambda part: {"w": jnp.ones((3,), jnp.bfloat16) * part["x"][0, 0]}
  total = step_lib._accumulate(ones, {"x": jnp.ones((1001, 1, 1), "bfloat16")})
  assert total["w"].dtype == jnp.float32
  np.testing.assert_array_equal(total["w"], 1001)


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param(kind, marks=[pytest.mark.slow] * (kind != "warmup"))
    for kind in KINDS
  ],
)
def test_a_stage_trains_its_part_alone(kind):
  """All else stays bit for bit. What trains the model has a language loss."""
  run = trained(kind)
  moves = {
    name: bool((x != y).any())
    for (name, x), y in zip(
      named(run.before.params), jax.tree.leaves(run.after.params)
    )
  }
  for name, moved in moves.items():
    if "indexer" in name:
      assert moved == (kind in ("warmup", "sparse")), name
    else:
      assert moved == (kind != "warmup"), name
  same_bias = jax.tree.map(
    np.array_equal, run.before.router_bias, run.after.router_bias
  )
  assert all(jax.tree.leaves(same_bias)) == (kind == "warmup")
  first = run.metrics[0]
  assert ("lm" in first) == ("mtp" in first) == (kind != "warmup")
  assert ("index_per_layer" in first) == (kind in ("warmup", "sparse"))
  assert first.get("lm", 9) > 3


def test_every_kind_of_stage_is_known_here():
  assert {*get_args(stages_lib.Kind.__value__)} == {*KINDS, "extend"}


@pytest.mark.parametrize(
  ("kind", "has"),
  [pytest.param("pretrain", 0, marks=pytest.mark.slow), ("warmup", 1)],
)
def test_the_optimizer_holds_nothing_for_what_it_does_not_train(kind, has):
  (adam,) = adam_states(trained(kind).after.opt_state)
  moments = dict(named(adam.mu))
  assert {"indexer" in name for name in moments} == {bool(has)}
  if has:
    assert len(moments) == 2 * 5  # a layer's and MTP's; 5 tensors
    for name, moment in moments.items():
      assert np.abs(moment).max() > 0, name


def test_the_indexer_learns_and_is_measured_when_asked():
  metrics = trained("warmup").metrics
  for i, found in enumerate(metrics, 1):
    if i % 10:
      np.testing.assert_array_equal(found["index_per_layer"], 0)
      np.testing.assert_array_equal(found["recall_per_layer"], 0)
  first, last = metrics[9], metrics[19]
  assert first["index_per_layer"].shape == (2,)
  assert (last["index_per_layer"] < first["index_per_layer"]).all()
  assert last["index_per_layer"].min() > 0
  assert last["recall_per_layer"].min() > 0.3
  assert last["recall_per_layer"].max() < 1


@pytest.mark.slow
def test_the_indexer_has_its_own_rate_and_clipping():
  """A tenfold rate, and a model's gradient a hundred times as large."""
  grads, params = gradients(0), gradients(1)
  larger = jax.tree_util.tree_map_with_path(
    lambda path, x: x if "indexer" in jax.tree_util.keystr(path) else 100 * x,
    grads,
  )
  results = []
  for lr, several in ((1e-3, (grads, larger)), (1e-2, (grads,))):
    cfg = dataclasses.replace(OPTIMIZER, indexer_lr=lr)
    optimizer = optimizer_lib.make_optimizer(cfg, stage())
    update = jax.jit(optimizer.update)
    for given in several:
      opt_state = optimizer.init(params)
      updates, opt_state = update(given, opt_state, params)
      results.append((dict(named(updates)), adam_states(opt_state)))
  (one, moments), (_, others), (faster, _) = results
  for name, x in one.items():
    factor = 10 if "indexer" in name else 1
    np.testing.assert_allclose(faster[name], factor * x, rtol=1e-5)
  # Adam's first moment after one step is a tenth of the clipped gradient.
  for adam, other in zip(moments, others, strict=True):
    norms = [jnp.linalg.norm(jnp.ravel(x)) for x in jax.tree.leaves(adam.mu)]
    np.testing.assert_allclose(np.linalg.norm(norms), 0.1, rtol=1e-4)
    chex.assert_trees_all_close(other.mu, adam.mu, rtol=1e-5)


@pytest.mark.slow
def test_moments_are_kept_in_the_dtype_asked_for():
  found, params = [], gradients(9)
  for moments in ("float32", "bfloat16"):
    cfg = dataclasses.replace(OPTIMIZER, moments=moments)
    optimizer = optimizer_lib.make_optimizer(cfg, stage("sparse"))
    opt_state, total = optimizer.init(params), 0.0
    update = jax.jit(optimizer.update)
    for seed in range(3):
      updates, opt_state = update(gradients(seed), opt_state, params)
      total += np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)])
    for x in jax.tree.leaves([s[1:] for s in adam_states(opt_state)]):
      assert x.dtype == moments
    found.append(total)
  exact, rounded = found
  assert np.abs(rounded - exact).max() > 0
  # A hundredth of the way is rounding: bfloat16 has 8 bits.
  assert np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact)


def test_the_norms_of_the_parts_make_the_whole():
  found = optimizer_lib.norms(gradients(0))
  parts = {
    name.removeprefix("grad_norm_"): float(x)
    for name, x in found.items()
    if name.startswith("grad_norm_")
  }
  assert set(parts) == {
    *("embed", "head", "attention", "indexer", "norms", "mtp"),
    *("ffn", "experts", "shared", "router"),
  }
  assert all(x > 0 for x in parts.values())
  whole = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradients(0))])
  for norm in (np.sqrt(sum(x**2 for x in parts.values())), found["grad_norm"]):
    np.testing.assert_allclose(norm, np.linalg.norm(whole), rtol=1e-5)


def test_the_schedule():
  cfg = optimizer_lib.OptimizerConfig(
    peak_lr=1.0, warmup=0.2, decay=0.5, final=0.1
  )
  rate = optimizer_lib.schedule(cfg, 2.0, 10)
  values = [np.asarray(rate(i)).item() for i in range(11)]
  np.testing.assert_allclose(values[:3], [2 / 3, 4 / 3, 2], rtol=1e-6)
  np.testing.assert_allclose(values[3:6], 2, rtol=1e-6)
  cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * i / 5)) / 2 for i in range(6)]
  np.testing.assert_allclose(values[5:], 2 * np.array(cosine), rtol=1e-5)


def test_a_routers_bias_moves_against_the_load():
  bias = {
    "moe_layers": jnp.zeros((1, 4)),
    "mtp": jnp.ones((4,)),
  }
  load = jnp.array([[4.0, 0, 2, 2], [0, 8.0, 0, 0]])
  moved = step_lib.balance(bias, load, 0.1)
  np.testing.assert_allclose(moved["moe_layers"], [[-0.1, 0.1, 0, 0]])
  np.testing.assert_allclose(moved["mtp"], [1.1, 0.9, 1.1, 1.1])


def test_the_state_has_its_biases_in_the_order_of_the_loads():
  _, init = step_lib.init(runs.MODEL, 0)
  _, bias = jax.eval_shape(init, jax.random.key(0))
  names = [name for name, _ in named(bias)]
  assert len(names) == 2
  assert "moe_layers" in names[0] and "mtp" in names[1]
  is_bias = lambda b: isinstance(b, moe.RouterBias)
  leaves = jax.tree.leaves(bias, is_leaf=is_bias)
  assert {type(b) for b in leaves} == {moe.RouterBias}


@pytest.mark.long
def test_parts_of_a_batch_equal_the_whole():
  results = []
  for parts in (1, 2):  # 1 x 8 sequences and 2 x 4, of uneven lengths
    train_step, state = start(stage(microbatches=parts))
    state, metrics = train_step(state, cut(batch(), parts))
    # Adam's first moment after one step is a tenth of the clipped gradient.
    moments = [s.mu for s in adam_states(state.opt_state)]
    results.append((moments, metrics, state.router_bias))
  (one, metrics, bias), (other, other_metrics, other_bias) = results
  assert len(one) == 2
  assert_close_each(other, one, 1e-5)
  chex.assert_trees_all_close(other_metrics, metrics, rtol=1e-5)
  chex.assert_trees_all_equal(other_bias, bias)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["warmup", "sparse"])
def test_packing_padding_and_accumulation(kind):
  """The same documents in other rows, padding and parts: the same step."""
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
  assert metrics["index_per_layer"].min() > 1e-3
  # Which queries recall samples hangs on their places in the rows.
  metrics.pop("recall_per_layer"), other_metrics.pop("recall_per_layer")
  chex.assert_trees_all_close(other_metrics, metrics, rtol=1e-5)


def optimized(kind, T, indexer_types=()):
  """The step of one sequence, compiled as a user's would be."""
  model = dataclasses.replace(
    runs.MODEL,
    num_mtp_layers=0,
    num_dense_layers=0,  # they attend like the others
    num_layers=3,
    indexer_types=indexer_types,
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
