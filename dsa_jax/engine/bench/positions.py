"""What a token costs by its position, in prefill and in decoding."""

import dataclasses
import functools
import json
from typing import Any, Final

import jax
import numpy as np

from dsa_jax import frame as frame_lib
from dsa_jax.engine.bench import floors
from dsa_jax.engine.bench import models
from dsa_jax.engine.bench import pools
from dsa_jax.engine.bench import rows as rows_lib
from pallas_kernels.bench import peak
from pallas_kernels.bench import timing

_BEND: Final = 4  # times K: up to there the bend is looked for

type Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Curve:
  """What is timed at each position."""

  phase: str
  attention: frame_lib.Attention
  slots: int


def positions(args) -> None:
  """Times prefill and decoding at each position, and sums them up."""
  if args.json and (
    args.json.is_dir() or not args.json.absolute().parent.is_dir()
  ):
    raise ValueError(f"--json={args.json} is not in a folder, or is one.")
  if "decode" in args.phases:
    pools.check_lengths(args, pools.most_fed(args))
  cfg, peaks = models.config_of(args), peak.measure()
  if args.bandwidth is not None:
    peaks.bytes.rate = args.bandwidth * 1e12
    peaks.bytes.program = "--bandwidth"
  rows_lib.say(peaks=[str(x) for x in peaks], top_k=cfg.top_k)
  model, rows = models.make_model(cfg), []
  for attention in args.attention:
    curves = [_Curve("decode", attention, slots) for slots in args.slots]
    curves.append(_Curve("prefill", attention, 1))
    for curve in curves:
      if curve.phase in args.phases:
        rows += _time(curve, model, peaks, args)
        _write(args.json, cfg, rows, args)
  for row in summary(rows, cfg.top_k):
    rows_lib.say(**row)


def _time(curve: _Curve, model, peaks, args) -> list[Row]:
  """Prints and returns the rows of a curve."""
  rows, longest = [], max(args.lengths)
  if curve.phase == "prefill":
    program = pools.Prefilling(model, longest, args, curve.attention)
    go_to, tokens = program.begin_at, args.chunk
  else:
    program = pools.Decoding(model, curve.slots, longest, args, curve.attention)
    go_to, tokens = program.end_at, curve.slots * args.steps
  for position in args.lengths:
    go_to(position)
    seconds = timing.measure(program, [()]).seconds
    floor = _floor(curve, model.config, position, args)
    row = dict(
      mode="positions",
      **dataclasses.asdict(curve),
      position=position,
      us_a_token=round(seconds / tokens * 1e6, 3),
      floor_us=round(floor.seconds(peaks) / tokens * 1e6, 3),
      bound=floor.bound(peaks),
      share=round(floor.seconds(peaks) / seconds, 3),
    )
    rows_lib.say(**row)
    rows.append(row)
  return rows


def _floor(curve, cfg, position, args) -> floors.Work:
  """The least work of a call."""
  stored = floors.stored(cfg, **pools.dtypes(args))
  of_pass = functools.partial(floors.whole, cfg, stored, curve.attention)
  if curve.phase == "prefill":
    return of_pass(1, args.chunk, position, samples=False)
  steps = (
    of_pass(curve.slots, 1, offset, samples=True)
    for offset in range(position - args.steps, position)
  )
  return sum(steps, start=floors.Work())


def _write(file, cfg, rows, args) -> None:
  """After each curve: what is measured stays if a later one fails."""
  if file is None:
    return
  found = dict(
    device=jax.devices()[0].device_kind,
    jax=jax.__version__,
    model=args.model,
    top_k=cfg.top_k,
    steps=args.steps,
    chunk=args.chunk,
    **pools.dtypes(args),
    rows=rows,
    summary=summary(rows, cfg.top_k),
  )
  file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def summary(rows: list[Row], top_k: int) -> list[Row]:
  """Slopes above K of dense and sparse attention, and the sparse one's bend.

  Args:
    rows: Of `positions`.
    top_k: K.

  Returns:
    A row for each phase and number of slots: slopes in microseconds a token per
    1,024 positions, by least squares over positions from K on; their ratio; and
    the position where the sparse curve bends. None for what has too few points.
  """
  curves: dict[tuple[str, int], dict[str, list[tuple[int, float]]]] = {}
  for row in rows:
    curve = curves.setdefault((row["phase"], row["slots"]), {})
    point = row["position"], row["us_a_token"]
    curve.setdefault(row["attention"], []).append(point)
  found = []
  for (phase, slots), curve in curves.items():
    dense, sparse = (
      _slope([x for x in curve.get(way, []) if x[0] >= top_k])
      for way in ("dense", "sparse")
    )
    ratio = dense / sparse if dense is not None and sparse else None
    found.append(
      dict(
        mode="positions",
        phase=phase,
        slots=slots,
        dense_slope=_rounded(dense),
        sparse_slope=_rounded(sparse),
        dense_over_sparse=_rounded(ratio),
        bend=_bend(
          [x for x in curve.get("sparse", []) if x[0] <= _BEND * top_k]
        ),
      )
    )
  return found


def _slope(points) -> float | None:
  if len(points) < 2:
    return None
  x, y = np.array(points, float).T
  return float(np.polyfit(x / 1024, y, 1)[0])


def _bend(points) -> int | None:
  """The measured position where two lines that meet there fit best."""
  if len(points) < 4:
    return None
  x, y = np.array(sorted(points), float).T

  def error(at):
    lines = np.stack([np.ones_like(x), x, np.maximum(x - at, 0)], 1)
    fit = lines @ np.linalg.lstsq(lines, y)[0]
    return float(np.square(y - fit).sum())

  return int(min(x[1:-1], key=error))


def _rounded(x: float | None) -> float | None:
  return None if x is None else float(f"{x:.4g}")
