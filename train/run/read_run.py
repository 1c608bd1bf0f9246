"""Reads a run's folder: config, metrics and selections."""

from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import pathlib
from typing import Any, Final
import zipfile

from jaxtyping import Float, Int
import numpy as np

from train.host import json_files

type Line = dict[str, Any]  # of metrics.jsonl

# The measurements that are drawn: of how many axes their numbers are.
_AXES: Final = (
  dict.fromkeys(("bits_per_byte", "index", "recall", "dense", "sparse"), 0)
  | dict.fromkeys(("index_per_layer", "recall_per_layer"), 1)
  | dict(lengths=1, depths=1, accuracy=2)
)


@dataclasses.dataclass(frozen=True)
class Span:
  """The steps of a stage: `begin` is the last one before it."""

  kind: str
  begin: int
  end: int

  def __contains__(self, step: int) -> bool:
    return self.begin < step <= self.end


@dataclasses.dataclass(frozen=True)
class Series:
  """Measurements over one stage; NaN where nothing was measured."""

  steps: Int[np.ndarray, " points"]
  values: Float[np.ndarray, "points ..."]
  stage: str  # its kind


@dataclasses.dataclass(frozen=True)
class Record:
  """Contents of a run's folder."""

  lines: list[Line]
  spans: list[Span]
  top_k: int
  selections: list[tuple[int, pathlib.Path]]  # by step, ascending


def read(run_dir: pathlib.Path) -> Record:
  """The record in a run's folder.

  Raises:
    ValueError: It is not a run's folder, or a file there is damaged; names it.
  """
  for name in ("config.json", "metrics.jsonl"):
    if not (run_dir / name).is_file():
      raise ValueError(
        f"{run_dir} is not the folder of a run: it has no {name}. Give the "
        "run_dir of a run that has begun to train."
      )
  try:
    cfg = json_files.read(run_dir / "config.json")
    stages = [(stage["kind"], stage["steps"]) for stage in cfg["stages"]]
    if not all(type(x) is str and type(n) is int for x, n in stages):
      raise TypeError("a stage has another kind than a text, or other steps")
    top_k = cfg["model"]["top_k"]
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(
      f"{run_dir / 'config.json'} is not the config of a run: {e}. Restore "
      "it; the trainer writes it as the run begins."
    ) from e
  lines = [*read_lines(run_dir / "metrics.jsonl")]
  selections = sorted(
    (int(file.stem), file)
    for file in run_dir.glob("selections/*.npz")
    if file.stem.isdecimal()
  )
  last = max((line["step"] for line in lines), default=0)
  return Record(lines, stage_spans(stages, last), top_k, selections)


def read_lines(file: pathlib.Path) -> Iterator[Line]:
  """The lines of a metrics.jsonl, but for half of one at its end.

  Raises:
    Damaged: A line is malformed, or the file cannot be read.
  """
  for number, line in json_files.read_lines(file):
    try:
      _check(line)
    except (KeyError, TypeError, ValueError) as e:
      raise json_files.Damaged(
        f"{file}, line {number} is malformed ({e!r})."
      ) from e
    yield line


def _check(line: Line) -> None:
  """Raises a KeyError, TypeError or ValueError for what cannot be drawn."""
  if type(line["step"]) is not int or not 0 <= line["step"] < 2**31:
    raise TypeError("step must be a whole number below 2^31")
  if not isinstance(line["kind"], str):
    raise TypeError("kind must be a text")
  for name in _AXES.keys() & line:
    if _axes(line[name]) != _AXES[name]:
      raise TypeError(f"{name} must be numbers along {_AXES[name]} axes")
  if line["kind"] == "retrieval":
    shape = (len(line["lengths"]), len(line["depths"]))
    if 0 in shape or np.shape(line["accuracy"]) != shape:
      raise ValueError("accuracy must be one by length and depth")
    if line["attention"] not in ("dense", "sparse"):
      raise ValueError("attention must be dense or sparse")


def _axes(values: Any) -> int | None:
  """Along how many axes they are numbers, or null; None if they are not."""
  try:
    return np.array(values, float).ndim
  except (TypeError, ValueError, OverflowError):
    return None


def stage_spans(stages: Iterable[tuple[str, int]], last: int) -> list[Span]:
  """The spans of the stages, each its kind and steps, that began by `last`."""
  spans, begin = [], 0
  for kind, steps in stages:
    if begin < last:
      spans.append(Span(kind, begin, min(begin + steps, last)))
    begin += steps
  return spans


def _within(lines: list[Line], kind: str, span: Span) -> list[Line]:
  return [x for x in lines if x["kind"] == kind and x["step"] in span]


def series(
  lines: list[Line], spans: list[Span], kind: str, name: str
) -> list[Series]:
  """Collects `name` from lines of `kind`: one series per stage that has it.

  Raises:
    ValueError: Its lines in a stage are not of as many layers.
  """
  found = []
  for span in spans:
    having = [line for line in _within(lines, kind, span) if name in line]
    if having:
      steps = np.array([line["step"] for line in having])
      rows = [np.array(line[name], float) for line in having]  # null is NaN
      if len({row.shape for row in rows}) > 1:
        raise ValueError(
          f"metrics.jsonl is malformed: in the stage {span.kind}, {name} is of "
          "more layers in some lines than in others."
        )
      values = np.stack(rows)
      found.append(Series(steps, values, span.kind))
  return found


def heldout(lines: list[Line], name: str, since: int) -> Series | None:
  """Collects `name` from evaluations at the step `since` and later."""
  last = max((line["step"] for line in lines), default=0)
  found = series(lines, [Span("", since - 1, last)], "eval", name)
  return found[0] if found else None


def smoothed(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
  """The mean over some 4% of the points around each.

  The first points take as few from after them as there are before them: their
  loss falls fast, and a lopsided mean would hide where it began.
  """
  N = len(values)
  i = np.arange(N)
  reach = np.minimum(i, N // 50)
  first, beyond = i - reach, np.minimum(i + reach + 1, N)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[beyond] - sums[first]) / (beyond - first)


def retrievals(
  lines: list[Line], spans: list[Span]
) -> list[tuple[str, dict[str, Line]]]:
  """Each stage's kind, and the lines of its last measured step by attention."""
  found = []
  for span in spans:
    if having := _within(lines, "retrieval", span):
      last = max(line["step"] for line in having)
      ways = {x["attention"]: x for x in having if x["step"] == last}
      found.append((span.kind, ways))
  return found


def density(
  indices_TK: Int[np.ndarray, "T K"], num_keys: int, most_bins: int
) -> tuple[Float[np.ndarray, "T bins"], int]:
  """The share of each bin's keys that a query selects, and a bin's keys.

  The bins are the fewest keys wide that give at most `most_bins`; the last one
  may hold fewer. An index of -1 selects nothing.
  """
  width = -(-num_keys // most_bins)
  bins = -(-num_keys // width)
  rows, columns = np.nonzero(indices_TK >= 0)
  counts = np.zeros((len(indices_TK), bins))
  np.add.at(counts, (rows, indices_TK[rows, columns] // width), 1)
  sizes = np.minimum(width, num_keys - width * np.arange(bins))
  return counts / sizes[None], width


def chosen_layers(num_layers: int, most: int) -> list[int]:
  """At most `most` layers, evenly spread, the first and the last among them."""
  spread = np.linspace(0, num_layers - 1, min(most, num_layers))
  return [int(layer) for layer in spread.round()]


@dataclasses.dataclass(frozen=True)
class Selection:
  """The keys that each layer selects for a sample of a row's queries."""

  queries: Int[np.ndarray, " T"]  # their places in the row
  indices: Int[np.ndarray, "L T K"]  # -1 selects nothing
  starts: Int[np.ndarray, " T"]  # the first key that each may see
  length: int  # S, of the row

  @classmethod
  def read(cls, file: pathlib.Path) -> "Selection":
    """Raises a ValueError that names the file where it is damaged."""
    try:
      with file.open("rb") as content, np.load(content) as arrays:
        names = ("queries", "indices", "starts", "length")
        queries, indices, starts, length = (arrays[name] for name in names)
      if any(x.dtype.kind not in "iu" for x in (queries, indices, starts)):
        raise TypeError("its arrays are not of whole numbers")
      L, T, _ = indices.shape
      if not L or not T or {queries.shape, starts.shape} != {(T,)}:
        raise ValueError("its arrays do not fit each other")
      if not 0 < int(length) <= 2**40 or indices.max(initial=-1) >= length:
        raise ValueError("it selects keys that are none")
      return cls(queries, indices, starts, int(length))
    except (
      *(ValueError, TypeError, KeyError, OverflowError),
      *(EOFError, zipfile.BadZipFile),
    ) as e:
      raise ValueError(
        f"{file} is malformed: {e!r}. Delete it; the others will be drawn."
      ) from e
