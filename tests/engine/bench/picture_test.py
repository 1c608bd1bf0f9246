"""The picture of costs by position, from files alone."""

import json
import subprocess
import sys
from typing import Any

from matplotlib import colors
from matplotlib import image
import numpy as np
import pytest

from dsa_jax.engine.bench import __main__ as bench
from dsa_jax.engine.bench import picture

ROWS = [
  dict(
    phase=phase,
    attention=attention,
    slots=slots,
    position=position,
    us_a_token=50 + position * (1 + 8 * (attention == "dense")) / 1024 / slots,
  )
  for phase, numbers in (("prefill", (1,)), ("decode", (1, 32)))
  for attention in ("dense", "sparse")
  for slots in numbers
  for position in (1024, 2048, 4096, 65536)
]


def write(file, **changed):
  found = dict(device="a device", top_k=2048, rows=ROWS) | changed
  file.write_text(json.dumps(found))
  return file


def draw(monkeypatch, *files, out):
  argv = ["bench", "picture", *map(str, files), f"--out={out}"]
  monkeypatch.setattr(sys, "argv", argv)
  bench.main()


def pixels(png, attention) -> np.ndarray:
  """How many have its color, in the quarters of the picture."""
  rgb = image.imread(png)[..., :3]
  color = colors.to_rgb(picture._LINES[attention]["color"])
  near = np.abs(rgb - color).max(-1) < 0.02
  height, width = near.shape
  return near.reshape(2, height // 2, 2, width // 2).sum((1, 3))


def test_each_phase_and_number_of_slots_has_a_panel(monkeypatch, tmp_path):
  png = tmp_path / "out.png"
  rows = [x for x in ROWS if (x["attention"], x["slots"]) != ("dense", 32)]
  draw(monkeypatch, write(tmp_path / "a.json", rows=rows), out=png)
  assert image.imread(png).shape == (864, 1200, 4)
  dense, sparse = (pixels(png, x) > 300 for x in ("dense", "sparse"))
  assert dense.tolist() == [[True, True], [False, False]]
  assert sparse.tolist() == [[True, True], [True, False]]


def test_files_are_drawn_together(monkeypatch, tmp_path):
  files = []
  for way in ("dense", "sparse"):
    rows = [x for x in ROWS if x["attention"] == way]
    files.append(write(tmp_path / f"{way}.json", rows=rows))
  whole, both, one = (tmp_path / f"{name}.png" for name in "abc")
  draw(monkeypatch, write(tmp_path / "a.json"), out=whole)
  draw(monkeypatch, *files, out=both)
  draw(monkeypatch, files[0], out=one)
  assert np.array_equal(image.imread(whole), image.imread(both))
  assert not np.array_equal(image.imread(whole), image.imread(one))


def test_k_is_marked_and_axes_are_linear_from_0():
  fig = picture.draw(ROWS[::-1], 2048, "a device")
  *panels, empty = fig.axes
  assert not empty.axison and not empty.lines
  titles = "prefill", "decode, 1 at once", "decode, 32 at once"
  for ax, title, slots in zip(panels, titles, (1, 1, 32), strict=True):
    assert ax.get_title() == title
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "linear")
    assert ax.get_xlim()[0] == ax.get_ylim()[0] == 0
    assert [x.get_text() for x in ax.texts] == ["K = 2,048"]
    (mark,) = (x for x in ax.lines if list(x.get_xdata()) == [2, 2])
    curves = {x.get_label(): x for x in ax.lines if x is not mark}
    assert list(curves) == ["dense attention", "sparse attention"]
    for curve, slope in zip(curves.values(), (9, 1)):
      x = np.array([1, 2, 4, 64])
      np.testing.assert_array_equal(curve.get_xdata(), x)
      np.testing.assert_allclose(curve.get_ydata(), 50 + slope * x / slots)


@pytest.mark.parametrize(
  "changed, said",
  [
    (dict(rows=None), "bad.json is no result of `positions --json`"),
    (dict(rows=[]), "there is no row to draw"),
    (dict(top_k=None), "bad.json is no result of `positions --json`"),
    (dict(rows=[ROWS[0] | dict(phase="x")]), "bad.json is no result"),
    (dict(rows=[ROWS[0] | dict(us_a_token=None)]), "bad.json is no result"),
    (dict(rows=[ROWS[0] | dict(position="5")]), "bad.json is no result"),
    (dict(rows=[ROWS[0] | dict(position=float("inf"))]), "bad.json is no resu"),
    (dict(rows=[dict(phase="decode")]), "bad.json is no result"),
    (dict(rows=[ROWS[0], ROWS[0]]), "2 rows of phase=prefill attention=dense"),
    (
      dict(rows=[ROWS[0] | dict(slots=n) for n in range(1, 14)]),
      "need 13 panels, one for each phase and number of slots",
    ),
  ],
)
def test_refuses_files_that_are_no_results(
  monkeypatch, capsys, tmp_path, changed, said
):
  file = write(tmp_path / "bad.json", **changed)
  assert refused(monkeypatch, tmp_path, file) == 2
  assert said in capsys.readouterr().err


def test_refuses_files_of_different_models(monkeypatch, capsys, tmp_path):
  files = [write(tmp_path / f"{k}.json", top_k=k) for k in (64, 2048)]
  assert refused(monkeypatch, tmp_path, *files) == 2
  assert "different K, [64, 2048]" in capsys.readouterr().err


def test_names_a_file_that_is_not_there(monkeypatch, tmp_path):
  said = refused(monkeypatch, tmp_path, tmp_path / "none.json")
  assert said.startswith("error: [Errno 2] No such file or directory")


def test_names_the_extra_that_is_missing(monkeypatch, tmp_path):
  file = write(tmp_path / "a.json")
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  said = refused(monkeypatch, tmp_path, file)
  assert said.startswith("error: ") and 'pip install "dsa-jax[report]"' in said


def refused(monkeypatch, tmp_path, *files) -> Any:
  """The exit code; a text is one of 1, and printed."""
  out = tmp_path / "out.png"
  with pytest.raises(SystemExit) as e:
    draw(monkeypatch, *files, out=out)
  assert not out.exists()
  return e.value.code


def test_needs_no_device(tmp_path):
  """As a program, where the accelerator that was measured is not."""
  file, png = write(tmp_path / "a.json"), tmp_path / "out.png"
  code = f"""
import jax, runpy, sys
def none(*args): raise RuntimeError("no device")
jax.devices = jax.default_backend = none
sys.argv = ["bench", "picture", {str(file)!r}, "--out={png}"]
runpy.run_module("dsa_jax.engine.bench", run_name="__main__")
"""
  subprocess.run([sys.executable, "-c", code], check=True)
  assert png.exists()
