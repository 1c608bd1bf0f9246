"""Turns a dense model sparse, and compares it with the dense one, trained on.

python -m train.lifecycle --config=configs/tiny_lifecycle.py [--OPTION=...]

The config has dense stages, then warmup, then sparse. After them, the dense
model is trained on for as many steps, on the same data at the same rate as the
sparse stage: the control, in RUN_DIR/control. The table of both is printed and
written to RUN_DIR/lifecycle.md. The same command goes on after an interruption.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np

from train import config as config_lib
from train import loop
from train import main as main_lib
from train import processes
from train import record as record_lib


def control(cfg: config_lib.TrainConfig) -> config_lib.TrainConfig:
  """The run that trains the dense model on, as the sparse stage would.

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
    # A stage's data hang on the seed plus its number: the same for both.
    seed=cfg.seed + len(cfg.stages) - 1,
  )


def table(cfg: config_lib.TrainConfig) -> str:
  """Markdown: what each model is worth, dense and sparse."""
  run, other = (
    record_lib.read(pathlib.Path(x.run_dir)).lines for x in (cfg, control(cfg))
  )
  dense_end, warmup_end, end = cfg.stage_ends[-3:]
  rows = [
    ("dense", "dense", run, dense_end),
    ("the same, indexer untrained", "sparse", run, dense_end),
    ("after warm-up of the indexer", "sparse", run, warmup_end),
    ("after sparse training", "sparse", run, end),
    ("the same, read densely", "dense", run, end),
    ("dense, trained on instead", "dense", other, cfg.stages[-1].steps),
  ]
  reference = _at(other, cfg.stages[-1].steps, "eval")["dense"]
  asks = cfg.data.retrieval.fraction > 0
  head = ["model", "attention", "bits/byte", "against the last", "recall"]
  head += ["retrieval", "worst cell"] if asks else []
  body = []
  for name, way, lines, step in rows:
    text = _at(lines, step, "eval")
    bits = text[way]
    recall = f"{text['recall']:.1%}" if way == "sparse" else ""
    row = [name, way, f"{bits:.4f}", f"{bits / reference - 1:+.2%}", recall]
    if asks:
      accuracy = _at(lines, step, "retrieval", attention=way)["accuracy"]
      row += [f"{np.mean(accuracy):.1%}", f"{np.min(accuracy):.1%}"]
    body.append(row)
  speed = [
    [f"{stage.kind}", str(stage.steps), f"{stage.batch_size} x {stage.seq_len}"]
    + [f"{_milliseconds(lines, end - stage.steps, end):,.0f}"]
    for lines, stages, ends in (
      (run, cfg.stages, cfg.stage_ends),
      (other, control(cfg).stages, control(cfg).stage_ends),
    )
    for stage, end in zip(stages, ends)
  ]
  speed[-1][0] += " (trained on)"
  return (
    _markdown(head, body)
    + "\n"
    + _markdown(["stage", "steps", "batch x T", "ms a step"], speed)
  )


def _at(
  lines: list[record_lib.Line], step: int, kind: str, **wanted: Any
) -> record_lib.Line:
  """The one line of this step and kind."""
  wanted |= {"step": step, "kind": kind}
  (line,) = (x for x in lines if wanted.items() <= x.items())
  return line


def _milliseconds(lines: list[record_lib.Line], begin: int, end: int) -> float:
  """Median time of a step of a stage, without its first, which warms up."""
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


def _train(cfg: config_lib.TrainConfig) -> bool:
  """Trains to the end, from where it stands; False if stopped before."""
  begun = (pathlib.Path(cfg.run_dir) / "config.json").exists()
  run = loop.Run(dataclasses.replace(cfg, resume=begun))
  run.train()
  return run.step == cfg.total_steps


def main() -> None:
  processes.choose_platform()
  try:
    cfg = main_lib.parse(sys.argv[1:], "train.lifecycle", __doc__)
    runs = cfg, control(cfg)
    if not all(map(_train, runs)):
      return
  except (ValueError, OSError, ImportError, loop.Diverged) as e:
    sys.exit(f"error: {e}")
  text = table(cfg)
  file = pathlib.Path(cfg.run_dir) / "lifecycle.md"
  file.write_text(text, encoding="utf-8")
  print(f"\n{text}\nwritten to {file}")


if __name__ == "__main__":
  main()
