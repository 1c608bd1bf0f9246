"""What is said of a run that does not begin, and what it is refused for."""

import ast
import dataclasses
import pathlib
import re
import shutil
import types

import jax
import pytest

from dsa_jax import sharding
from tests.model import models
from tests.train import runs
from train import loop
from train import preflight
from train.data import corpus as corpus_lib
from train.host import mesh as mesh_lib
from train.learn import batches as batches_lib
from train.learn import step as step_lib
from train.run import checkpoint


@pytest.fixture(scope="module")
def trained(folder):
  """A run that goes on after step 1 of its only stage."""
  cfg = runs.config(folder, "trained")
  cfg = dataclasses.replace(cfg, stages=cfg.stages[:1])
  checkpoints = loop.open_checkpoints(cfg)
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    _, init = step_lib.init(cfg.model, cfg.seed)
    shapes = step_lib.on_mesh(jax.eval_shape(init, jax.random.key(0)), mesh)
    state = step_lib.begin_stage(
      cfg.optimizer, cfg.stages[0], *models.filled(shapes, 0.1), step=1
    )
    checkpoints.save(state, 1, checkpoint.Progress(), cfg.model, None)
    checkpoints.close()
  return dataclasses.replace(cfg, resume=True)


def contents(folder):
  return {
    str(file): (file.stat().st_mtime_ns, file.is_file() and file.read_bytes())
    for file in pathlib.Path(folder).rglob("*")
  }


def disk(monkeypatch, free):
  usage = types.SimpleNamespace(total=free, used=0, free=free)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


class Device:
  def __init__(self, limit):
    self._limit = limit

  def memory_stats(self):
    return {"bytes_limit": self._limit}


def test_shows_what_each_stage_begins_with(tmp_path, capsys):
  documents = [f"{i}. Squared, {i} is {i * i}." for i in range(40)]
  for i, text in enumerate(documents):
    (tmp_path / f"{i}.txt").write_text(text)
  cfg = runs.config(tmp_path, "new")
  preflight.report(cfg)
  said = capsys.readouterr().out
  assert said.endswith("begins   with random parameters, seed 1\nok\n")
  shown = re.split(r"batch +stage \d begins with; ", said)[1:]
  corpus = corpus_lib.Corpus(cfg.data)
  borders = 0
  for i, (stage, lines) in enumerate(zip(cfg.stages, shown, strict=True)):
    with jax.set_mesh(sharding.make_mesh()):
      batches = batches_lib.Batches(
        corpus, stage, cfg.model.rules, cfg.seed + i, 1
      )
      tokens = jax.device_get(next(batches)["tokens"])
      batches.close()
    rows = tokens.reshape(-1, stage.seq_len)
    found = re.split(r"  row \d: ", lines)[1:]
    for row, text in zip(rows, found[:2]):
      pieces = re.findall(r"^ +(\d+) \| (.+)$", text, re.MULTILINE)
      assert text.startswith(
        f"{stage.seq_len} tokens; documents: {len(pieces)}\n"
      )
      assert sum(int(length) for length, _ in pieces) == stage.seq_len
      parts = [ast.literal_eval(part) for _, part in pieces]
      assert "".join(parts) == corpus.tokenizer.decode(row)
      assert all(any(x in whole for whole in documents) for x in parts)
      borders += len(parts) - 1
  assert borders > 4


def test_leaves_no_trace_of_a_new_run(folder):
  cfg = runs.config(folder, "untouched")
  preflight.report(cfg)
  assert not pathlib.Path(cfg.run_dir).exists()


@pytest.mark.slow
def test_a_resume_is_opened_and_left_as_it_is(trained, capsys):
  before = contents(trained.run_dir)
  preflight.report(trained)
  assert contents(trained.run_dir) == before
  assert f"resumes  {trained.run_dir}/checkpoints/1\nok" in (
    capsys.readouterr().out
  )


def test_refuses_a_checkpoint_of_another_model(folder, trained, tmp_path):
  wider = dataclasses.replace(trained.model, embed_dim=64)
  moved = tmp_path / "moved"
  shutil.copytree(trained.run_dir, moved)
  config = (moved / "config.json").read_text()
  (moved / "config.json").write_text(
    config.replace('"embed_dim": 32', '"embed_dim": 64')
  )
  cfg = dataclasses.replace(trained, run_dir=str(moved), model=wider)
  with pytest.raises(ValueError, match="checkpoints/1 holds another model"):
    preflight.report(cfg)


def test_the_disk_must_hold_what_is_kept(folder, trained, capsys, monkeypatch):
  # One of a stage's end, two that are kept, one more while it is written.
  cfg = dataclasses.replace(trained, resume=False, run_dir=f"{folder}/disk")
  disk(monkeypatch, 10**9)
  preflight.report(cfg)
  said = re.search(
    r"disk     checkpoints of (\d+) kB: (.+) MB with those of 1 stages' ends;"
    " 1 GB free",
    capsys.readouterr().out,
  )
  assert said
  size = 1000 * int(said[1])
  assert abs(float(said[2]) * 1e6 / size - 4) < 0.02
  # The moments are zeros yet, which take no room in this one.
  (saved,) = pathlib.Path(trained.run_dir).glob("checkpoints/1/state")
  written = sum(x.stat().st_size for x in saved.rglob("*") if x.is_file())
  assert size / 3 < written < size
  disk(monkeypatch, round(3.5 * size))
  with pytest.raises(ValueError, match="--checkpoint.keep=2"):
    preflight.report(cfg)
  preflight.report(trained)  # has one of the four already


@pytest.mark.parametrize(
  ("save", "times"),
  [
    # Of 40 steps: what is kept, one more, and that of the stage's end; of all
    # that are saved, three more.
    (dict(every=10, keep=1), 1 + 1 + 1),
    (dict(every=10, keep=2**31 - 1), 4 + 3 + 1),
    (dict(every=1000, keep=9), 0 + 3 + 1),
    (dict(every=4, keep=1, keep_best=3), 1 + 3 + 1 + 1),
    (dict(every=4, keep=1, keep_every=8), 1 + 5 + 1 + 1),
    (dict(every=4, keep=1, keep_every=6), 1 + 3 + 1 + 1),
  ],
)
def test_no_more_is_kept_than_is_saved(folder, save, times):
  cfg = runs.config(folder, "kept")
  stage = dataclasses.replace(cfg.stages[0], steps=40)
  save = checkpoint.CheckpointConfig(**save)
  cfg = dataclasses.replace(cfg, stages=(stage,), checkpoint=save)
  assert f": {times} kB with those of 1 " in preflight._disk(cfg, [1000])


def test_the_device_must_hold_the_state(trained, capsys, monkeypatch):
  monkeypatch.setattr(jax, "local_devices", lambda: [Device(10**9)])
  preflight.report(trained)
  said = capsys.readouterr().out
  assert "its memory: 1 GB" in said
  stage = re.search(r"parameters and optimizer ([\d.]+ kB) a device", said)
  assert stage and f"memory   {stage[1]} of parameters" in said
  monkeypatch.setattr(jax, "local_devices", lambda: [Device(10**4)])
  with pytest.raises(ValueError, match="has 10 kB: raise --mesh.fsdp"):
    preflight.report(trained)


def test_a_device_holds_its_share(folder, capsys):
  cfg = runs.config(folder, "whole")
  held = []
  for run_dir, mesh in (
    ("whole", mesh_lib.MeshConfig()),
    ("shared", mesh_lib.MeshConfig(fsdp=2)),
  ):
    preflight.report(
      dataclasses.replace(cfg, run_dir=f"{folder}/{run_dir}", mesh=mesh)
    )
    said = capsys.readouterr().out
    share = re.search(r"memory +([\d.]+) (k|M)B of parameters", said)
    assert share
    held.append(float(share[1]) * {"k": 1e3, "M": 1e6}[share[2]])
  assert 0.5 < held[1] / held[0] < 0.7
