"""Draws what `positions` measured, as the paper's figure 3 has its costs."""

import collections
import json
import math
import pathlib
from typing import Any, Final

# Of Okabe and Ito: apart for colour-blind readers too. By number of slots.
_COLORS: Final = (
  *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
  "#000000",
)
_LINES: Final = {
  "dense": {"linestyle": "--", "marker": "o", "markerfacecolor": "white"},
  "sparse": {"linestyle": "-", "marker": "D"},
}
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
      row, two of one point, more than one K, or too many numbers of slots.
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
  slots = {row["slots"] for row in rows}
  if len(slots) > len(_COLORS):
    raise ValueError(
      f"The files have {len(slots)} numbers of slots, but there are "
      f"{len(_COLORS)} colors: draw fewer files."
    )
  return rows, ks.pop(), ", ".join(sorted(devices))


def _is_number(x: object) -> bool:
  return isinstance(x, int | float) and 0 <= x < math.inf


def _point(row: dict[str, Any]) -> str:
  names = "phase", "attention", "slots", "position"
  return " ".join(f"{name}={row[name]}" for name in names)


def draw(rows: list[dict[str, Any]], top_k: int, device: str) -> Figure:
  """Two panels, prefill and decode: microseconds a token by position.

  Args:
    rows: Of `positions`.
    top_k: K, which is marked.
    device: For the title.
  """
  from matplotlib import figure

  fig = figure.Figure(figsize=(10, 4.2))  # inches
  fig.suptitle(device)
  axes = fig.subplots(1, 2)
  for ax, phase in zip(axes, _FIELDS["phase"]):
    _draw_phase(ax, [x for x in rows if x["phase"] == phase])
    ax.axvline(top_k / 1024, color="#888888", lw=0.8, ls=":", zorder=0)
    ax.annotate(
      f"K = {top_k:,}",
      (top_k / 1024, 1),
      xycoords=("data", "axes fraction"),
      xytext=(3, 2),
      textcoords="offset points",
      color="#444444",
    )
    ax.set_title(phase, pad=16)
    ax.set_xlabel("position (1,024 tokens)")
    ax.set_ylabel("µs a token")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y")
  return fig


def _draw_phase(ax: Axes, rows: list[dict[str, Any]]) -> None:
  curves: dict[tuple[int, str], list[tuple[float, float]]] = {}
  for row in rows:
    curve = curves.setdefault((row["slots"], row["attention"]), [])
    curve.append((row["position"] / 1024, row["us_a_token"]))
  colors = dict(zip(sorted({slots for slots, _ in curves}), _COLORS))
  for (slots, attention), points in sorted(curves.items()):
    ax.plot(
      *zip(*sorted(points)),
      color=colors[slots],
      label=f"{attention}, {slots} at once",
      **_LINES[attention],
    )
  if curves:
    ax.legend(loc="upper left")
  else:
    ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
