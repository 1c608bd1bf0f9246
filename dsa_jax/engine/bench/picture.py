"""Draws what `positions` measured, as the paper's figure 3 has its costs."""

import collections
import json
import math
import pathlib
from typing import Any, Final

# Colors of Okabe and Ito: apart for colour-blind readers too.
_LINES: Final = {
  "dense": {"color": "#D55E00", "marker": "o", "markerfacecolor": "white"},
  "sparse": {"color": "#0072B2", "marker": "D"},
}
_MOST_PANELS: Final = 12
_COLUMNS: Final = 2
_STYLE: Final = {
  "axes.spines.right": False,
  "axes.spines.top": False,
  "figure.constrained_layout.use": True,
  "font.size": 10,
  "grid.color": "#dddddd",
  "legend.frameon": False,
  "lines.markersize": 5,
  "savefig.dpi": 120,
}
_FIELDS: Final = {
  "phase": ("prefill", "decode"),
  "attention": tuple(_LINES),
}
_NUMBERS: Final = ("slots", "position", "us_a_token")

# matplotlib is an extra, imported where it draws; of its types, only the names.
type Figure = Any
type Axes = Any


def picture(args) -> None:
  """Writes the picture of some files.

  Raises:
    ImportError: matplotlib is missing.
    ValueError: As of `read`.
    OSError: A file cannot be read or written.
  """
  try:
    import matplotlib
  except ImportError as e:
    raise ImportError(
      'Pictures need the package `matplotlib`: pip install "dsa-jax[report]".'
    ) from e
  rows, top_k, device = read(args.files)
  with matplotlib.rc_context(_STYLE):
    draw(rows, top_k, device).savefig(args.out)
  print(args.out)


def read(files: list[pathlib.Path]) -> tuple[list[dict[str, Any]], int, str]:
  """All rows of the files, K, and the devices that they were measured on.

  Raises:
    ValueError: One is not what `positions` writes; or together they have no
      row, two of one point, more than one K, or too many panels.
    OSError: One cannot be read.
  """
  rows, ks, devices = [], set(), set()
  for file in files:
    try:
      found = json.loads(file.read_text("utf-8"))
      ks.add(int(found["top_k"]))
      devices.add(str(found["device"]))
      for row in found["rows"]:
        known = all(row[name] in can for name, can in _FIELDS.items())
        number = all(_is_number(row[name]) for name in _NUMBERS)
        if not known or not number:
          raise ValueError(f"a row is {row}")
        rows.append(row)
    except (ValueError, KeyError, TypeError) as e:
      raise ValueError(
        f"{file} is no result of `positions --json`: {e!r}."
      ) from e
  if not rows:
    raise ValueError(f"{', '.join(map(str, files))}: there is no row to draw.")
  if len(ks) > 1:
    raise ValueError(
      f"The files have different K, {sorted(ks)}: draw those of one model."
    )
  for point, times in collections.Counter(map(_point, rows)).items():
    if times > 1:
      raise ValueError(
        f"The files have {times} rows of {point}: draw only one of them."
      )
  if len(panels := _panels(rows)) > _MOST_PANELS:
    raise ValueError(
      f"The files need {len(panels)} panels, one for each phase and number of "
      f"slots, but a picture has {_MOST_PANELS}: draw fewer files."
    )
  return rows, ks.pop(), ", ".join(sorted(devices))


def _is_number(x: object) -> bool:
  return isinstance(x, int | float) and 0 <= x < math.inf


def _point(row: dict[str, Any]) -> str:
  names = "phase", "attention", "slots", "position"
  return " ".join(f"{name}={row[name]}" for name in names)


def _panels(
  rows: list[dict[str, Any]],
) -> dict[tuple[str, int], list[dict[str, Any]]]:
  """Rows of each phase and number of slots; prefill first, then more slots."""
  panels = collections.defaultdict(list)
  for row in rows:
    panels[row["phase"], row["slots"]].append(row)
  order = _FIELDS["phase"].index
  return dict(sorted(panels.items(), key=lambda x: (order(x[0][0]), x[0][1])))


def draw(rows: list[dict[str, Any]], top_k: int, device: str) -> Figure:
  """Panels of prefill and of decoding, by slots: time a token by position.

  Args:
    rows: Of `positions`.
    top_k: K, which is marked.
    device: For the title.
  """
  from matplotlib import figure

  panels = _panels(rows)
  height = -(-len(panels) // _COLUMNS)
  fig = figure.Figure(figsize=(10, 3.6 * height))  # inches
  fig.suptitle(device)
  axes = fig.subplots(height, _COLUMNS, squeeze=False).ravel()
  for ax, ((phase, slots), of_panel) in zip(axes, panels.items()):
    _draw_panel(ax, of_panel)
    _mark(ax, top_k)
    at_once = f", {slots} at once" if phase == "decode" else ""
    ax.set_title(phase + at_once, pad=16)
  for ax in axes[len(panels) :]:
    ax.set_axis_off()
  return fig


def _draw_panel(ax: Axes, rows: list[dict[str, Any]]) -> None:
  for attention, line in _LINES.items():
    points = sorted(
      (row["position"] / 1024, row["us_a_token"])
      for row in rows
      if row["attention"] == attention
    )
    if points:
      ax.plot(*zip(*points), label=f"{attention} attention", **line)
  ax.legend(loc="best")
  ax.set_xlabel("position (1,024 tokens)")
  ax.set_ylabel("µs a token")
  ax.set_xlim(left=0)
  ax.set_ylim(bottom=0)
  ax.grid(axis="y")


def _mark(ax: Axes, top_k: int) -> None:
  ax.axvline(top_k / 1024, color="#888888", lw=0.8, ls=":", zorder=0)
  ax.annotate(
    f"K = {top_k:,}",
    (top_k / 1024, 1),
    xycoords=("data", "axes fraction"),
    xytext=(3, 2),
    textcoords="offset points",
    color="#444444",
  )
