"""A process that trains run after run, and in some has system calls fail.

python -m tests.faults.io_program WORK, started by `io.Worker`. Each line of its
standard input is a run: {"run": "WORK/...", "options": [...], "fault": {...}}.
Its answer is a line: {"code": 0, "said": "...", "counts": {...}}. What the runs
print goes to standard error. Programs that are compiled once serve all runs.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import traceback
from typing import Any

from train.host import program

if __name__ == "__main__":
  answers = os.dup(1)
  os.dup2(2, 1)
  program.begin()

from tests.faults import failing_calls
from tests.faults import program as program_lib
from train import config as config_lib
from train import main
from train import stage
from train.learn import step as step_lib


def compile_once() -> None:
  """Runs share their models, and stages of one kind their step."""
  step_lib.init = functools.cache(step_lib.init)
  compile_step, steps = stage.Stage._compile, {}

  def compiled(self, state, batch):
    if self._stage not in steps:
      steps[self._stage] = compile_step(self, state, batch)
    return steps[self._stage]

  stage.Stage._compile = compiled


def train(run: str, options: list[str], fault: dict[str, Any] | None):
  """One run; what its process would end with."""
  folder = pathlib.Path(run)
  if (folder / "config.json").exists():
    options = [*options, "--resume"]
  sys.argv = ["train.main", "--config=tiny", f"--run-dir={run}", *options]
  code, said = 0, ""
  failing_calls.begin(folder, failing_calls.Fault(**fault) if fault else None)
  try:
    main.main()
  except SystemExit as e:
    code, said = (e.code, "") if isinstance(e.code, int) else (1, str(e.code))
  except BaseException:
    code, said = 70, traceback.format_exc()
  counts = failing_calls.counts()
  failing_calls.begin(folder, None)
  print(f"{run}: {code} {said}")
  return {"code": code, "said": said, "counts": counts}


def config(work: pathlib.Path) -> config_lib.TrainConfig:
  """A short run that saves, evaluates and samples more than once."""
  cfg = program_lib.config(work, ["pretrain", "sparse"])
  stages = [dataclasses.replace(stage, steps=4) for stage in cfg.stages]
  return dataclasses.replace(
    cfg,
    stages=tuple(stages),
    checkpoint=dataclasses.replace(cfg.checkpoint, every=2),
    log=dataclasses.replace(cfg.log, sample_every=4),
  )


def serve(work: pathlib.Path) -> None:
  program_lib.prepare(work, [])
  config_lib.load = lambda path: config(work)
  compile_once()
  for line in sys.stdin:
    answer = json.dumps(train(**json.loads(line)))
    os.write(answers, answer.encode() + b"\n")


if __name__ == "__main__":
  program.run(lambda: serve(pathlib.Path(sys.argv[1])))
