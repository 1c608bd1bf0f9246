"""Steps that are not believed, and what a run does about them."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsa_jax
from tests.train import runs
from tests.train.learn import step_test
from train import loop
from train import stage
from train.learn import batches as batches_lib
from train.learn import guards
from train.learn import step as step_lib

# Of a stage, wherever a run stops: runs of one stage share a compiled step.
STEPS = 160
# A batch of nothing but this makes the loss NaN, see `poison`.
POISON = 255


def walk(watched, deviations=6.0, update=None):
  """Whether each step is believed, and the last state."""
  judge = jax.jit(guards.judge, static_argnames="deviations")
  state, believed = guards.begin(), []
  update = np.ones(len(watched)) if update is None else update
  watched, update = (np.asarray(x, np.float32) for x in (watched, update))
  for pair, norm in zip(watched, update):
    fine, state = judge(state, pair, norm, deviations=deviations)
    believed.append(bool(fine))
  return np.array(believed), state


def usual(steps, seed=0):
  """Losses around 2 and gradient norms around 0.5, 5% up and down."""
  noise = np.random.default_rng(seed).normal(1, 0.05, (steps, 2))
  return noise * np.array([2.0, 0.5])


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_not_usual_is_not_believed(column, bad):
  watched = usual(300)
  watched[[200, 201, 250], column] = bad
  believed, state = walk(watched)
  expected = np.ones(300, bool)
  expected[[200, 201, 250]] = False
  np.testing.assert_array_equal(believed, expected)
  assert (int(state.skipped), int(state.in_a_row)) == (3, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_not_believed(bad):
  """Not at the first step either; nor is its loss remembered."""
  update = np.ones(150)
  update[[0, 7, 140]] = bad
  believed, state = walk(usual(150), update=update)
  np.testing.assert_array_equal(believed, np.isfinite(update))
  assert (int(state.skipped), int(state.seen)) == (3, 147)


def test_a_spike_is_one_by_the_deviations_before_it():
  watched = usual(200)
  before = watched[71:199]
  mean, spread = before.mean(0), before.std(0)
  for factor, expected in ((5.8, True), (6.2, False)):
    for column in (0, 1):
      last = watched.copy()
      last[199, column] = (mean + factor * spread)[column]
      assert walk(last)[0][-1] == expected


def test_a_fall_is_believed_and_a_first_step_too():
  watched = usual(300)
  watched[:100] *= np.linspace(40, 1, 100)[:, None]
  watched[200:] /= 10
  believed, _ = walk(watched)
  assert believed.all()


def test_spikes_in_a_row_do_not_hide_one_another():
  watched = usual(300)
  watched[200:220] *= 100
  believed, state = walk(watched[:220])
  assert not believed[200:].any()
  assert int(state.in_a_row) == 20
  # A loss that stays half as high again is believed after some steps.
  watched = usual(300)
  watched[200:] *= 1.5
  believed, _ = walk(watched)
  assert not believed[200]
  assert believed[230:].all()


_losses = dsa_jax.Transformer.losses


def poisoned_losses(self, tokens, *args, **kwargs):
  """The loss of a batch of nothing but POISON is not a number."""
  found = _losses(self, tokens, *args, **kwargs)
  bad = (tokens == POISON).all()
  harm = jnp.where(bad, jnp.nan, 1.0)
  if found.lm is None:  # the indexer alone is trained
    assert found.index is not None
    return dataclasses.replace(found, index=found.index * harm)
  return dataclasses.replace(found, lm=found.lm * harm)


@pytest.fixture
def poison(monkeypatch):
  monkeypatch.setattr(dsa_jax.Transformer, "losses", poisoned_losses)


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
def test_a_step_that_is_not_believed_changes_nothing():
  train_step, state = step_test.start(
    step_test.stage("pretrain"), runs.ONE_LAYER
  )
  good = step_test.cut(step_test.batch(), 2)
  bad = dict(good, tokens=np.full_like(good["tokens"], POISON))
  state, metrics = train_step(state, good)
  assert (metrics["skipped"], metrics["in_a_row"]) == (0, 0)
  before = jax.device_get(state)
  state, metrics = train_step(state, bad)
  assert not np.isfinite(metrics["lm"])
  assert not np.isfinite(metrics["grad_norm"])
  assert (metrics["skipped"], metrics["in_a_row"]) == (1, 1)
  assert int(state.step) == 2
  for name in ("params", "router_bias", "opt_state"):
    kept, was = jax.device_get(getattr(state, name)), getattr(before, name)
    for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves(was)):
      np.testing.assert_array_equal(x, y)
  state, metrics = train_step(state, good)
  assert (metrics["skipped"], metrics["in_a_row"]) == (1, 0)
  moved = jax.tree.map(
    lambda x, y: bool((x != y).any()), state.params, before.params
  )
  assert any(jax.tree.leaves(moved))


def test_dead_experts_are_counted():
  load = jnp.array([[4.0, 0, 0, 4], [0, 2, 3, 3], [2, 2, 2, 2]])
  found = step_lib.load_metrics(load)
  assert found["dead_experts"] == 3
  assert found["collapsed_layers"] == 1
  assert found["max_load"] == 2


def test_alarms_are_raised_once():
  alarms = guards.Alarms(guards.GuardConfig(kl_factor=2.0))
  assert not alarms({"index": 1.0, "collapsed_layers": 0.0})
  assert not alarms({"index": 1.9})
  assert not alarms({"index": None})
  (kl,) = alarms({"index": 2.1})
  assert "KL is 2.1" in kl
  both = alarms({"index": 2.2, "collapsed_layers": 3.0})
  assert len(both) == 1 and "3 layers" in both[0]
  assert not alarms({"index": 0.5, "collapsed_layers": 0.0})
  assert len(alarms({"index": 1.1})) == 1  # twice the new lowest


@pytest.fixture
def train(folder, poison, unmeasured, monkeypatch, tmp_path_factory):
  """Trains with poisoned batches, by number; the run's folder and its lines."""
  read = batches_lib.Batches.__next__

  def run(poisoned, left_out=(), steps=14, stage=0, **guard):
    batches = iter(range(1, 1000))

    def poisoned_read(self):
      batch, number = read(self), next(batches)
      while number in left_out:
        batch, number = read(self), next(batches)
      if number in poisoned:
        batch["tokens"] = jnp.full_like(batch["tokens"], POISON)
      return batch

    monkeypatch.setattr(batches_lib.Batches, "__next__", poisoned_read)
    root = tmp_path_factory.mktemp("runs")
    cfg = runs.config(folder, model=runs.ONE_LAYER)
    cfg = dataclasses.replace(
      cfg,
      run_dir=str(root / "run"),
      stages=(dataclasses.replace(cfg.stages[stage], steps=STEPS),),
      stop_at=steps,
      init_from="random" if stage else None,
      checkpoint=dataclasses.replace(cfg.checkpoint, every=4),
      guard=guards.GuardConfig(patience=3, **guard),
    )
    loop.Run(cfg).train()
    return pathlib.Path(cfg.run_dir)

  return run


@pytest.mark.slow
def test_a_skipped_step_is_told_and_training_goes_on(train, capsys):
  run_dir = train(poisoned={6})
  lines = runs.lines(run_dir, "train")
  assert [line["step"] for line in lines] == list(range(1, 15))
  assert [line["loss"] is None for line in lines] == [
    step == 6 for step in range(1, 15)
  ]
  # The rate is that of the steps that were taken.
  assert lines[6]["lr"] == lines[5]["lr"]
  incidents = runs.lines(run_dir, "incident")
  assert [x["step"] for x in incidents if x["what"] == "skipped"] == [6]
  assert "step 6 is skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_of_the_indexer_alone_may_be_skipped(train):
  """Also where its KL is measured, at every second step."""
  run_dir = train(poisoned={3, 6}, stage=2, steps=8)
  incidents = runs.lines(run_dir, "incident")
  assert [x["step"] for x in incidents if x["what"] == "skipped"] == [3, 6]
  lines = runs.lines(run_dir, "train")
  assert [line["step"] for line in lines] == list(range(1, 9))
  assert [line.get("index") is None for line in lines[1::2]] == [
    *(False, False, True, False)
  ]


@pytest.mark.slow
def test_skips_in_a_row_roll_back_and_leave_the_data_behind(train, capsys):
  # Steps 6, 7 and 8 are skipped; 9 has begun when that is known.
  run_dir = train(poisoned={6, 7, 8})
  lines = runs.lines(run_dir, "train")
  assert [line["step"] for line in lines] == list(range(1, 15))
  assert all(line["loss"] is not None for line in lines)
  incident, *_ = runs.lines(run_dir, "incident")
  assert (incident["step"], incident["from"]) == (4, 8)
  assert incident["what"] == "rollback"
  assert "steps 6 to 8" in incident["why"]
  assert incident["steps_of_data_left_out"] == 4
  said = capsys.readouterr().out
  assert "ROLLBACK 1 of 3" in said
  steps = {int(p.name) for p in (run_dir / "checkpoints").iterdir()}
  assert steps == {12, 14}
  # The same as a run that never had those data.
  other = runs.lines(train((), left_out=range(5, 9)), "train")
  for name in ("loss", "grad_norm", "lr"):
    assert [x[name] for x in lines] == [x[name] for x in other]


@pytest.mark.slow
def test_the_run_ends_where_going_back_does_not_help(train):
  with pytest.raises(
    stage.Diverged, match="after 1 .* of step 4 with.*peak-lr"
  ):
    train(poisoned=range(6, 100), rollbacks=1)


@pytest.mark.slow
def test_without_a_checkpoint_there_is_nothing_to_go_back_to(train):
  with pytest.raises(
    stage.Diverged, match="no checkpoint of.* from the beginning"
  ):
    train(poisoned={2, 3, 4})


@pytest.mark.slow
@pytest.mark.usefixtures("poison", "unmeasured")
def test_a_spike_is_skipped(folder, tmp_path, monkeypatch):
  """Text of another kind, once the run knows its own."""
  read, batches = batches_lib.Batches.__next__, iter(range(1, 1000))

  def strange(self):
    batch = read(self)
    if next(batches) == 150:
      noise = np.random.default_rng(0).integers(0, 255, batch["tokens"].shape)
      batch["tokens"] = jnp.asarray(noise, jnp.int32)
    return batch

  monkeypatch.setattr(batches_lib.Batches, "__next__", strange)
  cfg = runs.config(folder, model=runs.ONE_LAYER)
  cfg = dataclasses.replace(
    cfg,
    run_dir=str(tmp_path / "run"),
    stages=(dataclasses.replace(cfg.stages[0], steps=STEPS),),
  )
  loop.Run(cfg).train()
  incidents = runs.lines(cfg.run_dir, "incident")
  assert [x["step"] for x in incidents if x["what"] == "skipped"] == [150]
  lines = runs.lines(cfg.run_dir, "train")
  assert lines[149]["loss"] > 2 * lines[148]["loss"]
  assert lines[150]["loss"] < 1.2 * lines[148]["loss"]
