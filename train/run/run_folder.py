"""The folder of a run: whose it is, and that it can be written to."""

import json
import pathlib
from typing import Any, Final

from train.host import atomic_files
from train.host import processes

# What may differ between a run and its continuation: where things lie, what is
# logged, saved and guarded, and which devices compute, by what.
_FREE = (
  "run_dir",
  "mesh",
  "distributed",
  "kernels",
  "checkpoint",
  "data.max_bad_share",
  "data.allow_changed",
  "guard",
  "log",
  "resume",
  "compile_only",
  "check",
  "profile",
  "stop_at",
)
_PROBE: Final = ".written-by-"  # a process that tried whether it can


class NotSaved(OSError):
  """A run's folder cannot be written to; what is there stays."""


def check(run_dir: str, run_config: dict[str, Any], *, resume: bool) -> None:
  """Compares a run's config with that of the run in its folder, if any.

  Raises:
    ValueError: The folder holds a run and `resume` is off, or what is no run,
      or a run with another config.
  """
  folder = pathlib.Path(run_dir)
  file = folder / "config.json"
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"run_dir={run_dir} is a file; give another --run-dir.")
  # A run that was killed as it began may have left half of its config.
  unfinished = (atomic_files.partial(file).name, _PROBE)
  if not folder.exists() or all(
    path.name.startswith(unfinished) for path in folder.iterdir()
  ):
    return
  if not resume:
    raise ValueError(
      f"run_dir={run_dir} is not empty: go on with the run in it by "
      "--resume, or give another --run-dir."
    )
  if not file.exists():
    raise ValueError(
      f"--resume: run_dir={run_dir} is not empty, but holds no run (no "
      "config.json); give the --run-dir of one, or of none yet."
    )
  saved = _flat(json.loads(file.read_text(encoding="utf-8")))
  now = _flat(json.loads(json.dumps(run_config)))
  changed = [
    f"{name} is {now.get(name)!r}, was {saved.get(name)!r}"
    for name in sorted(saved | now)
    if saved.get(name) != now.get(name)
    and not f"{name}.".startswith(tuple(f"{free}." for free in _FREE))
  ]
  if changed:
    raise ValueError(
      f"--resume: the run in {run_dir} has another config: "
      f"{'; '.join(changed)}. Give the same values, or another --run-dir to "
      "begin a new run."
    )


def open_(run_dir: str, run_config: dict[str, Any], *, resume: bool) -> None:
  """Makes the folder this run's; all processes call it.

  Args:
    run_dir: The run's folder.
    run_config: The run's config as nested dicts, for config.json.
    resume: Whether the folder may hold this run already.

  Raises:
    ValueError: The folder is not this run's, see `check`.
    NotSaved: Nothing can be written there.
  """
  folder = pathlib.Path(run_dir).resolve()
  check(run_dir, run_config, resume=resume)
  processes.meet("checked")  # before anyone writes what another would find
  _make_writable(folder)
  if processes.is_first():
    text = json.dumps(run_config, indent=2)
    atomic_files.write(folder / "config.json", text + "\n")
  processes.meet("run_dir")  # before anyone writes anything else there


def _make_writable(folder: pathlib.Path) -> None:
  probe = folder / f"{_PROBE}{processes.number()}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    probe.unlink()
  except OSError as e:
    raise NotSaved(
      f"run_dir={folder} cannot be written to ({e.strerror}): a run keeps its "
      "checkpoints and metrics there. Give another --run-dir."
    ) from e


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": [1]}} -> {"a.b.0": 1}."""
  if isinstance(tree, list):
    tree = {str(i): x for i, x in enumerate(tree)}
  if not isinstance(tree, dict):
    return {prefix: tree}
  flat = {}
  for name, child in tree.items():
    flat |= _flat(child, f"{prefix}.{name}" if prefix else name)
  return flat
