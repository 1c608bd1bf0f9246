"""Draws what a run measured: python -m train.report RUN_DIR.

Reads metrics.jsonl, config.json and selections/ of the run's folder, also
while it trains, and writes PNG pictures to RUN_DIR/report:

  losses.png     language loss, held-out bits per byte, the indexer's KL
  recall.png     how much of the attention the selected keys hold, by layer
  accuracy.png   retrieval by length and depth, dense and sparse
  selection.png  which keys the layers select

A picture that the run has no data for is left out, which is said.
"""

from collections.abc import Iterable
import pathlib
import sys
from typing import Annotated, Any, Final

from train.host import program

if __name__ == "__main__":
  program.begin()  # before the imports that take seconds

import numpy as np
import tyro

from train import options
from train.run import read_run

# Of Okabe and Ito: apart for colour-blind readers too.
_COLORS: Final = {"dense": "#0072B2", "sparse": "#D55E00"}
_MARKERS: Final = {"dense": "o", "sparse": "D"}
_BORDER: Final = "#009E73"
_STYLE: Final = {
  "axes.spines.right": False,
  "axes.spines.top": False,
  "figure.constrained_layout.use": True,
  "font.size": 10,
  "grid.color": "#dddddd",
  "legend.frameon": False,
  "lines.markersize": 7,
  "savefig.dpi": 120,
}
_MOST_BINS: Final = 256  # of keys in a map; about the pixels of a panel

# matplotlib is an extra, imported where it draws; of its types, only the names.
type Figure = Any  # None where the record has nothing to draw
type Axes = Any


def _figure(height: float) -> Figure:
  from matplotlib import figure

  return figure.Figure(figsize=(10, height))  # inches


def _shade_stages(axes: Iterable[Axes], spans: list[read_run.Span]) -> None:
  """Shades every other stage, and names them above the first of the axes."""
  first, *_ = axes = list(axes)
  begin, end = spans[0].begin, spans[-1].end
  taken: list[float] = []  # by row of names: where its last name ends
  for i, span in enumerate(spans):
    for ax in axes:
      ax.set_xlim(begin, end)
      if i % 2 == 0:
        ax.axvspan(span.begin, span.end, color="#f1f1f1", lw=0, zorder=0)
    middle = (span.begin + span.end) / 2
    center = (middle - begin) / (end - begin)
    half = 0.0055 * (len(span.kind) + 2)  # of the axes' width
    free = (row for row, x in enumerate(taken) if x <= center - half)
    row = next(free, len(taken))
    taken[row : row + 1] = [center + half]
    first.annotate(
      span.kind,
      (middle, 1),
      xycoords=("data", "axes fraction"),
      xytext=(0, 4 + 12 * row),
      textcoords="offset points",
      ha="center",
      color="#444444",
    )


def _plot(ax: Axes, x: read_run.Series, y: Any, **style: Any) -> None:
  """A line; of few points, with the points, or a single one would not show."""
  marker = "." if len(x.steps) < 10 else ""
  ax.plot(x.steps, y, marker=marker, **style)


def _mark(ax: Axes, x: read_run.Series, marker: str, **style: Any) -> None:
  """Evaluations; whole also where they lie on the frame."""
  ax.plot(x.steps, x.values, marker, clip_on=False, zorder=3, **style)


def _plot_layers(
  ax: Axes,
  layers: list[read_run.Series],
  total: list[read_run.Series],
  label: str,
) -> None:
  """A line a layer, dark to light in their order, and the total's in bold."""
  from matplotlib import cm
  from matplotlib import colormaps
  from matplotlib import colors

  for x in total:
    _plot(ax, x, x.values, color="black", lw=2.5, label=label, zorder=2.5)
  if not layers:
    return
  L = layers[0].values.shape[1]
  palette = colormaps["viridis"](np.linspace(0, 0.92, L))  # none too pale
  for x in layers:
    for y, color in zip(x.values.T, palette):
      _plot(ax, x, y, color=color, lw=0.9, alpha=0.8)
  mapped = cm.ScalarMappable(
    colors.Normalize(-0.5, L - 0.5), colors.ListedColormap(palette)
  )
  bar = ax.figure.colorbar(
    mapped,
    cax=ax.inset_axes((1.015, 0, 0.015, 1)),
    ticks=read_run.chosen_layers(L, 5),
    label="layer",
  )
  bar.outline.set_visible(False)


def _add_legend(ax: Axes, **style: Any) -> None:
  """Names each kind of line once, however many stages it has."""
  lines, labels = ax.get_legend_handles_labels()
  known = dict(zip(labels, lines))
  if known:
    ax.legend(known.values(), known.keys(), **style)


def _draw_loss(
  ax: Axes,
  trained: list[read_run.Series],
  tested: dict[str, read_run.Series],
) -> None:
  from matplotlib import ticker

  for x in trained:
    way = "sparse" if x.stage == "sparse" else "dense"
    ax.plot(x.steps, x.values, color=_COLORS[way], lw=0.8, alpha=0.25)
    y = read_run.smoothed(x.values)
    _plot(ax, x, y, color=_COLORS[way], label=f"training, {way}")
  for way, x in tested.items():
    style = {"color": _COLORS[way], "label": f"held out, {way}"}
    _mark(ax, x, _MARKERS[way], mec="white", **style)
  # Logarithmic, or the first steps flatten all the others.
  ax.set_yscale("log")
  ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
  ax.yaxis.set_major_formatter("{x:g}")
  ax.yaxis.set_minor_locator(ticker.NullLocator())
  ax.set_ylabel("language loss\n(bits per byte)")
  _add_legend(ax, loc="upper right", ncols=2)


def draw_losses(record: read_run.Record) -> Figure:
  """Bits per byte, and below it the KL, by step."""
  lines, spans = record.lines, record.spans
  trained = read_run.series(lines, spans, "train", "bits_per_byte")
  ways = {way: read_run.heldout(lines, way, since=1) for way in _COLORS}
  tested = {way: x for way, x in ways.items() if x is not None}
  sums = read_run.series(lines, spans, "train", "index")
  layers = read_run.series(lines, spans, "train", "index_per_layer")
  panels = bool(trained or tested) + bool(sums or layers)
  if not panels:
    return None
  fig = _figure(0.6 + 2.9 * panels)
  axes = fig.subplots(panels, sharex=True, squeeze=False)[:, 0]
  if trained or tested:
    _draw_loss(axes[0], trained, tested)
  if sums or layers:
    _plot_layers(axes[-1], layers, sums, "sum over layers")
    axes[-1].set_yscale("log")
    axes[-1].set_ylabel("KL of the indexer\n(nats)")
    _add_legend(axes[-1], loc="best")
  for ax in axes:
    ax.grid(axis="y")
  axes[-1].set_xlabel("step")
  _shade_stages(axes, spans)
  return fig


def draw_recall(record: read_run.Record) -> Figure:
  """The recall of each layer's indexer by step, while it is trained."""
  lines = record.lines
  spans = [x for x in record.spans if x.kind in ("warmup", "sparse")]
  means = read_run.series(lines, spans, "train", "recall")
  layers = read_run.series(lines, spans, "train", "recall_per_layer")
  if not means and not layers:
    return None
  fig = _figure(4.6)
  ax = fig.subplots()
  _plot_layers(ax, layers, means, "mean over layers")
  # The end of the stage before shows what an untrained indexer finds.
  tested = read_run.heldout(lines, "recall", since=spans[0].begin)
  if tested is not None:
    label = "held out, mean over layers"
    _mark(ax, tested, "s", color="white", mec="black", label=label)
  ax.grid(axis="y")
  ax.set_ylim(0, 1)
  ax.yaxis.set_major_formatter("{x:.0%}")
  ax.set_ylabel(f"recall: attention\non the {record.top_k} selected keys")
  ax.set_xlabel("step")
  _add_legend(ax, loc="lower right")
  _shade_stages([ax], spans)
  return fig


def _add_share_bar(grid: Any, label: str) -> None:
  """The scale that the images of a grid of axes share."""
  shade = next(image for ax in grid.flat for image in ax.images)
  bar = grid[0, 0].figure.colorbar(
    shade, ax=grid, label=label, format="{x:.0%}", pad=0.01, fraction=0.03
  )
  bar.outline.set_visible(False)


def draw_accuracy(record: read_run.Record) -> Figure:
  """Retrieval by length and depth: a row a stage, dense beside sparse."""
  found = read_run.retrievals(record.lines, record.spans)
  if not found:
    return None
  fig = _figure(0.7 + 1.6 * len(found))
  grid = fig.subplots(len(found), 2, squeeze=False)
  for row, (stage, ways) in zip(grid, found):
    step = max(line["step"] for line in ways.values())
    row[0].set_ylabel(f"{stage}, step {step}\n\nlength (tokens)")
    for ax, way in zip(row, _COLORS):
      ax.spines[:].set_visible(False)
      ax.tick_params(length=0)
      if way not in ways:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
        continue
      line = ways[way]
      share = np.array(line["accuracy"], float)
      ax.imshow(share, cmap="GnBu", vmin=0, vmax=1, aspect="auto")
      for (y, x), value in np.ndenumerate(share):
        ink = "white" if value > 0.6 else "black"
        ax.text(x, y, f"{100 * value:.0f}", color=ink, ha="center", va="center")
      depths = [f"{100 * x:.0f}" for x in line["depths"]]
      ax.set_xticks(range(len(depths)), depths)
      ax.set_yticks(range(len(line["lengths"])), line["lengths"])
  for ax, way in zip(grid[0], _COLORS):
    ax.set_title(f"{way} attention", color=_COLORS[way])
  for ax in grid[-1]:
    ax.set_xlabel("depth (% of the text before the question)")
  _add_share_bar(grid, "right answers")
  return fig


def draw_selection(record: read_run.Record) -> Figure:
  """The keys that some layers select, at the first and the last stage's end.

  Stages of shorter rows than the last one's are left out: their maps are those
  of other data, and have another scale.
  """
  if not record.selections:
    return None
  read = read_run.Selection.read
  all_maps = [(step, read(file)) for step, file in record.selections]
  alike = [x for x in all_maps if x[1].length == all_maps[-1][1].length]
  maps = dict((alike[0], alike[-1]))
  columns = min(5, max(len(x.indices) for x in maps.values()))
  fig = _figure(0.9 + 2.5 * len(maps))
  grid = fig.subplots(len(maps), columns, squeeze=False)
  for row, (step, selection) in zip(grid, maps.items()):
    stage = next((x.kind for x in record.spans if step in x), "")
    row[0].set_ylabel(f"{stage}, step {step}\n\nquery (place in the row)")
    layers = read_run.chosen_layers(len(selection.indices), columns)
    for ax, layer in zip(row, layers):
      _draw_map(ax, selection, layer)
      ax.set_title(f"layer {layer}")
    for ax in row[1:]:
      ax.tick_params(labelleft=False)
  for ax in grid[-1]:
    ax.set_xlabel("key")
  _add_share_bar(grid, "share of the keys selected")
  return fig


def _draw_map(ax: Axes, selection: read_run.Selection, layer: int) -> None:
  """Queries down, keys across; what they may not see is tinted."""
  from matplotlib import colors

  queries, length = selection.queries, selection.length
  share, width = read_run.density(selection.indices[layer], length, _MOST_BINS)
  bottom = len(queries)
  ax.imshow(
    share,
    cmap="Greys",
    norm=colors.PowerNorm(0.5, 0, 1),  # a single key of a bin shows
    aspect="auto",
    extent=(0, width * share.shape[1], bottom, 0),
  )
  y = np.repeat(np.arange(bottom + 1), 2)[1:-1]  # both edges of each query
  first, beyond = np.repeat(selection.starts, 2), np.repeat(queries + 1, 2)
  for x, hidden in ((first, 0), (beyond, length)):
    ax.fill_betweenx(y, x, hidden, color=_BORDER, alpha=0.1, lw=0)
    ax.plot(x, y, color=_BORDER, lw=0.8)
  rows = np.linspace(0, bottom - 1, min(5, bottom)).round().astype(int)
  ax.set_yticks(rows + 0.5, queries[rows])
  ax.set_xticks((0, length))
  ax.set_xlim(0, length)


_PICTURES: Final = {
  "losses.png": (draw_losses, "losses"),
  "recall.png": (draw_recall, "recall of an indexer in training"),
  "accuracy.png": (draw_accuracy, "retrieval evaluations"),
  "selection.png": (draw_selection, "selections"),
}


def report(
  run_dir: Annotated[
    tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="RUN_DIR")
  ],
  out: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR")] = None,
) -> None:
  """Writes the pictures of a run.

  Args:
    run_dir: The run's folder.
    out: Where the pictures go; RUN_DIR/report unless given.

  Raises:
    ImportError: matplotlib is missing.
    ValueError: The folder is not a run's, or damaged; see `read`.
  """
  try:
    import matplotlib
  except ImportError as e:
    raise ImportError(
      'Pictures need the package `matplotlib`: pip install "dsa-jax[report]".'
    ) from e
  record = read_run.read(run_dir)
  out = out or run_dir / "report"
  with matplotlib.rc_context(_STYLE):
    for name, (draw, data) in _PICTURES.items():
      fig = draw(record)
      if fig is None:
        print(f"no {data}: {name} is not drawn")
        continue
      out.mkdir(parents=True, exist_ok=True)
      fig.savefig(out / name)
      print(out / name)


def main() -> None:
  try:
    options.check_once(sys.argv[1:])
    tyro.cli(report, prog="python -m train.report", description=__doc__)
  except (ValueError, OSError, ImportError) as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  program.run(main)
