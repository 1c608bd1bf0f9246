"""Turns a dense model sparse and compares it with a dense control.

python -m train.lifecycle --config=configs/tiny_lifecycle.py [--OPTION=...]

The config has dense stages, then warmup, then sparse. After them the control is
trained in RUN_DIR/control: the last dense model, for as many steps, on the same
data and at the same rate as the sparse stage. A table of both is printed and
written to RUN_DIR/lifecycle.md. After an interruption, run the same command.
"""

import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

from train.host import program

if __name__ == "__main__":
  program.begin()  # before the imports that take seconds

import numpy as np

from train import config as config_lib
from train import loop
from train import main as main_lib
from train.host import atomic_files
from train.host import processes
from train.run import read_run


def control(cfg: config_lib.TrainConfig) -> config_lib.TrainConfig:
  """The control run: the dense model, trained on as the sparse stage would.

  Raises:
    ValueError: The stages are not dense ones, then warmup, then sparse.
  """
  kinds = [stage.kind for stage in cfg.stages]
  dense = kinds[:-2]
  sparse = {"warmup", "sparse"}
  if not dense or sparse & set(dense) or kinds[-2:] != ["warmup", "sparse"]:
    raise ValueError(
      "A life cycle is one or more dense stages, then warmup, then sparse; the "
      f"config's stages are {', '.join(kinds)}."
    )
  stage = dataclasses.replace(cfg.stages[-1], kind=dense[-1])
  return dataclasses.replace(
    cfg,
    run_dir=f"{cfg.run_dir}/control",
    stages=(stage,),
    init_from=f"{cfg.run_dir}/checkpoints/{cfg.stage_ends[-3]}",
    # A stage's data depend on the seed plus its number: the same for both.
    seed=cfg.seed + len(cfg.stages) - 1,
  )


@dataclasses.dataclass(frozen=True)
class ModelRow:
  """How one model does on held-out text, by one kind of attention."""

  model: str
  attention: str
  bits_per_byte: float
  excess: float
  """Bits per byte relative to the control's, minus 1."""
  recall: float | None
  """The indexers' mean recall; None for dense attention."""
  retrieval: tuple[float, float] | None
  """Share of right answers, mean and worst over lengths and depths; None if the
  config plants no pairs."""


@dataclasses.dataclass(frozen=True)
class StageRow:
  """Cost of a step of one stage."""

  stage: str
  steps: int
  batch_size: int
  seq_len: int
  ms_per_step: float


def model_rows(cfg: config_lib.TrainConfig) -> list[ModelRow]:
  """The models of a finished life cycle, from the dense one to the control."""
  run, other = _lines(cfg), _lines(control(cfg))
  dense_end, warmup_end, end = cfg.stage_ends[-3:]
  control_end = cfg.stages[-1].steps
  reference = _at(other, control_end, "eval")["dense"]

  def row(model, attention, lines, step):
    text = _at(lines, step, "eval")
    bits, retrieval = text[attention], None
    if cfg.data.retrieval.fraction > 0:
      shares = _at(lines, step, "retrieval", attention=attention)["accuracy"]
      retrieval = float(np.mean(shares)), float(np.min(shares))
    return ModelRow(
      model,
      attention,
      bits,
      bits / reference - 1,
      text["recall"] if attention == "sparse" else None,
      retrieval,
    )

  return [
    row("dense", "dense", run, dense_end),
    row("same model, untrained indexer", "sparse", run, dense_end),
    row("after indexer warm-up", "sparse", run, warmup_end),
    row("after sparse training", "sparse", run, end),
    row("same model, dense attention", "dense", run, end),
    row("control: dense, trained on", "dense", other, control_end),
  ]


def stage_rows(cfg: config_lib.TrainConfig) -> list[StageRow]:
  """The stages of a finished life cycle, the control's last."""
  rows = []
  for part in (cfg, control(cfg)):
    lines = _lines(part)
    for trained, end in zip(part.stages, part.stage_ends):
      rows.append(
        StageRow(
          f"{trained.kind}{' (control)' if part is not cfg else ''}",
          trained.steps,
          trained.batch_size,
          trained.seq_len,
          _milliseconds(lines, end - trained.steps, end),
        )
      )
  return rows


def table(models: list[ModelRow], stages: list[StageRow]) -> str:
  """Renders the rows as two Markdown tables."""
  asks = models[0].retrieval is not None
  head = ["model", "attention", "bits/byte", "vs. control", "recall"]
  head += ["retrieval", "worst cell"] if asks else []
  body = [
    [
      row.model,
      row.attention,
      f"{row.bits_per_byte:.4f}",
      f"{row.excess:+.2%}",
      "" if row.recall is None else f"{row.recall:.1%}",
      *(f"{share:.1%}" for share in row.retrieval or ()),
    ]
    for row in models
  ]
  speed = [
    [
      row.stage,
      f"{row.steps}",
      f"{row.batch_size} x {row.seq_len}",
      f"{row.ms_per_step:,.0f}",
    ]
    for row in stages
  ]
  return (
    _markdown(head, body)
    + "\n"
    + _markdown(["stage", "steps", "batch x T", "ms a step"], speed)
  )


def _lines(cfg: config_lib.TrainConfig) -> list[read_run.Line]:
  return read_run.read(pathlib.Path(cfg.run_dir)).lines


def _at(
  lines: list[read_run.Line], step: int, kind: str, **wanted: Any
) -> read_run.Line:
  """The only line of this step and kind."""
  wanted |= {"step": step, "kind": kind}
  (line,) = (x for x in lines if wanted.items() <= x.items())
  return line


def _milliseconds(lines: list[read_run.Line], begin: int, end: int) -> float:
  """Median step time of a stage, without its first step, which warms up."""
  times = [
    line["ms_per_step"]
    for line in lines
    if "ms_per_step" in line and begin < line["step"] <= end
  ]
  return float(np.median(times[1:] or times))


def _markdown(head: list[str], rows: list[list[str]]) -> str:
  cells = [head, *rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = [
    "| " + " | ".join(x.ljust(w) for x, w in zip(row, widths)) + " |"
    for row in cells
  ]
  rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
  return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _train(cfg: config_lib.TrainConfig, held: contextlib.ExitStack) -> bool:
  """Trains to the end, resuming if begun; False if stopped before.

  The folder stays this program's until `held` is closed.
  """
  begun = (pathlib.Path(cfg.run_dir) / "config.json").exists()
  run = loop.Run(dataclasses.replace(cfg, resume=begun))
  held.enter_context(run.own())
  run.train()
  return run.step == cfg.total_steps


def check(cfg: config_lib.TrainConfig) -> None:
  """Raises a ValueError for an option of `train.main` alone.

  There are two runs, and the second begins with what the first has made.
  """
  alone = {
    "--check": cfg.check,
    "--compile-only": cfg.compile_only is not None,
    "--distributed": cfg.distributed != processes.DistributedConfig(),
  }
  for option in (option for option, given in alone.items() if given):
    raise ValueError(
      f"{option} is not for a life cycle, which trains two runs in one process:"
      " leave it out, or give it to train.main with the same --config."
    )


def main() -> None:
  processes.configure_platform()
  try:
    cfg = main_lib.parse(sys.argv[1:], "train.lifecycle", __doc__)
    check(cfg)
    with contextlib.ExitStack() as held:
      if not all(_train(part, held) for part in (cfg, control(cfg))):
        return
      text = table(model_rows(cfg), stage_rows(cfg))
      print(f"\n{text}")
      file = pathlib.Path(cfg.run_dir) / "lifecycle.md"
      atomic_files.write(file, text)
      print(f"written to {file}")
  except (ValueError, ImportError, *loop.ENDS) as e:
    sys.exit(main_lib.refusal(e))


if __name__ == "__main__":
  program.run(main)
