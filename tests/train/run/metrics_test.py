"""Where the numbers of a run go, and what a resumed run makes of them."""

import json
import sys
import types
from unittest import mock

import jax
import pytest

from train.run import metrics


class Wandb(types.ModuleType):
  """Stands in for the package; keeps what it is given."""

  def __init__(self):
    super().__init__("wandb")
    self.started, self.logged, self.finished = [], [], 0
    self.fails = ""

  def init(self, **options):
    self._may_fail("init")
    self.started.append(options)
    return self

  def define_metric(self, name, step_metric):
    assert (name, step_metric) == ("*", "step")

  def log(self, values):
    self._may_fail("log")
    self.logged.append(values)

  def finish(self):
    self._may_fail("finish")
    self.finished += 1

  def _may_fail(self, what):
    if what == self.fails:
      raise ConnectionError("no way out")


@pytest.fixture
def wandb(monkeypatch, tmp_path):
  module = Wandb()
  monkeypatch.setitem(sys.modules, "wandb", module)
  (tmp_path / "config.json").write_text('{"seed": 7}')
  return module


def write(folder, steps, *, tensorboard=False, wandb=None):
  writer = metrics.Writer(
    str(folder),
    steps[0],
    again=False,
    tensorboard=tensorboard,
    wandb=wandb,
  )
  for step in steps:
    writer.write(step, "train", {"loss": float(step)})
  writer.close()


def steps(folder):
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line)["step"] for line in text.splitlines()]


def test_what_comes_again_is_dropped(tmp_path):
  write(tmp_path, [1, 2, 3, 4])
  write(tmp_path, [3, 4, 5])
  assert steps(tmp_path) == [1, 2, 3, 4, 5]
  assert [x.name for x in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
  "half", ['{"step": 3, "loss": 1', "{", '{"step"', "\0\0\0", "\xff"]
)
def test_half_a_line_at_the_end_breaks_no_resume(tmp_path, half):
  write(tmp_path, [1, 2])
  with (tmp_path / "metrics.jsonl").open("a", encoding="latin-1") as out:
    out.write(half)
  write(tmp_path, [3, 4])
  assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_whole_line_that_lacks_its_end_stays(tmp_path):
  write(tmp_path, [1, 2])
  file = tmp_path / "metrics.jsonl"
  file.write_text(file.read_text().removesuffix("\n"))
  write(tmp_path, [3])
  assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("bad", ['{"step": 2,', "[3]", "{}", ""])
def test_a_malformed_line_elsewhere_is_an_error(tmp_path, bad):
  write(tmp_path, [1, 2, 3])
  file = tmp_path / "metrics.jsonl"
  lines = file.read_text().splitlines()
  text = "\n".join([lines[0], bad, lines[2], ""])
  file.write_text(text)
  with pytest.raises(ValueError, match="metrics.jsonl, line 2 is malformed"):
    write(tmp_path, [4])
  assert file.read_text() == text


def test_wandb_gets_what_is_written(tmp_path, wandb):
  write(tmp_path, [1, 2], wandb="sparse")
  assert wandb.logged == [
    {"step": 1, "train/loss": 1.0},
    {"step": 2, "train/loss": 2.0},
  ]
  (options,) = wandb.started
  assert options["project"] == "sparse"
  assert options["config"] == {"seed": 7}
  assert options["name"] == tmp_path.name
  assert wandb.finished == 1


def test_wandb_resumes_the_same_run(tmp_path, wandb):
  write(tmp_path, [1, 2], wandb="sparse")
  write(tmp_path, [2, 3], wandb="sparse")
  first, second = wandb.started
  assert first["id"] == second["id"] and len(first["id"]) == 16
  assert second["resume"] == "allow"
  other = tmp_path / "other"
  other.mkdir()
  (other / "config.json").write_text("{}")
  (other / "wandb_id.txt").write_text("")  # killed as it wrote that
  write(other, [1], wandb="sparse")
  assert wandb.started[2]["id"] not in ("", first["id"])


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_what_fails_at_wandb_ends_no_run(tmp_path, wandb, capsys, fails):
  wandb.fails = fails
  write(tmp_path, [1, 2], wandb="sparse")
  assert steps(tmp_path) == [1, 2]
  err = capsys.readouterr().err
  assert err.count("wandb gets no more") == 1 and "no way out" in err


def test_wandb_is_imported_where_it_is_asked_for_only(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
  write(tmp_path, [1])
  metrics.check_wandb(None)
  with pytest.raises(ImportError, match="--log.wandb=sparse.*pip install"):
    metrics.check_wandb("sparse")


def test_wandb_may_be_there(wandb):
  metrics.check_wandb("sparse")


def test_one_process_writes(tmp_path, wandb, monkeypatch):
  monkeypatch.setattr(metrics.processes, "is_first", lambda: False)
  write(tmp_path, [1], wandb="sparse", tensorboard=True)
  assert [x.name for x in tmp_path.iterdir()] == ["config.json"]
  assert not wandb.started


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA H999", None),
    ("cpu", None),
  ],
)
def test_the_peak_is_that_of_the_exact_kind(kind, peak):
  device = mock.Mock(spec=jax.devices()[0], device_kind=kind)
  assert metrics.peak_flops(device) == peak


class Device:
  def __init__(self, stats):
    self._stats = stats

  def memory_stats(self):
    return self._stats


def test_the_memory_peak_is_the_fullest_devices(monkeypatch):
  assert metrics.memory_peak() is None  # a CPU does not tell
  for stats, peak in (
    (
      [{"peak_bytes_in_use": 5, "bytes_in_use": 9}, {"peak_bytes_in_use": 7}],
      7,
    ),
    ([None, {"peak_bytes_in_use": 3}], 3),
    ([{"bytes_in_use": 9}], None),
  ):
    devices = [Device(x) for x in stats]
    monkeypatch.setattr(jax, "local_devices", lambda devices=devices: devices)
    assert metrics.memory_peak() == peak
