"""Checkpoints of a run among what else a disk may hold, or refuse."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import sharding
from tests.train import runs
from train.host import atomic_files
from train.learn import guards
from train.learn import step as step_lib
from train.run import checkpoint
from train.run import run_folder

STEPS = 40


def state_of(step):
  return step_lib.TrainState(
    jnp.int32(step),
    nnx.State({"a": nnx.Param(jnp.arange(6.0).reshape(2, 3) + step)}),
    nnx.State({"b": nnx.Param(jnp.zeros(2))}),
    {"mu": jnp.ones(3)},
    guards.begin(),
  )


@contextlib.contextmanager
def opened(run_dir, resume=True, stage_ends=(20, STEPS), **fields):
  cfg = checkpoint.CheckpointConfig(**fields)
  checkpoints = checkpoint.Checkpoints(
    str(run_dir), cfg, {"seed": 1}, stage_ends=stage_ends, resume=resume
  )
  with contextlib.closing(checkpoints):
    yield checkpoints


def save(checkpoints, step, bits_per_byte=None):
  progress = checkpoint.Progress(data={"at": step})
  checkpoints.save(state_of(step), step, progress, runs.MODEL, bits_per_byte)


def load(checkpoints, step):
  like = jax.eval_shape(lambda: state_of(step))
  return checkpoints.load(step, like, sharding.make_mesh())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  run_dir = tmp_path_factory.mktemp("saved") / "run"
  with opened(run_dir, resume=False) as checkpoints:
    for step in (2, 4, 6):
      save(checkpoints, step, 1.0)
  return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def test_what_is_loaded_is_what_was_saved(run_dir):
  with opened(run_dir) as checkpoints:
    assert checkpoints.steps == [2, 4, 6]
    state, progress = load(checkpoints, 4)
  assert progress == checkpoint.Progress(data={"at": 4})
  chex_equal(state, state_of(4))


def chex_equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    np.testing.assert_array_equal(x, y)


def test_a_checkpoint_under_another_number_is_broken(run_dir):
  """Renamed, or copied: training would go on from other parameters."""
  folder = run_dir / "checkpoints"
  shutil.copytree(folder / "4", folder / "8")
  with opened(run_dir) as checkpoints:
    assert checkpoints.steps == [2, 4, 6, 8]
    with pytest.raises(checkpoint.Broken, match="8 is .* of step 4"):
      load(checkpoints, 8)
    chex_equal(load(checkpoints, 4)[0], state_of(4))


def test_what_has_a_later_number_takes_no_place(run_dir):
  with opened(run_dir, keep=1) as checkpoints:
    (run_dir / "checkpoints" / "19").mkdir()  # by nobody here
    save(checkpoints, 8)
    checkpoints.finish()
  names = {p.name for p in (run_dir / "checkpoints").iterdir()}
  assert names == {"8", "19"}


ODD = {
  "emptied metrics": lambda c: (c / "2/metrics/metrics").write_text(""),
  "metrics that are a folder": lambda c: replace(c / "2/metrics", "mkdir"),
  "emptied metadata": lambda c: (c / "2/_CHECKPOINT_METADATA").write_text(""),
  "metadata of another kind": lambda c: (
    c / "2/_CHECKPOINT_METADATA"
  ).write_text("[1]"),
  "a folder beyond the end": lambda c: (c / "999999").mkdir(),
  "a file beyond the end": lambda c: (c / "999999").write_text("x"),
  "a link to nothing": lambda c: (c / "999998").symlink_to("nowhere"),
  "a copy": lambda c: shutil.copytree(c / "6", c / "6.bak"),
  "a number of another script": lambda c: (c / "٣").mkdir(),
  "leading zeros": lambda c: shutil.copytree(c / "6", c / "006"),
  "a file that hides a step": lambda c: (c / "7").write_text("x"),
  "step zero": lambda c: (c / "0").mkdir(),
  "what a killed save left": lambda c: (
    c / "7.orbax-checkpoint-tmp" / "state"
  ).mkdir(parents=True),
}


def replace(path, kind):
  shutil.rmtree(path)
  getattr(path, kind)()


@pytest.mark.parametrize("odd", ODD)
def test_what_lies_beside_the_newest_blocks_nothing(run_dir, odd, capsys):
  ODD[odd](run_dir / "checkpoints")
  before = {p.name for p in (run_dir / "checkpoints").iterdir()}
  with opened(run_dir) as checkpoints:
    assert checkpoints.steps == [2, 4, 6]
    chex_equal(load(checkpoints, 6)[0], state_of(6))
    save(checkpoints, 8)
    checkpoints.finish()
    chex_equal(load(checkpoints, 8)[0], state_of(8))
  # Nothing that is not the run's goes.
  after = {p.name for p in (run_dir / "checkpoints").iterdir()}
  left = {name for name in before if name.endswith("-tmp")}
  assert after == before - {"2"} - left | {"8"}
  if before - {"2", "4", "6"} - left:
    assert "left alone" in capsys.readouterr().out


@pytest.mark.parametrize(
  "name", ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 64, b"[]"])
def test_an_emptied_file_makes_a_broken_checkpoint(run_dir, name, content):
  """A power cut leaves such files where they were not on the disk yet."""
  (run_dir / "checkpoints" / "6" / name).write_bytes(content)
  with opened(run_dir) as checkpoints:
    with pytest.raises(checkpoint.Broken, match="checkpoints/6"):
      load(checkpoints, 6)
    chex_equal(load(checkpoints, 4)[0], state_of(4))


def test_a_broken_one_that_cannot_be_moved_is_left(
  run_dir, monkeypatch, capsys
):
  def refuse(source, target):
    raise PermissionError(13, "Permission denied", str(source))

  with opened(run_dir) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint.os, "rename", refuse)
      checkpoints.set_aside([6], "broken")
    assert checkpoints.steps == [2, 4]
    said = capsys.readouterr().out
    assert "6 could not be moved" in said and "Permission denied" in said
    save(checkpoints, 8)
    checkpoints.finish()
    assert checkpoints.steps == [2, 4, 8]


@pytest.mark.parametrize("place", ["file", "link"])
def test_set_aside_may_be_in_the_way(run_dir, place, capsys):
  aside = run_dir / "set_aside"
  aside.write_text("x") if place == "file" else aside.symlink_to("nowhere")
  with opened(run_dir) as checkpoints:
    checkpoints.set_aside([6], "broken")
    assert checkpoints.steps == [2, 4]
  assert "6 could not be moved" in capsys.readouterr().out


def test_what_was_set_aside_is_saved_again(run_dir):
  with opened(run_dir) as checkpoints:
    checkpoints.set_aside([4, 6], "rollback-1")
    assert checkpoints.steps == [2]
    save(checkpoints, 6)
    checkpoints.finish()
    assert checkpoints.steps == [2, 6]
  assert {p.name for p in (run_dir / "set_aside").iterdir()} == {
    "4-rollback-1",
    "6-rollback-1",
  }


@pytest.mark.parametrize(
  ("fields", "stays"),
  [
    (dict(keep=2), {6, 7}),
    (dict(keep=1, stage_ends=(3, STEPS)), {3, 7}),
    (dict(keep=1, keep_every=2), {2, 4, 6, 7}),
    (dict(keep=1, keep_best=1), {5, 7}),  # the later of two
    (dict(keep=1, keep_best=2), {3, 5, 7}),
    (dict(keep=1, keep_best=9), {2, 3, 4, 5, 6, 7}),  # 1 was not measured
  ],
)
def test_which_checkpoints_stay(tmp_path, fields, stays):
  bits = {1: None, 2: 3.0, 3: 1.0, 4: 2.0, 5: 1.0, 6: 4.0, 7: 5.0}
  with opened(tmp_path / "run", resume=False, **fields) as checkpoints:
    for step, x in bits.items():
      save(checkpoints, step, x)
      if step == 4:  # what is kept hangs on nothing that is in memory
        checkpoints.finish()
    checkpoints.finish()
    assert set(checkpoints.steps) == stays


def test_a_damaged_one_is_not_the_best(run_dir):
  record = run_dir / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
  text = record.read_text()
  better = text.replace('"bits_per_byte": 1.0', '"bits_per_byte": 0.0')
  assert better != text
  record.write_text(better)
  with opened(run_dir, keep=1, keep_best=1) as checkpoints:
    save(checkpoints, 8, 2.0)
    checkpoints.finish()
    assert checkpoints.steps == [6, 8]


def refusing(monkeypatch, name):
  """Lets a function of the file system fail."""
  kept = getattr(atomic_files, name)

  def fail(path):
    raise OSError(5, "Input/output error", str(path))

  monkeypatch.setattr(atomic_files, name, fail)
  return lambda: monkeypatch.setattr(atomic_files, name, kept)


def test_nothing_gets_its_name_before_it_is_on_the_disk(run_dir, monkeypatch):
  """And what is older goes after that."""
  events = []
  sync, rename = atomic_files.sync, os.rename

  def synced(path):
    events.append(("sync", pathlib.Path(path)))
    sync(path)

  def renamed(source, target, **kwargs):
    events.append(("rename", pathlib.Path(target)))
    rename(source, target, **kwargs)

  monkeypatch.setattr(atomic_files, "sync", synced)
  monkeypatch.setattr(os, "rename", renamed)
  with opened(run_dir, keep=1) as checkpoints:
    save(checkpoints, 8)
    checkpoints.finish()
  folder = run_dir / "checkpoints"
  final = events.index(("rename", folder / "8"))
  partial = "8.orbax-checkpoint-tmp"
  before = {p for kind, p in events[:final] if partial in str(p)}
  for name in ("_CHECKPOINT_METADATA", "state/_METADATA", "state", ""):
    assert folder / partial / name in before
  gone = min(i for i, (_, p) in enumerate(events) if "6.orbax" in p.name)
  after = {p for kind, p in events[final:gone] if kind == "sync"}
  assert {folder, folder / "8", folder / "8/_CHECKPOINT_METADATA"} <= after
  assert [p.name for p in folder.iterdir()] == ["8"]


def test_what_is_not_on_the_disk_is_not_written(run_dir, monkeypatch, capsys):
  with opened(run_dir) as checkpoints:
    mend = refusing(monkeypatch, "sync")
    save(checkpoints, 8)
    checkpoints.settle()
    said = capsys.readouterr().out
    assert "step 8 was NOT written" in said and "Input/output error" in said
    assert checkpoints.steps == [2, 4, 6]
    mend()
    save(checkpoints, 10)
    checkpoints.finish()
    assert checkpoints.steps == [4, 6, 10]


def test_a_run_whose_first_save_fails_does_not_go_on(tmp_path, monkeypatch):
  mend = refusing(monkeypatch, "sync_all")
  with opened(tmp_path / "run", resume=False) as checkpoints:
    with pytest.raises(run_folder.NotSaved, match="step 2 .*the run's first"):
      save(checkpoints, 2)
    mend()
    save(checkpoints, 3)
    checkpoints.finish()
    assert checkpoints.steps == [3]


def test_what_cannot_be_removed_is_told(run_dir, monkeypatch, capsys):
  rename = pathlib.Path.rename

  def refuse(self, target):
    if self.name == "2":
      raise PermissionError(13, "Permission denied", str(self))
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, "rename", refuse)
  with opened(run_dir) as checkpoints:
    save(checkpoints, 8)
    checkpoints.finish()
    assert checkpoints.steps == [2, 4, 6, 8]
  assert "could not be removed (Permission denied)" in capsys.readouterr().out


def test_old_progress_is_read_by_name(run_dir):
  """A field that is not known is no reason for a traceback."""
  with opened(run_dir) as checkpoints:
    fields = dataclasses.fields(checkpoint.Progress)
    assert {"data", "tokens"} <= {field.name for field in fields}
    said = run_dir / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    values = json.loads(said.read_text())
    values["custom_metadata"]["progress"] = '{"future": 1}'
    said.write_text(json.dumps(values))
    with pytest.raises(checkpoint.Broken):
      load(checkpoints, 6)
