"""Runs whose data changed between two starts."""

import dataclasses
import pathlib

import pytest

from tests.train import runs
from train import loop
from train import preflight
from train.data import corpus as corpus_lib

pytestmark = pytest.mark.slow


def write(folder, word="text"):
  for i in range(40):
    (folder / f"{i:02d}.txt").write_text(f"{i:02d} {word} " * 12)


@pytest.fixture
def cfg(folder, tmp_path):
  """Two stages of three steps, stopped within or between them."""
  write(tmp_path)
  cfg = runs.config(folder, "", runs.ONE_LAYER)
  source = corpus_lib.SourceConfig(path=f"{tmp_path}/*.txt", name="books")
  return dataclasses.replace(
    cfg,
    run_dir=str(tmp_path / "run"),
    data=dataclasses.replace(cfg.data, sources=(source,)),
    stages=tuple(dataclasses.replace(x, steps=3) for x in cfg.stages[:2]),
    # Only the last step is worth an evaluation.
    log=dataclasses.replace(cfg.log, eval_every=100, sample_every=100),
  )


def start(cfg, **kwargs):
  loop.Run(dataclasses.replace(cfg, **kwargs)).train()


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("step", [2, 3])  # within a stage, at its end
def test_they_are_refused_or_told(cfg, tmp_path, capsys, step):
  start(cfg, stop_at=step)
  resumed = dataclasses.replace(cfg, resume=True)
  before = sorted(tmp_path.rglob("checkpoints/*"))
  (tmp_path / "17.txt").write_text("17 TEXT " * 12)
  with pytest.raises(
    corpus_lib.DataError,
    match="'books': 17.txt holds other text.*--data.allow-changed",
  ):
    start(resumed)
  with pytest.raises(corpus_lib.DataError, match="17.txt holds other text"):
    preflight.report(dataclasses.replace(resumed, check=True))
  assert sorted(tmp_path.rglob("checkpoints/*")) == before
  capsys.readouterr()
  allowing = dataclasses.replace(cfg.data, allow_changed=True)
  start(resumed, data=allowing, stop_at=5)
  said = capsys.readouterr().out
  assert said.count("CHANGED  the data are not") == 1
  # The checkpoint is of the data as they are now.
  start(resumed)
  assert "CHANGED" not in capsys.readouterr().out
  steps = [line["step"] for line in runs.lines(cfg.run_dir, "train")]
  assert steps == list(range(1, 7))


def test_as_they_were_they_are_gone_on_with(cfg, tmp_path, capsys):
  start(cfg, stop_at=2)
  (tmp_path / "17.txt").write_text("17 TEXT " * 12)
  with pytest.raises(corpus_lib.DataError, match="17.txt"):
    start(cfg, resume=True)
  write(tmp_path)
  preflight.report(dataclasses.replace(cfg, resume=True, check=True))
  assert f"resumes  {pathlib.Path(cfg.run_dir)}" in capsys.readouterr().out
  start(cfg, resume=True, stop_at=3)
