"""Damaged checkpoints, full disks, folders that cannot be written, kills."""

import contextlib
import dataclasses
import functools
import gc
import json
import pathlib
import resource
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import sharding
from tests.train import runs
from train import evaluation
from train import loop
from train import stage
from train.data import corpus as corpus_lib
from train.host import processes
from train.learn import batches as batches_lib
from train.learn import step as step_lib
from train.run import checkpoint
from train.run import run_folder

pytestmark = pytest.mark.slow


def config(folder, run, **kwargs):
  """Six steps of dense training, saved after each second one."""
  cfg = runs.config(folder, run, runs.ONE_LAYER)
  fields: dict[str, Any] = dict(
    stages=(dataclasses.replace(cfg.stages[0], steps=6),),
    checkpoint=dataclasses.replace(cfg.checkpoint, every=2, keep=5),
    log=dataclasses.replace(cfg.log, eval_every=4),
  )
  return dataclasses.replace(cfg, **(fields | kwargs))


def train(cfg, **kwargs):
  run = loop.Run(dataclasses.replace(cfg, **kwargs))
  run.train()
  return run


def lines(cfg):
  """What must be alike; timings need not."""
  timings = ("tokens_per_second", "ms_per_step")
  return [
    {name: x for name, x in line.items() if name not in timings}
    for kind in ("train", "eval", "sample")
    for line in runs.lines(cfg.run_dir, kind)
  ]


def like(cfg):
  _, init = step_lib.init(cfg.model, cfg.seed)
  begin = functools.partial(step_lib.begin_stage, cfg.optimizer, cfg.stages[0])
  return jax.eval_shape(begin, *jax.eval_shape(init, jax.random.key(0)))


@pytest.fixture(scope="module")
def unbroken(folder):
  cfg = config(folder, "unbroken")
  train(cfg)
  return cfg, lines(cfg)


def copy(cfg, folder, name):
  """The run as it was after step 4."""
  target = folder / name
  shutil.copytree(cfg.run_dir, target)
  shutil.rmtree(target / "checkpoints" / "6")
  return dataclasses.replace(cfg, run_dir=str(target))


def damage(file, rng):
  """Half of the file, or one of its bits changed."""
  content = bytearray(file.read_bytes())
  if rng.integers(4) == 0:
    file.write_bytes(content[: len(content) // 2])
    return
  content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  file.write_bytes(content)


@pytest.fixture
def collected():
  """What a test leaves behind is looked at while its filters hold."""
  yield
  gc.collect()


def orphans(test):
  """Marks a test in which Orbax leaves the tasks behind that failed."""
  ignored = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
  )
  return ignored(pytest.mark.usefixtures("collected")(test))


@orphans
def test_no_damaged_file_goes_unnoticed(folder, unbroken):
  """Whichever it is: the checkpoint is refused, or holds what was saved."""
  cfg, _ = unbroken
  mesh = sharding.make_mesh()
  checkpoints = loop.open_checkpoints(dataclasses.replace(cfg, resume=True))
  source = pathlib.Path(cfg.run_dir) / "checkpoints" / "6"
  rng = np.random.default_rng(0)
  refused, whole = set(), set()
  with jax.set_mesh(mesh), contextlib.closing(checkpoints):
    shapes = like(cfg)
    expected, progress = checkpoints.load(6, shapes, mesh)
    safe = source.with_name("6-safe")
    shutil.copytree(source, safe)
    for _ in range(4):
      for file in sorted(x for x in safe.rglob("*") if x.stat().st_size):
        if file.is_dir():
          continue
        name = file.relative_to(safe)
        damage(source / name, rng)
        try:
          found, said = checkpoints.load(6, shapes, mesh)
        except checkpoint.Broken:
          refused.add(name.name)
        else:
          whole.add(name.name)
          assert said == progress, name
          for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            np.testing.assert_array_equal(x, y, str(name))
        shutil.copyfile(file, source / name)
    shutil.rmtree(safe)
  assert "_CHECKPOINT_METADATA" in refused
  assert "manifest.ocdbt" in refused
  data = {x.name for x in source.rglob("d/*")}
  assert data <= refused


@orphans
def test_the_checkpoint_before_a_damaged_one_is_used(folder, unbroken, capsys):
  cfg, expected = unbroken
  cfg = copy(cfg, folder, "damaged")
  files = pathlib.Path(cfg.run_dir).glob("checkpoints/4/state/**/d/*")
  largest = max(files, key=lambda file: file.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 16
  largest.write_bytes(content)
  train(cfg, resume=True)
  said = capsys.readouterr().out
  assert "the checkpoint of step 4 is broken" in said
  assert "resumed  after step 2" in said
  assert lines(cfg) == expected
  aside = pathlib.Path(cfg.run_dir) / "set_aside"
  assert [x.name for x in aside.iterdir()] == ["4-broken"]
  steps = {x.name for x in pathlib.Path(cfg.run_dir).glob("checkpoints/*")}
  assert steps == {"2", "4", "6"}


@orphans
def test_without_a_whole_checkpoint_nothing_is_done(folder, unbroken):
  cfg, _ = unbroken
  cfg = copy(cfg, folder, "lost")
  for file in pathlib.Path(cfg.run_dir).glob("checkpoints/*/state/_METADATA"):
    file.write_text("{")

  def files():
    paths = pathlib.Path(cfg.run_dir).rglob("*")
    return {path for path in paths if path.parent.name != "owners"}

  before = files()
  with pytest.raises(checkpoint.Broken, match=r"None of .*\[2, 4\]"):
    train(cfg, resume=True)
  assert before <= files()


@contextlib.contextmanager
def full_disk():
  """No file may grow over 20 kB."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@orphans
@pytest.mark.parametrize("failing", [{4}, {4, 6}])
def test_a_full_disk_costs_no_training(
  folder, unbroken, monkeypatch, capsys, failing
):
  cfg, expected = unbroken
  cfg = dataclasses.replace(cfg, run_dir=str(folder / f"full_{max(failing)}"))
  save = checkpoint.Checkpoints.save

  def no_room(self, state, step, *args):
    with full_disk() if step in failing else contextlib.nullcontext():
      save(self, state, step, *args)
      self.settle()
    if step in failing:  # some thread of the save goes on for a while
      saves = pathlib.Path(cfg.run_dir, "checkpoints")
      (saves / f"{step}.orbax-checkpoint-tmp/late").mkdir(parents=True)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", no_room)
  if 6 in failing:
    with pytest.raises(run_folder.NotSaved, match="step 6 .*newest is 2"):
      train(cfg)
  else:
    train(cfg)
  assert lines(cfg)[:6] == expected[:6]
  said = capsys.readouterr().out
  for step in failing:
    assert f"the checkpoint of step {step} was NOT written" in said
  assert "are free" in said
  found = {x.name for x in pathlib.Path(cfg.run_dir).glob("checkpoints/*")}
  assert found == {str(x) for x in {2, 4, 6} - failing}
  # And what is there can be gone on from.
  monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
  train(cfg, resume=True)
  assert lines(cfg) == expected


@orphans
def test_a_run_whose_first_save_fails_ends(folder, monkeypatch):
  cfg = config(folder, "unsaved")
  save = checkpoint.Checkpoints.save

  def no_room(self, *args):
    with full_disk():
      save(self, *args)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", no_room)
  with pytest.raises(run_folder.NotSaved, match="step 2 .*the run's first"):
    train(cfg)
  assert [x["step"] for x in runs.lines(cfg.run_dir, "train")] == [1, 2]


def test_a_folder_that_cannot_be_written_is_refused(folder):
  cfg = dataclasses.replace(config(folder, "run"), run_dir="/proc/run")
  with pytest.raises(run_folder.NotSaved, match="cannot be written to"):
    loop.Run(cfg).train()
  cfg = dataclasses.replace(cfg, run_dir="/dev/null/run")
  with pytest.raises(ValueError, match="run_dir='/dev/null/run' cannot be"):
    loop.Run(cfg)


def test_one_command_starts_a_run_and_starts_it_again(folder, unbroken):
  cfg, expected = unbroken
  cfg = dataclasses.replace(cfg, run_dir=str(folder / "again"), resume=True)
  train(cfg, stop_at=1)
  train(cfg, stop_at=3)
  train(cfg, stop_at=3)  # it is there already
  train(cfg, stop_at=2)
  assert [x["step"] for x in runs.lines(cfg.run_dir, "train")] == [1, 2, 3]
  train(cfg)
  assert lines(cfg) == expected


def test_killed_before_its_config_was_whole(folder):
  cfg = config(folder, "early", resume=True)
  half = pathlib.Path(cfg.run_dir) / "config.json.partial"
  half.parent.mkdir()
  half.write_text('{"run_d')
  run_folder.check(cfg.run_dir, dataclasses.asdict(cfg), resume=cfg.resume)
  (half.parent / "notes.txt").write_text("not a run")
  with pytest.raises(ValueError, match="holds no run"):
    run_folder.check(cfg.run_dir, dataclasses.asdict(cfg), resume=cfg.resume)


def test_who_is_stopped_evaluates_later(folder, unbroken):
  """An evaluation is due after step 4, where the run must stop at once."""
  cfg, expected = unbroken
  cfg = dataclasses.replace(cfg, run_dir=str(folder / "owing"))
  train(cfg, stop_at=4)
  assert not runs.lines(cfg.run_dir, "eval")
  train(cfg, stop_at=5, resume=True)
  assert [x["step"] for x in runs.lines(cfg.run_dir, "eval")] == [4]
  train(cfg, resume=True)
  assert lines(cfg) == expected


def test_the_best_and_every_so_many_stay(folder, monkeypatch):
  cfg = config(folder, "kept")
  cfg = dataclasses.replace(
    cfg,
    checkpoint=dataclasses.replace(
      cfg.checkpoint, every=1, keep=1, keep_every=4, keep_best=1
    ),
    log=dataclasses.replace(cfg.log, eval_every=1),
  )

  def lost(self, step, parameters, last):
    return float(abs(step - 2))

  monkeypatch.setattr(evaluation.Evaluation, "__call__", lost)
  train(cfg)
  found = {x.name for x in pathlib.Path(cfg.run_dir).glob("checkpoints/*")}
  assert found == {"2", "4", "6"}


def test_the_loop_reads_nothing_but_metrics_a_step_late(
  folder, monkeypatch, tmp_path
):
  """Between saves, evaluations and samples, each step reads those of the one
  before."""
  cfg = config(folder, "run", run_dir=str(tmp_path / "run"))
  cfg = dataclasses.replace(
    cfg, checkpoint=dataclasses.replace(cfg.checkpoint, every=100)
  )
  events, inside, counting = [], [], []
  fetch, compile_step = processes.fetch, stage.Stage._compile
  save = checkpoint.Checkpoints.save
  kind: Any = type(jnp.zeros(()))
  value = kind._value  # what every way of reading an array asks for

  def fetched(tree):
    events.append("fetch")
    inside.append(True)
    try:
      return fetch(tree)
    finally:
      inside.pop()

  def read(self):
    if counting and not inside:
      events.append("another")
    return value.fget(self)

  def compiled(self, *args):
    step = compile_step(self, *args)
    counting.append(True)

    def run(*args):
      events.append("step")
      return step(*args)

    return run

  def saved(self, *args):
    counting.clear()
    return save(self, *args)

  monkeypatch.setattr(processes, "fetch", fetched)
  monkeypatch.setattr(kind, "_value", property(read))
  monkeypatch.setattr(stage.Stage, "_compile", compiled)
  monkeypatch.setattr(checkpoint.Checkpoints, "save", saved)
  monkeypatch.setattr(stage.Stage, "_sample", lambda *_: None)
  train(cfg)
  first = events.index("step")
  assert events[first : first + 7] == [
    *("step", "step", "fetch", "step", "fetch", "step", "fetch")
  ]
  assert "another" not in events[first:]


def write_lines(file, count=60, broken=()):
  """JSON lines of a few words each, some of them cut."""
  with file.open("w") as out:
    for i in range(count):
      line = json.dumps({"text": f"the {i} of the key to the {i * 7} query"})
      out.write((line[:9] if i in broken else line) + "\n")


def with_lines(folder, run, file, **data):
  cfg = config(folder, run)
  source = corpus_lib.SourceConfig(path=str(file), name="lines")
  return dataclasses.replace(
    cfg, data=dataclasses.replace(cfg.data, sources=(source,), **data)
  )


def test_broken_lines_are_left_out_and_told(folder, tmp_path, capsys):
  file = tmp_path / "web.jsonl"
  write_lines(file, count=200, broken=(17, 150))  # one in a hundred
  cfg = with_lines(folder, "broken", file, max_bad_share=0.02)
  train(cfg)
  told = (pathlib.Path(cfg.run_dir) / "quarantine" / "0.jsonl").read_text()
  at = [json.loads(line)["at"] for line in told.splitlines() if line]
  text = file.read_bytes().splitlines(keepends=True)
  assert at == [len(b"".join(text[:i])) for i in (17, 150)]
  assert "2 bad" in capsys.readouterr().out
  (last,) = {x["step"] for x in runs.lines(cfg.run_dir, "sample")}
  assert last == 6
  strict = with_lines(folder, "strict", file, max_bad_share=0.005)
  with pytest.raises(ValueError, match="max_bad_share"):
    loop.Run(strict)


def test_a_source_that_vanishes_ends_the_run_and_costs_nothing(
  folder, tmp_path, monkeypatch
):
  file = tmp_path / "web.jsonl"
  write_lines(file)
  stages = (dataclasses.replace(config(folder, "").stages[0], steps=60),)
  # Kept apart: what is compiled does not hang on the number of steps.
  whole = with_lines(folder, "whole", file)
  whole = dataclasses.replace(
    whole,
    stages=stages,
    checkpoint=dataclasses.replace(whole.checkpoint, every=30),
    log=dataclasses.replace(whole.log, eval_every=30),
  )
  train(whole)
  cfg = dataclasses.replace(whole, run_dir=str(folder / "vanishing"))
  read, batches = batches_lib.Batches.__next__, iter(range(100))
  with monkeypatch.context() as patch:

    def vanish(self):
      if next(batches) == 3:
        file.rename(tmp_path / "elsewhere")
      return read(self)

    patch.setattr(batches_lib.Batches, "__next__", vanish)
    with pytest.raises(corpus_lib.DataError, match=r"lines.*web\.jsonl"):
      train(cfg)
  steps = [line["step"] for line in runs.lines(cfg.run_dir, "train")]
  assert steps == list(range(1, len(steps) + 1)) and 3 < len(steps) < 60
  newest = max(
    int(x.name) for x in pathlib.Path(cfg.run_dir).glob("checkpoints/*")
  )
  assert newest == len(steps)  # all that was done is kept
  (tmp_path / "elsewhere").rename(file)
  train(cfg, resume=True)
  assert lines(cfg) == lines(whole)


def test_a_folder_says_what_ran(folder, unbroken):
  run_dir = pathlib.Path(unbroken[0].run_dir)
  ran = json.loads((run_dir / "versions" / "1.json").read_text())
  assert ran["packages"]["jax"] == jax.__version__
  log = (run_dir / "log.txt").read_text()
  assert "done: 6 steps" in log and "goodput" in log
  *_, last = runs.lines(str(run_dir), "goodput")
  assert 0 < last["share"] < 1
  assert last["seconds"]["compile"] > 0 and last["seconds"]["checkpoint"] > 0
  *_, line = runs.lines(str(run_dir), "train")
  # Rows are not padded but for the epoch's end.
  (count,) = line["tokens_by_source"].values()
  assert 0.9 < count / (6 * 4 * 32) <= 1


def test_steps_are_traced(folder, unbroken):
  cfg, _ = unbroken
  cfg = dataclasses.replace(cfg, run_dir=str(folder / "traced"))
  train(cfg, profile="3,4", stop_at=5)
  profile = pathlib.Path(cfg.run_dir) / "profile"
  assert any(x.stat().st_size for x in profile.rglob("*.xplane.pb"))
  for wrong in ("4,3", "0,2", "4", "a,b"):
    with pytest.raises(ValueError, match="profile="):
      dataclasses.replace(cfg, profile=wrong)
