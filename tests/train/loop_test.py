"""Whole runs: the losses of a fixed seed, stopping and going on."""

import dataclasses
import json
import pathlib
import re
import signal
from typing import Any

import numpy as np
import pytest

from pallas_kernels import dispatch
from tests.train import runs
from train import lifecycle
from train import loop
from train import stage
from train.learn import batches as batches_lib
from train.learn import step as step_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "losses.json"


@pytest.fixture(scope="module")
def unbroken(folder):
  """The config and the train lines of a run from beginning to end."""
  cfg = runs.config(folder, "unbroken")
  loop.Run(cfg).train()
  return cfg, runs.lines(cfg.run_dir, "train")


def losses(lines):
  names = (
    *("step", "stage", "loss", "mtp", "balance", "grad_norm"),
    *("index", "index_per_layer", "recall", "recall_per_layer"),
  )
  return [{n: line[n] for n in names if n in line} for line in lines]


@pytest.mark.slow
def test_the_losses_of_a_fixed_seed_are_golden(unbroken, update_golden):
  actual = losses(unbroken[1])
  if update_golden:
    GOLDEN.write_text(json.dumps(actual, indent=1) + "\n")
  expected = json.loads(GOLDEN.read_text())
  assert [line["step"] for line in actual] == list(range(1, 9))
  stages = ("pretrain", "extend", "warmup", "sparse")
  assert [line["stage"] for line in actual] == list(np.repeat(stages, 2))
  for line in actual:  # the indexer is measured in every other step
    measured = line["stage"] in stages[2:] and line["step"] % 2 == 0
    assert ("index" in line) == ("recall" in line) == measured
    assert ("loss" in line) == (line["stage"] != "warmup")
  for a, e in zip(actual, expected, strict=True):
    assert a.keys() == e.keys()
    for name in a.keys() - {"stage"}:
      np.testing.assert_allclose(a[name], e[name], rtol=2e-4, err_msg=str(e))


@pytest.mark.slow
def test_it_learns_and_measures_both_ways(unbroken):
  cfg, lines = unbroken
  assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
  evals = runs.lines(cfg.run_dir, "eval")
  assert [line["step"] for line in evals] == [2, 4, 6, 8]
  for line in evals:
    assert line["dense"] != line["sparse"]
    assert 0 < line["recall"] < 1
    np.testing.assert_allclose(
      line["recall"], np.mean(line["recall_per_layer"])
    )
  # Warm-up leaves the dense model as it is, bit for bit.
  assert evals[2]["dense"] == evals[1]["dense"]
  assert evals[2]["sparse"] != evals[1]["sparse"]
  # Bytes are tokens here: bits a byte is the loss in other units.
  for line in lines:
    if "loss" in line:
      bits = line["loss"] / np.log(2)
      np.testing.assert_allclose(line["bits_per_byte"], bits, rtol=0.02)
  # All stages but the first run the same model, which is compiled once.
  model, _ = step_lib.init(cfg.model, cfg.seed)
  for way in ("dense", "sparse"):
    step: Any = step_lib.make_eval_step(model, way)
    assert step._cache_size() == 1
  sample = runs.lines(cfg.run_dir, "sample")[-1]["text"]
  assert sample.startswith("the ")


@pytest.mark.slow
def test_the_selected_keys_are_kept(unbroken):
  file = pathlib.Path(unbroken[0].run_dir) / "selections" / "8.npz"
  kept = np.load(file)
  queries, indices, starts = kept["queries"], kept["indices"], kept["starts"]
  assert kept["length"] == 40
  np.testing.assert_array_equal(queries, np.arange(40))
  assert indices.shape == (2, 40, 8)
  visible = queries + 1 - starts
  for layer in indices:
    for keys, query, start, seen in zip(layer, queries, starts, visible):
      chosen = keys[keys >= 0]
      assert len(chosen) == min(seen, 8)
      assert ((chosen >= start) & (chosen <= query)).all()


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(folder, unbroken):
  cfg = runs.config(folder, "stops")
  # At the ends of stages, and in the middle of them.
  for i, stop in enumerate((1, 2, 5, 6, None)):
    part = dataclasses.replace(cfg, stop_at=stop, resume=i > 0)
    loop.Run(part).train()
  assert losses(runs.lines(cfg.run_dir, "train")) == losses(unbroken[1])
  one, other = (runs.lines(c.run_dir, "eval")[-1] for c in (cfg, unbroken[0]))
  assert one == other


@pytest.mark.slow
def test_a_signal_stops_and_saves(folder, unbroken, monkeypatch, capsys):
  cfg = runs.config(folder, "signal")
  cfg = dataclasses.replace(cfg, stages=cfg.stages[:2])
  run = loop.Run(cfg)
  read = batches_lib.Batches.__next__
  batches = iter(range(100))

  def interrupt(self):
    if next(batches) == 1:
      signal.raise_signal(signal.SIGHUP)
    return read(self)

  with monkeypatch.context() as patch:
    patch.setattr(batches_lib.Batches, "__next__", interrupt)
    run.train()
  assert "saved. Go on with the same command and --resume" in (
    capsys.readouterr().out
  )
  stopped = len(runs.lines(cfg.run_dir, "train"))
  assert 0 < stopped < 4
  loop.Run(dataclasses.replace(cfg, resume=True)).train()
  assert losses(runs.lines(cfg.run_dir, "train")) == losses(unbroken[1][:4])


@pytest.mark.parametrize("nth", range(4))
def test_a_config_that_cannot_be_read_any_more_ends_a_run_in_a_line(
  folder, monkeypatch, nth
):
  """Its file is read as the run is checked, owned, opened, and gone on with."""
  cfg = runs.config(folder, f"unread_{nth}", runs.ONE_LAYER)
  loop.open_checkpoints(cfg).close()
  cfg = dataclasses.replace(cfg, resume=True)
  file = pathlib.Path(cfg.run_dir) / "config.json"
  read, before, reads = (
    pathlib.Path.read_bytes,
    file.read_bytes(),
    iter(range(9)),
  )

  def fails(self):
    if self.name == file.name and next(reads) == nth:
      raise OSError(5, "Input/output error", str(self))
    return read(self)

  monkeypatch.setattr(pathlib.Path, "read_bytes", fails)
  says = "config.json cannot be read .Input/output error"
  if nth == 0:
    with pytest.raises(ValueError, match=says):
      loop.Run(cfg)
  else:
    run = loop.Run(cfg)
    with pytest.raises(loop.ENDS, match=says):
      run.train()
  assert read(file) == before


@pytest.mark.parametrize(
  "kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda x: x.name
)
def test_a_run_that_is_stopped_early_saves_nothing_and_says_so(
  folder, monkeypatch, capsys, kind
):
  """As it opens its folder: nothing was trained yet, and nothing is saved."""
  cfg = runs.config(folder, f"early_{kind.name}", runs.ONE_LAYER)
  provenance = loop.provenance.write

  def interrupted(run_dir):
    signal.raise_signal(kind)
    provenance(run_dir)

  monkeypatch.setattr(loop.provenance, "write", interrupted)
  run = loop.Run(cfg)
  run.train()
  assert "stopped after step 0 of 8; nothing to save. Go on with the same" in (
    capsys.readouterr().out
  )
  assert list(pathlib.Path(cfg.run_dir, "checkpoints").iterdir()) == []
  loop.Run(dataclasses.replace(cfg, resume=True))


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_go_on_with(unbroken, capsys):
  cfg, lines = unbroken
  loop.Run(dataclasses.replace(cfg, resume=True)).train()
  assert "done: 8 steps" in capsys.readouterr().out
  assert runs.lines(cfg.run_dir, "train") == lines


@pytest.mark.slow
def test_the_ends_of_stages_stay(unbroken):
  steps = pathlib.Path(unbroken[0].run_dir).glob("checkpoints/*")
  assert {int(p.name) for p in steps if p.name.isdigit()} == {2, 4, 6, 8}


@pytest.mark.slow
def test_a_life_cycle_has_a_control(folder, unbroken, monkeypatch, capsys):
  cfg = unbroken[0]
  control = lifecycle.control(cfg)
  monkeypatch.setattr(lifecycle.main_lib, "parse", lambda *_: cfg)
  lifecycle.main()
  # The control begins with the last dense checkpoint and sees the data of the
  # sparse stage: its first loss is what that model loses there, read densely.
  out = capsys.readouterr().out
  assert f"begins   with the parameters of {control.init_from}" in out
  assert str(control.init_from).endswith("checkpoints/4")
  dense = runs.lines(control.run_dir, "train")
  sparse = [x for x in unbroken[1] if x["stage"] == "sparse"]
  assert [line["stage"] for line in dense] == ["extend"] * 2
  assert abs(dense[0]["loss"] - sparse[0]["loss"]) < 0.1
  assert dense[0]["loss"] != sparse[0]["loss"]
  evals = {x["step"]: x for x in runs.lines(cfg.run_dir, "eval")}
  last = runs.lines(control.run_dir, "eval")[-1]["dense"]
  models, stages = lifecycle.model_rows(cfg), lifecycle.stage_rows(cfg)
  for row, (step, way) in zip(
    models[:-1],
    [(4, "dense"), (4, "sparse"), (6, "sparse"), (8, "sparse"), (8, "dense")],
    strict=True,
  ):
    assert row.attention == way
    assert row.bits_per_byte == evals[step][way]
    assert row.excess == evals[step][way] / last - 1
    assert row.recall == (evals[step]["recall"] if way == "sparse" else None)
    assert row.retrieval is None  # the config plants no pairs
  assert models[-1].attention == "dense"
  assert (models[-1].bits_per_byte, models[-1].excess) == (last, 0)
  kinds = [stage.kind for stage in cfg.stages]
  assert [row.stage for row in stages] == [*kinds, "extend (control)"]
  assert [row.steps for row in stages] == [2] * 5
  # The rows are what is printed and written.
  table = (pathlib.Path(cfg.run_dir) / "lifecycle.md").read_text()
  assert table in out
  assert table == lifecycle.table(models, stages)


def test_the_table_of_a_life_cycle_shows_its_rows():
  models = [
    lifecycle.ModelRow("new", "sparse", 1.23456, 0.01234, 0.5, (0.75, 0.25)),
    lifecycle.ModelRow("old", "dense", 1.21951, 0.0, None, (1.0, 0.984)),
  ]
  stages = [lifecycle.StageRow("sparse", 120, 8, 8192, 1432.6)]
  table = lifecycle.table(models, stages)
  for shown in (
    ("new", "sparse", "1.2346", "+1.23%", "50.0%", "75.0%", "25.0%"),
    ("old", "dense", "1.2195", "+0.00%", "100.0%", "98.4%"),
    ("sparse", "120", "8 x 8192", "1,433"),
  ):
    # In order, within a line.
    assert re.search(".*".join(map(re.escape, shown)), table)


@pytest.mark.parametrize("kernels", [True, False])
def test_kernels_may_be_ruled_out(folder, monkeypatch, kernels):
  cfg = dataclasses.replace(
    runs.config(folder, f"kernels_{kernels}"), kernels=kernels
  )
  ops = {"mosaic_gpu": lambda: "kernel", "chunked_xla": lambda: "xla"}
  chosen = []

  def start(*_):
    with monkeypatch.context() as patch:
      patch.setattr(dispatch, "platform", lambda: "gpu")
      patch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
      chosen.append(dispatch.call("op", ops, None))
    raise stage.Diverged("seen enough")

  monkeypatch.setattr(loop.Run, "_start", start)
  with pytest.raises(stage.Diverged):
    loop.Run(cfg).train()
  assert chosen == ["kernel" if kernels else "xla"]


def test_a_life_cycle_is_dense_then_warmup_then_sparse(folder):
  cfg = runs.config(folder)
  for stages in (
    cfg.stages[:1],
    cfg.stages[:2],
    cfg.stages[2:],
    cfg.stages[1:2] * 3,
    cfg.stages[3:] + cfg.stages[1:],
  ):
    wrong = dataclasses.replace(cfg, stages=stages, init_from="random")
    with pytest.raises(ValueError, match="dense stages, then warmup, then"):
      lifecycle.control(wrong)


@pytest.mark.parametrize(
  "option", ["--check", "--compile-only=v5p:2x2x1", "--distributed.auto"]
)
def test_a_life_cycle_does_not_ignore_options(monkeypatch, folder, option):
  """It would train, where nothing was to be."""
  config = "--config=configs/tiny_lifecycle.py"
  run_dir = f"--run-dir={folder}/cycle"
  monkeypatch.setattr("sys.argv", ["lifecycle", config, run_dir, option])
  monkeypatch.chdir(pathlib.Path(__file__).parents[2])
  monkeypatch.setattr(lifecycle, "_train", lambda *_: False)
  with pytest.raises(SystemExit, match="error: --[a-z-]* is not for a"):
    lifecycle.main()
