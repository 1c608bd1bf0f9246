"""What people read of a run may fail to be written: training goes on."""

import dataclasses
import os
import pathlib

import pytest

from tests.train import runs
from tests.train import survival_test
from train import loop

pytestmark = pytest.mark.slow
lines, train = survival_test.lines, survival_test.train
unbroken, collected = survival_test.unbroken, survival_test.collected
orphans = survival_test.orphans


@orphans
def test_what_people_read_may_fail_and_training_goes_on(
  folder, unbroken, monkeypatch, capsys
):
  """Each of a run's other files has a folder in its place, or a full disk."""
  cfg, expected = unbroken
  cfg = dataclasses.replace(
    cfg,
    run_dir=str(folder / "unread"),
    log=dataclasses.replace(cfg.log, tensorboard=True),
    profile="3,4",
  )
  run_dir = pathlib.Path(cfg.run_dir)
  opened = loop.open_checkpoints

  def beset(cfg):
    checkpoints = opened(cfg)
    for name in ("selections", "attempts", "versions", "tensorboard"):
      (run_dir / name).write_text("in the way")
    (run_dir / "profile").write_text("in the way")
    (run_dir / "log.txt").mkdir()
    return checkpoints

  monkeypatch.setattr(loop, "open_checkpoints", beset)
  train(cfg)
  out, err = capsys.readouterr()
  for name in ("attempts", "versions", "tensorboard", "profile"):
    assert f"unread/{name}" in out
  assert err.count("log.txt could not be written") == 1
  assert lines(cfg) == expected


@orphans
def test_lines_that_the_disk_refused_are_all_there_in_the_end(
  folder, unbroken, monkeypatch, capsys
):
  cfg, expected = unbroken
  cfg = dataclasses.replace(cfg, run_dir=str(folder / "refused"))
  write, calls = os.pwrite, iter(range(1000))

  def refused(*args):
    if 2 <= next(calls) < 8:
      raise OSError(28, "No space left on device")
    return write(*args)

  monkeypatch.setattr(os, "pwrite", refused)
  train(cfg)
  assert lines(cfg) == expected
  assert "metrics.jsonl could not be written (No space" in (
    capsys.readouterr().out
  )


def test_what_a_model_writes_ends_no_run(folder, unbroken, monkeypatch, capsys):
  """Escapes, half characters and NUL: shown, logged and written, not obeyed."""
  cfg, _ = unbroken
  cfg = dataclasses.replace(cfg, run_dir=str(folder / "odd"))
  text = "a\x1b[2J\ufffd\ud800\0\rb\n\u202ec"
  tokenizer = type(loop.Run(cfg).corpus.tokenizer)
  monkeypatch.setattr(tokenizer, "decode", lambda self, tokens: text)
  train(cfg)
  shown = "  | a\\x1b[2J\ufffd\\ud800\\x00\\x0db\n  | \\u202ec\n"
  assert shown in capsys.readouterr().out
  (line,) = runs.lines(cfg.run_dir, "sample")
  assert line["text"] == text
