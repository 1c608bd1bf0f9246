"""The pictures of a run: what they show, and what is said where they cannot."""

import json
import struct
import subprocess
import sys

from matplotlib import image
import numpy as np
import pytest

from train import report
from train.run import read_run

NAN = float("nan")
SPANS = [read_run.Span("warmup", 0, 20), read_run.Span("sparse", 20, 50)]


def train(step, stage="sparse", **values):
  return {"step": step, "kind": "train", "stage": stage, **values}


def retrieval(step, attention, accuracy=((1.0, 0.5), (0.25, 0.0))):
  return {
    "step": step,
    "kind": "retrieval",
    "stage": "sparse",
    "attention": attention,
    "lengths": [16, 32],
    "depths": [0.25, 0.75],
    "accuracy": accuracy,
  }


class TestSpans:
  STAGES = [("pretrain", 20), ("warmup", 5), ("sparse", 30)]

  def test_follow_each_other(self):
    assert read_run.stage_spans(self.STAGES, 55) == [
      read_run.Span("pretrain", 0, 20),
      read_run.Span("warmup", 20, 25),
      read_run.Span("sparse", 25, 55),
    ]

  def test_end_where_the_run_does(self):
    assert read_run.stage_spans(self.STAGES, 22) == [
      read_run.Span("pretrain", 0, 20),
      read_run.Span("warmup", 20, 22),
    ]
    assert read_run.stage_spans(self.STAGES, 20) == [
      read_run.Span("pretrain", 0, 20)
    ]
    assert read_run.stage_spans(self.STAGES, 0) == []

  def test_the_last_step_of_a_stage_is_its_own(self):
    assert [20 in span for span in SPANS] == [True, False]
    assert [21 in span for span in SPANS] == [False, True]


class TestSeries:
  def test_one_a_stage_of_the_lines_that_have_it(self):
    lines = [
      train(10, "warmup", index=3.0),
      train(20, "warmup", index=2.0),
      train(21, loss=1.0),
      train(30, loss=1.0, index=0.0),
      {"step": 30, "kind": "eval", "index": 9.0},
    ]
    warmup, sparse = read_run.series(lines, SPANS, "train", "index")
    assert (warmup.stage, sparse.stage) == ("warmup", "sparse")
    np.testing.assert_array_equal(warmup.steps, [10, 20])
    np.testing.assert_array_equal(warmup.values, [3, 2])
    np.testing.assert_array_equal(sparse.steps, [30])
    np.testing.assert_array_equal(sparse.values, [0])
    (loss,) = read_run.series(lines, SPANS, "train", "loss")  # warmup has none
    np.testing.assert_array_equal(loss.steps, [21, 30])

  def test_null_is_nan_for_its_layer_only(self):
    lines = [
      train(30, recall_per_layer=[0.5, None]),
      train(40, recall_per_layer=[0.6, 0.7]),
    ]
    (x,) = read_run.series(lines, SPANS, "train", "recall_per_layer")
    np.testing.assert_array_equal(x.values, [[0.5, NAN], [0.6, 0.7]])

  def test_heldout_begins_at_the_end_of_the_stage_before(self):
    lines = [
      {"step": step, "kind": "eval", "recall": step / 100}
      for step in (10, 20, 50)
    ]
    x = read_run.heldout(lines, "recall", since=20)
    assert x is not None
    np.testing.assert_array_equal(x.steps, [20, 50])
    np.testing.assert_array_equal(x.values, [0.2, 0.5])
    assert read_run.heldout(lines, "dense", since=1) is None


class TestSmoothed:
  def test_few_points_stay(self):
    values = np.array([5.0, 1.0, 3.0])
    np.testing.assert_array_equal(read_run.smoothed(values), values)

  def test_means_of_the_points_around(self):
    values = np.random.default_rng(0).normal(size=120)  # two on each side
    expected = [values[0], values[:3].mean()]
    expected += [values[i - 2 : i + 3].mean() for i in range(2, 120)]
    np.testing.assert_allclose(read_run.smoothed(values), expected, atol=1e-12)


class TestDensity:
  def test_counts_selected_keys_of_each_bin(self):
    indices = np.array(
      [[0, 1, 2, -1], [3, 9, -1, -1], [-1, -1, -1, -1]], np.int32
    )
    share, width = read_run.density(indices, num_keys=10, most_bins=4)
    assert width == 3
    np.testing.assert_allclose(
      share, [[1, 0, 0, 0], [0, 1 / 3, 0, 1], [0, 0, 0, 0]]
    )

  def test_a_bin_is_a_key_where_there_is_room(self):
    share, width = read_run.density(np.array([[1, 3]]), num_keys=4, most_bins=4)
    assert width == 1
    np.testing.assert_array_equal(share, [[0, 1, 0, 1]])


def test_retrieval_is_the_last_of_each_stage():
  lines = [
    retrieval(10, "sparse"),
    retrieval(20, "dense", [[0.75]]),
    retrieval(50, "dense", [[0.5]]),
    retrieval(50, "sparse", [[0.25]]),
    train(50),
  ]
  (first, warmup), (second, sparse) = read_run.retrievals(lines, SPANS)
  assert (first, second) == ("warmup", "sparse")
  assert {way: x["accuracy"] for way, x in warmup.items()} == {
    "dense": [[0.75]]
  }
  assert {way: x["accuracy"] for way, x in sparse.items()} == {
    "dense": [[0.5]],
    "sparse": [[0.25]],
  }


@pytest.mark.parametrize(
  ("num_layers", "layers"),
  [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 2, 4, 6, 8])],
)
def test_chosen_layers(num_layers, layers):
  assert read_run.chosen_layers(num_layers, 5) == layers


@pytest.fixture
def run_dir(tmp_path):
  """A run of all kinds of stages that has just ended."""
  folder = tmp_path / "run"
  (folder / "selections").mkdir(parents=True)
  stages = [("pretrain", 20), ("extend", 4), ("warmup", 6), ("sparse", 20)]
  lines, step = [], 0
  for stage, steps in stages:
    for _ in range(steps):
      step += 1
      values = {}
      if stage != "warmup":
        values |= {"loss": 3.0 + 9 / step, "bits_per_byte": 1 + 7 / step}
      if stage in ("warmup", "sparse") and step % 2 == 0:
        values |= {
          "index": 9 / step,
          "index_per_layer": [4 / step, 5 / step],
          "recall": 0.5,
          "recall_per_layer": [0.5, None],
        }
      lines.append(train(step, stage, **values))
    lines.append({"step": step, "kind": "eval", "stage": stage, "dense": 1.5})
    lines[-1]["recall"] = step / 100
    if stage in ("warmup", "sparse"):
      lines[-1]["sparse"] = 1.75
      indices = np.full((2, 8, 4), -1, np.int32)
      indices[..., :2] = [[q // 2 * 4, q * 4] for q in range(8)]
      np.savez(
        folder / "selections" / f"{step}.npz",
        queries=np.arange(8, dtype=np.int32) * 4 + 2,
        indices=indices,
        starts=np.repeat(np.array([0, 16], np.int32), 4),
        length=32,
      )
    lines.append({"step": step, "kind": "sample", "text": "the"})
    lines.append(retrieval(step, "dense"))
  lines.append(retrieval(step, "sparse"))
  config = {
    "model": {"top_k": 4},
    "stages": [{"kind": kind, "steps": n, "seq_len": 32} for kind, n in stages],
  }
  (folder / "config.json").write_text(json.dumps(config))
  write_lines(folder, lines)
  return folder


def write_lines(folder, lines):
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)


def call(monkeypatch, capsys, *args):
  """What the program prints."""
  monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
  report.main()
  return capsys.readouterr().out.splitlines()


def refused(monkeypatch, capsys, *args):
  """What it says on leaving with an error."""
  with pytest.raises(SystemExit) as error:
    call(monkeypatch, capsys, *args)
  assert isinstance(error.value.code, str)  # to stderr, with exit status 1
  return error.value.code


def test_draws_all(monkeypatch, capsys, run_dir, tmp_path):
  printed = call(monkeypatch, capsys, run_dir, "--out", tmp_path / "out")
  names = ["losses.png", "recall.png", "accuracy.png", "selection.png"]
  files = [tmp_path / "out" / name for name in names]
  assert printed == [str(file) for file in files]
  assert not (run_dir / "report").exists()
  for file in files:
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1200 and 480 <= height <= 1200, file
    dark = (image.imread(file)[..., :3] < 0.5).any(-1)
    assert 0.005 < dark.mean() < 0.6, file
    for part in np.array_split(dark, 4, axis=1):  # nothing is left empty
      assert part.any(), file


class TestFigures:
  """What is drawn, read off the figures."""

  def lines_of(self, ax, label):
    return [x for x in ax.get_lines() if x.get_label() == label]

  def test_losses(self, run_dir):
    fig = report.draw_losses(read_run.read(run_dir))
    loss, kl = fig.axes[:2]
    dense = self.lines_of(loss, "training, dense")
    assert [list(x.get_xdata()[[0, -1]]) for x in dense] == [[1, 20], [21, 24]]
    (sparse,) = self.lines_of(loss, "training, sparse")
    np.testing.assert_allclose(
      sparse.get_ydata(), 1 + 7 / np.arange(31, 51), rtol=1e-12
    )
    (marks,) = self.lines_of(loss, "held out, sparse")
    np.testing.assert_array_equal(marks.get_xdata(), [30, 50])
    names = [x.get_text() for x in loss.get_legend().get_texts()]
    assert sorted(names) == [
      "held out, dense",
      "held out, sparse",
      "training, dense",
      "training, sparse",
    ]
    assert [x.get_text() for x in loss.texts] == [
      "pretrain",
      "extend",
      "warmup",
      "sparse",
    ]
    assert kl.get_yscale() == "log"
    warmup, _ = self.lines_of(kl, "sum over layers")
    np.testing.assert_array_equal(warmup.get_xdata(), [26, 28, 30])

  def test_recall_covers_the_indexers_training(self, run_dir):
    ax = report.draw_recall(read_run.read(run_dir)).axes[0]
    assert ax.get_xlim() == (24, 50)
    (marks,) = self.lines_of(ax, "held out, mean over layers")
    np.testing.assert_array_equal(marks.get_xdata(), [24, 30, 50])
    np.testing.assert_array_equal(marks.get_ydata(), [0.24, 0.3, 0.5])

  def test_accuracy_is_written_in(self, run_dir):
    fig = report.draw_accuracy(read_run.read(run_dir))
    (shown,) = fig.axes[0].images
    np.testing.assert_array_equal(shown.get_array(), [[1, 0.5], [0.25, 0]])
    texts = [[x.get_text() for x in ax.texts] for ax in fig.axes[:8]]
    assert texts[0] == ["100", "50", "25", "0"]
    assert texts[1] == ["not measured"]
    assert texts[7] == ["100", "50", "25", "0"]

  def test_the_border_is_what_queries_see(self, run_dir):
    fig = report.draw_selection(read_run.read(run_dir))
    assert len(fig.axes) == 2 * 2 + 1  # stages, layers, the scale
    first, beyond = fig.axes[0].get_lines()
    np.testing.assert_array_equal(first.get_xdata(), [0] * 8 + [16] * 8)
    np.testing.assert_array_equal(beyond.get_xdata()[::2], range(3, 33, 4))
    np.testing.assert_array_equal(
      beyond.get_ydata(), [0, *np.repeat(range(1, 8), 2), 8]
    )

  def test_the_maps_are_of_rows_of_one_length(self, run_dir):
    folder = run_dir / "selections"
    with np.load(folder / "30.npz") as arrays:
      longer = {name: arrays[name] for name in arrays} | {"length": 64}
    np.savez(folder / "20.npz", **longer)
    fig = report.draw_selection(read_run.read(run_dir))
    titles = [fig.axes[i].get_ylabel().splitlines()[0] for i in (0, 2)]
    assert titles == ["warmup, step 30", "sparse, step 50"]


def test_says_what_it_skips(monkeypatch, capsys, run_dir):
  write_lines(run_dir, [train(1, "pretrain", bits_per_byte=8.0)])
  for file in run_dir.glob("selections/*"):
    file.unlink()
  assert call(monkeypatch, capsys, run_dir) == [
    str(run_dir / "report" / "losses.png"),
    "no recall of an indexer in training: recall.png is not drawn",
    "no retrieval evaluations: accuracy.png is not drawn",
    "no selections: selection.png is not drawn",
  ]
  written = [file.name for file in (run_dir / "report").iterdir()]
  assert written == ["losses.png"]


def test_draws_nothing_of_a_run_that_just_began(monkeypatch, capsys, run_dir):
  write_lines(run_dir, [])
  for file in run_dir.glob("selections/*"):
    file.unlink()
  printed = call(monkeypatch, capsys, run_dir)
  assert printed[0] == "no losses: losses.png is not drawn"
  assert len(printed) == 4
  assert not (run_dir / "report").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_refuses_what_is_no_run(monkeypatch, capsys, run_dir, name):
  (run_dir / name).unlink()
  text = refused(monkeypatch, capsys, run_dir)
  assert str(run_dir) in text and name in text and "Give" in text


@pytest.mark.parametrize(
  "bad", ['{"step": 3, "ki', "[3]", '{"kind": "train"}', '{"step": 3}', ""]
)
def test_refuses_a_malformed_line(monkeypatch, capsys, run_dir, bad):
  file = run_dir / "metrics.jsonl"
  lines = file.read_text().splitlines()
  file.write_text("\n".join([*lines[:2], bad, *lines[2:]]))
  text = refused(monkeypatch, capsys, run_dir)
  assert f"{file}, line 3 is malformed" in text


GRID = dict(lengths=[8, 16], depths=[0, 1], accuracy=[[1, 0], [0, None]])


@pytest.mark.parametrize(
  "wrong",
  [
    *(dict(step=True), dict(step=-1), dict(step=10**400), dict(step=2.0)),
    *(dict(bits_per_byte="x"), dict(index=[1.0]), dict(recall={})),
    *(dict(dense=10**400), dict(recall_per_layer=0.5)),
    *(dict(index_per_layer=[[1.0]]), dict(index_per_layer=[1, [2]])),
    *(dict(kind="retrieval"), dict(kind="retrieval", attention="dense")),
    GRID | dict(kind="retrieval"),
    GRID | dict(kind="retrieval", attention=["dense"]),
    GRID | dict(kind="retrieval", attention="full"),
    GRID | dict(kind="retrieval", attention="dense", depths=[0]),
    GRID | dict(kind="retrieval", attention="dense", accuracy=[[1, 0]]),
    dict(kind="retrieval", attention="dense", accuracy=[[]], lengths=[1])
    | dict(depths=[]),
  ],
  ids=lambda wrong: str(wrong)[:40],
)
def test_refuses_measurements_that_are_none(
  monkeypatch, capsys, run_dir, wrong
):
  file = run_dir / "metrics.jsonl"
  lines = file.read_text().splitlines()
  bad = json.dumps({"step": 3, "kind": "train"} | wrong)
  file.write_text("\n".join([*lines[:2], bad, *lines[2:]]))
  text = refused(monkeypatch, capsys, run_dir)
  assert f"{file}, line 3 is malformed" in text
  assert "\n" not in text and len(text) < len(str(file)) + 200


def test_refuses_layers_that_come_and_go(monkeypatch, capsys, run_dir):
  lines = read_run.read(run_dir).lines
  lines[-3] = dict(step=50, kind="train", recall_per_layer=[0.5])
  write_lines(run_dir, lines)
  text = refused(monkeypatch, capsys, run_dir)
  assert "in the stage sparse, recall_per_layer is of more layers" in text


def test_leaves_out_half_a_line_at_the_end(run_dir):
  file = run_dir / "metrics.jsonl"
  before = read_run.read(run_dir).lines
  with file.open("a") as out:
    out.write('{"step": 3, "ki')
  assert read_run.read(run_dir).lines == before


@pytest.mark.parametrize(
  "bad",
  [
    *("{", "{}", '{"stages": 3}'),
    '{"stages": [{"kind": 3, "steps": 9}], "model": {"top_k": 4}}',
    '{"stages": [{"kind": "sparse", "steps": "9"}], "model": {"top_k": 4}}',
  ],
)
def test_refuses_a_malformed_config(monkeypatch, capsys, run_dir, bad):
  (run_dir / "config.json").write_text(bad)
  text = refused(monkeypatch, capsys, run_dir)
  assert str(run_dir / "config.json") in text


@pytest.mark.parametrize("bad", [b"", b"PK\x03\x04", b"no arrays"])
def test_refuses_a_malformed_selection(run_dir, bad):
  file = run_dir / "selections" / "50.npz"
  file.write_bytes(bad)
  record = read_run.read(run_dir)
  with pytest.raises(ValueError) as error:
    report.draw_selection(record)
  assert f"{file} is malformed" in str(error.value)


def test_refuses_a_selection_of_other_arrays(monkeypatch, capsys, run_dir):
  file = run_dir / "selections" / "50.npz"
  np.savez(file, queries=np.arange(3))
  text = refused(monkeypatch, capsys, run_dir)
  assert f"{file} is malformed" in text and "indices" in text


@pytest.mark.parametrize(
  "bad",
  [
    dict(length=np.arange(3)),
    dict(length="long"),
    dict(length=0),
    dict(length=2**62),
    dict(queries=np.arange(7)),
    dict(starts=np.array("x")),
    dict(starts=np.zeros(8)),
    dict(indices=np.full((2, 8, 4), 10**9)),
    dict(indices=np.zeros((0, 8, 4), int)),
    dict(indices=np.zeros((2, 8), int)),
    dict(indices=np.zeros((2, 8, 4))),
  ],
)
def test_refuses_a_selection_that_cannot_be(run_dir, bad):
  file = run_dir / "selections" / "50.npz"
  with np.load(file) as arrays:
    whole = dict(arrays)
  np.savez(file, **whole | bad)
  with pytest.raises(ValueError) as error:
    read_run.Selection.read(file)
  assert f"{file} is malformed" in str(error.value)


def test_names_the_extra_that_is_missing(monkeypatch, capsys, run_dir):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  text = refused(monkeypatch, capsys, run_dir)
  assert 'pip install "dsa-jax[report]"' in text


def test_needs_no_jax(run_dir):
  code = "import sys; from train import report; sys.exit('jax' in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_teaches_its_options(monkeypatch, capsys):
  with pytest.raises(SystemExit) as error:
    call(monkeypatch, capsys, "--help")
  assert error.value.code == 0
  out = capsys.readouterr().out
  for word in ("RUN_DIR", "--out", "losses.png", "metrics.jsonl"):
    assert word in out
