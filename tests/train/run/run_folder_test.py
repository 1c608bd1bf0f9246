"""Folders that are, were, or cannot be those of a run."""

import json
import pathlib
import shutil
from typing import Any

import pytest

from dsa_jax import config as model_lib
from train import convert
from train.host import ownership
from train.run import goodput
from train.run import origin as origin_lib
from train.run import run_folder

CONFIG = {"seed": 1, "stages": [{"kind": "pretrain", "steps": 9}]}


def attempt(run_dir, number, after, saved):
  folder = run_dir / "attempts"
  folder.mkdir(exist_ok=True)
  values = goodput.Attempt(
    began=1.0,
    now=9.0,
    after=after,
    step=9,
    saved=[(step, 1.0) for step in saved],
    skipped=[],
    again=0,
    seconds={"steps": 8.0},
  )
  (folder / f"{number}.json").write_text(json.dumps(vars(values)))


@pytest.fixture
def run_dir(tmp_path):
  """A run that was saved."""
  folder = tmp_path / "run"
  run_folder.open_(str(folder), CONFIG, resume=False)
  (folder / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n')
  (folder / "checkpoints" / "4").mkdir(parents=True)
  attempt(folder, 1, 0, [4])
  return folder


def check(folder, resume=True):
  run_folder.check(str(folder), CONFIG, resume=resume)


def test_a_run_that_was_saved_is_gone_on_with(run_dir):
  check(run_dir)


@pytest.mark.parametrize("lost", ["missing", "file", "link", "empty"])
def test_lost_checkpoints_are_no_new_beginning(run_dir, lost):
  """The disk that they are on is not mounted, for example."""
  attempt(run_dir, 2, 4, [6])
  inner = run_dir / "checkpoints"
  shutil.rmtree(inner)
  match lost:
    case "file":
      inner.write_text("")
    case "link":
      inner.symlink_to("nowhere")
    case "empty":
      inner.mkdir()
  before = (run_dir / "metrics.jsonl").read_bytes()
  with pytest.raises(ValueError, match="checkpoints.* mounted.*--run-dir"):
    check(run_dir)
  assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("saved", [[], [4]])
def test_killed_before_its_first_checkpoint_was_written(run_dir, saved):
  """A save that was asked for may not have come to its end."""
  attempt(run_dir, 1, 0, saved)
  shutil.rmtree(run_dir / "checkpoints" / "4")
  check(run_dir)


@pytest.mark.parametrize("bad", ["", "{", "[]", "null", "\0\0", "[" * 10**5])
def test_a_damaged_config_is_named(run_dir, bad):
  (run_dir / "config.json").write_text(bad)
  with pytest.raises(
    ValueError, match=r"config\.json .*copy.*--init-from="
  ) as e:
    check(run_dir)
  assert "\n" not in str(e.value)


def test_a_config_that_is_a_folder_is_named(run_dir):
  (run_dir / "config.json").unlink()
  (run_dir / "config.json").mkdir()
  with pytest.raises(ValueError, match=r"config\.json cannot be read"):
    check(run_dir)


def test_a_lost_config_leaves_its_parameters(run_dir):
  (run_dir / "config.json").unlink()
  with pytest.raises(ValueError, match=f"no config.*--init-from={run_dir}"):
    check(run_dir)


ADDRESSES = [
  "gs://bucket/run",
  "s3://b/r",
  "gs:/bucket/run",
  "GS://b",
  "az://c",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("resume", [False, True])
def test_an_address_is_no_folder(address, resume, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="run_dir=.*mount the bucket.*gcsfuse"):
    check(address, resume)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("address", ADDRESSES)
def test_nor_is_it_an_origin_or_a_conversion(address, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="init_from=.*mount the bucket"):
    origin_lib.Origin(address, model_lib.tiny())
  commands: list[dict[str, Any]] = [
    dict(source=address, target="out"),
    dict(source="in", target=address),
    dict(source="in", target="out", like=address),
  ]
  for options in commands:
    with pytest.raises(ValueError, match="=.*mount the bucket"):
      convert.convert(convert.Conversion(**options))
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("way", ["link", "link/run"])
def test_a_link_to_nothing_is_no_new_beginning(tmp_path, way, resume):
  """Such as one to a disk that is not mounted."""
  (tmp_path / "link").symlink_to(tmp_path / "unmounted")
  path = str(tmp_path / way)
  with pytest.raises(ValueError, match="run_dir=.* leads nowhere: .*mounted"):
    run_folder.check(path, CONFIG, resume=resume)
  with pytest.raises(ValueError, match="init_from=.* leads nowhere"):
    origin_lib.Origin(path, model_lib.tiny())
  for source, target in ((path, "out"), ("in", path)):
    with pytest.raises(ValueError, match="=.* leads nowhere"):
      convert.convert(convert.Conversion(source, target))
  assert {p.name for p in tmp_path.iterdir()} == {"link"}


@pytest.mark.parametrize("path", ["run:1", "a/b:c/d", "C:/run", "./gs:/x"])
def test_a_path_may_have_a_colon(path):
  run_folder.check_path("run_dir", path)


@pytest.mark.parametrize(
  ("path", "says"),
  [
    ("loop", "cannot be reached (Too many levels of symbolic links)"),
    ("loop/run", "cannot be reached (Too many levels of symbolic links)"),
    ("file/run", "cannot be reached (Not a directory)"),
    ("x" * 300, "cannot be reached (File name too long)"),
    ("~", "would be a folder named ~"),
    ("~/run", "would be a folder named ~"),
  ],
)
def test_a_path_on_which_nothing_can_be_is_refused(
  tmp_path, monkeypatch, path, says
):
  """Before it is resolved, which ends in an error of another kind, or made."""
  monkeypatch.chdir(tmp_path)
  pathlib.Path("loop").symlink_to("loop")
  pathlib.Path("file").touch()
  before = sorted(tmp_path.iterdir())
  for refuse, option in (
    (lambda: run_folder.check(path, CONFIG, resume=True), "run_dir"),
    (lambda: origin_lib.Origin(path, model_lib.tiny()), "init_from"),
    (lambda: convert.convert(convert.Conversion(path, "out")), "source"),
    (lambda: convert.convert(convert.Conversion("in", path)), "target"),
  ):
    with pytest.raises(ValueError) as error:
      refuse()
    assert str(error.value).startswith(f"{option}=")
    assert says in str(error.value) and len(str(error.value)) < 300
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("path", ["./~", "a~", "~name", "new/run"])
def test_a_path_may_lead_to_what_is_not_there_yet(tmp_path, monkeypatch, path):
  monkeypatch.chdir(tmp_path)
  run_folder.check(path, CONFIG, resume=False)


def test_the_steps_that_are_there(run_dir):
  inner = run_dir / "checkpoints"
  for name in ("10", "010", "10.bak", "٣", "-1", "1e3", "+5"):
    (inner / name).mkdir()
  (inner / "11").touch()
  (inner / "12").symlink_to("nowhere")
  (inner / "13").symlink_to("10")  # on another disk, say
  assert run_folder.checkpoints(run_dir) == {
    step: inner / str(step) for step in (4, 10, 13)
  }
  assert run_folder.checkpoints(pathlib.Path("nowhere")) == {}


def test_a_folder_that_is_owned_is_told_of_by_its_owner(run_dir):
  claim = ownership.Claim(run_dir)
  with pytest.raises(ValueError, match=r"owned by process \d+ on .*--resume"):
    run_folder.check(str(run_dir), CONFIG, resume=False)
  claim.close()
  with pytest.raises(ValueError, match="not empty: go on"):
    run_folder.check(str(run_dir), CONFIG, resume=False)


def test_a_run_that_could_not_begin_leaves_a_folder_to_begin_in(tmp_path):
  """Its disk was full: it has said so in its log."""
  (tmp_path / "log.txt").write_text("NotSaved\n")
  ownership.Claim(tmp_path).close()
  run_folder.open_(str(tmp_path), CONFIG, resume=False)
  assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
