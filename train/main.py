"""Trains a model: python -m train.main --config=configs/tiny.py [--OPTION=...].

The config is a Python file that defines `config() -> TrainConfig`. The file is
run, as any program is: give one that you trust. Each of the config's fields is
an option; with --config=FILE --help, all are listed.
"""

import pathlib
import sys

if __package__ in (None, ""):  # run as `python train/main.py`
  sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

from train.host import program  # noqa: E402

if __name__ == "__main__":
  program.begin()  # before the imports that take seconds

from train import config as config_lib  # noqa: E402
from train import loop  # noqa: E402
from train import options  # noqa: E402
from train import preflight  # noqa: E402
from train import report  # noqa: E402
from train.aot import compile as compile_lib  # noqa: E402
from train.host import outputs  # noqa: E402
from train.host import processes  # noqa: E402


def parse(
  args: list[str], program: str = "train.main", doc: str = str(__doc__)
) -> config_lib.TrainConfig:
  """The config that the command line asks for.

  Raises:
    ValueError: It asks for what cannot be.
    SystemExit: An option is not known, or all there was to do is done.
  """
  paths, rest = [], []
  remaining = iter(args)
  for arg in remaining:
    if arg == "--config":
      paths.append(next(remaining, ""))
    elif arg.startswith("--config="):
      paths.append(arg.removeprefix("--config="))
    else:
      rest.append(arg)
  if not paths:
    known = ", ".join(
      sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
    )
    print(f"{doc}\nConfigs here: {known}")
    sys.exit(0 if "--help" in rest or "-h" in rest else 2)
  if len(set(paths)) > 1:
    raise ValueError(f"--config is given twice, as {' and as '.join(paths)}.")
  return options.parse(
    config_lib.load(paths[0]),
    rest,
    program=f"python -m {program} --config={paths[0]}",
    description=doc,
  )


def refusal(error: Exception) -> str:
  """The last words of a program that an error ends."""
  return f"error: {options.spelled(str(error), config_lib.TrainConfig)}"


def main() -> None:
  processes.configure_platform()
  try:
    cfg = parse(sys.argv[1:])
    if cfg.compile_only:
      sys.exit(
        compile_lib.report(
          cfg.compile_only, cfg.mesh, cfg.step_plan, cfg.stages
        )
      )
    processes.start(cfg.distributed)
    if cfg.check:
      preflight.report(cfg)
      return
    run = loop.Run(cfg)
  except (ValueError, OSError, ImportError, MemoryError) as e:
    sys.exit(refusal(e))
  try:
    run.train()
  except loop.ENDS as e:
    sys.exit(refusal(e))
  if run.step == cfg.total_steps and processes.is_first():
    draw(pathlib.Path(cfg.run_dir))


def draw(run_dir: pathlib.Path) -> None:
  """Writes the pictures of a finished run, if that can be."""
  try:
    with outputs.Output(f"{run_dir}/report").attempt(ValueError):
      report.report(run_dir)
  except ImportError as e:
    print(e)


if __name__ == "__main__":
  program.run(main)
