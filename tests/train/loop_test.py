"""Whole runs: the losses of a fixed seed, stopping and going on, divergence."""

import dataclasses
import json
import pathlib
import signal

import jax
import numpy as np
import pytest

from tests.train import runs
from train import loop

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "losses.json"


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
  """The runs here are alike: a program is compiled once for all of them."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update(
    "jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache"))
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  runs.write_text(folder)
  return folder


@pytest.fixture(scope="module")
def unbroken(folder):
  """The config and the train lines of a run from beginning to end."""
  cfg = runs.config(folder, "unbroken")
  loop.Run(cfg).train()
  return cfg, runs.lines(cfg.run_dir, "train")


def losses(lines):
  names = ("step", "stage", "loss", "mtp", "index", "balance", "grad_norm")
  return [{n: line[n] for n in names if n in line} for line in lines]


def test_the_losses_of_a_fixed_seed_are_golden(unbroken, update_golden):
  actual = losses(unbroken[1])
  if update_golden:
    GOLDEN.write_text(json.dumps(actual, indent=1) + "\n")
  expected = json.loads(GOLDEN.read_text())
  assert [line["step"] for line in actual] == list(range(1, 9))
  assert [line["stage"] for line in actual] == ["pretrain"] * 4 + ["sparse"] * 4
  for a, e in zip(actual, expected, strict=True):
    assert a.keys() == e.keys()
    for name in a.keys() - {"stage"}:
      np.testing.assert_allclose(a[name], e[name], rtol=2e-4, err_msg=str(e))


def test_it_learns_and_measures_both_ways(unbroken):
  cfg, lines = unbroken
  assert lines[-1]["loss"] < lines[0]["loss"] - 1
  evals = runs.lines(cfg.run_dir, "eval")
  assert [line["step"] for line in evals] == [4, 8]
  assert set(evals[0]) == {"step", "kind", "dense"}
  assert set(evals[1]) == {"step", "kind", "dense", "sparse"}
  assert evals[1]["dense"] != evals[1]["sparse"]
  # Bytes are tokens here: bits a byte is the loss in other units.
  for line in lines:
    bits = line["loss"] / np.log(2)
    np.testing.assert_allclose(line["bits_per_byte"], bits, rtol=0.02)
  sample = runs.lines(cfg.run_dir, "sample")[-1]["text"]
  assert sample.startswith("the ")


@pytest.mark.parametrize("stops", [(1, 3), (4,), (2, 5, 7)])
def test_a_stopped_run_goes_on_bit_for_bit(folder, unbroken, stops):
  name = "stops" + "_".join(map(str, stops))
  cfg = runs.config(folder, name)
  for i, stop in enumerate((*stops, None)):
    part = dataclasses.replace(cfg, stop_at=stop, resume=i > 0)
    loop.Run(part).train()
  assert losses(runs.lines(cfg.run_dir, "train")) == losses(unbroken[1])
  one, other = (runs.lines(c.run_dir, "eval")[-1] for c in (cfg, unbroken[0]))
  assert one == other


def test_a_signal_stops_and_saves(folder, unbroken, monkeypatch, capsys):
  cfg = runs.config(folder, "signal")
  run = loop.Run(cfg)
  put = run._put
  batches = iter(range(100))

  def interrupt(*args):
    if next(batches) == 2:
      signal.raise_signal(signal.SIGTERM)
    return put(*args)

  monkeypatch.setattr(run, "_put", interrupt)
  run.train()
  assert "saved. Go on with the same command and --resume" in (
    capsys.readouterr().out
  )
  stopped = len(runs.lines(cfg.run_dir, "train"))
  assert 1 < stopped < 8
  loop.Run(dataclasses.replace(cfg, resume=True)).train()
  assert losses(runs.lines(cfg.run_dir, "train")) == losses(unbroken[1])


def test_a_finished_run_has_nothing_to_go_on_with(unbroken, capsys):
  cfg, lines = unbroken
  loop.Run(dataclasses.replace(cfg, resume=True)).train()
  assert "done: 8 steps" in capsys.readouterr().out
  assert runs.lines(cfg.run_dir, "train") == lines


def test_divergence_is_an_error(folder):
  cfg = runs.config(folder, "diverged")
  optimizer = dataclasses.replace(
    cfg.optimizer, peak_lr=1e30, warmup=0.0, clip_norm=1e30
  )
  with pytest.raises(loop.Diverged, match="peak-lr"):
    loop.Run(dataclasses.replace(cfg, optimizer=optimizer)).train()
