"""The folder of a run: whose it is, what lies in it, whether it is writable."""

import json
import os
import pathlib
import re
from typing import Any, Final

from dsa_jax import ranges
from train.host import atomic_files
from train.host import json_files
from train.host import ownership
from train.host import processes
from train.run import goodput

_RATES: Final = ("optimizer.peak_lr", "optimizer.indexer_lr")
# What may differ between a run and its continuation: where things lie, what is
# logged, saved and guarded, which devices compute, by what, and how fast it
# learns.
_FREE = (
  "run_dir",
  "mesh",
  "distributed",
  "kernels",
  "checkpoint",
  "data.max_bad_share",
  "data.allow_changed",
  *_RATES,
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


def check_path(option: str, path: str) -> None:
  """Raises a ValueError for an address, or a path on which no file can be.

  An address is such as gs://bucket/run: Orbax could write checkpoints there.
  But a run has more than these, which is added to, locked, and renamed, as only
  a file system does. A link to nothing is one to a disk that is not mounted: a
  run would begin anew, below where that belongs.
  """
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path):
    raise ValueError(
      f"{option}={path} is an address, not a path: mount the bucket (with "
      "gcsfuse, say) and give the path there, as /bucket/run."
    )
  if re.match("~(/|$)", path):  # a shell leaves it so after --run-dir=
    raise ValueError(
      f"{option}={path} would be a folder named ~; give the path of your home, "
      "as $HOME, or ./~ if that is what you mean."
    )
  try:
    os.stat(path)
  except FileNotFoundError:
    _check_links(option, pathlib.Path(path))  # it need not be there yet
  except OSError as e:
    raise ValueError(
      f"{option}={ranges.shown(path)} cannot be reached ({e.strerror}); give "
      "another path."
    ) from e


def _check_links(option: str, path: pathlib.Path) -> None:
  for part in (path, *path.parents):
    if part.is_symlink() and not part.exists():
      raise ValueError(
        f"{option}={path} leads nowhere: {part} is a link to nothing (is its "
        "disk mounted?)."
      )


def checkpoints(folder: pathlib.Path) -> dict[int, pathlib.Path]:
  """The folders of a run's checkpoints by step, whole or not.

  Other names, files, and links to nothing are left out.
  """
  inner = folder / "checkpoints"
  if not inner.is_dir():
    return {}
  return {
    int(path.name): path
    for path in inner.iterdir()
    if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir()
  }


def check(run_dir: str, run_config: dict[str, Any], *, resume: bool) -> None:
  """Compares a run's config with that of the run in its folder, if any.

  Raises:
    ValueError: The folder holds a run and `resume` is off, or what is no run,
      or a run with another config, or one that has lost its checkpoints.
  """
  check_path("run_dir", run_dir)
  folder = pathlib.Path(run_dir)
  file = folder / "config.json"
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"run_dir={run_dir} is a file; give another --run-dir.")
  # A run that was killed as it began may have left half of its config,
  # and its log.
  unfinished = (
    *(atomic_files.partial(file).name, "log.txt"),
    *(_PROBE, ownership.FOLDER),
  )
  if not folder.exists() or all(
    path.name.startswith(unfinished) for path in folder.iterdir()
  ):
    return
  if not resume:
    if owner := ownership.find(folder):
      raise ValueError(
        f"run_dir={run_dir} is owned by {owner}, which writes there: give "
        "another --run-dir, or, once it has ended, go on with --resume."
      )
    raise ValueError(
      f"run_dir={run_dir} is not empty: go on with the run in it by "
      "--resume, or give another --run-dir."
    )
  if not file.exists():
    raise ValueError(
      f"--resume: run_dir={run_dir} is not empty, but holds no run (no "
      "config.json); give the --run-dir of one, or of none yet."
      f"{_salvage(folder)}"
    )
  _compare(run_dir, _saved_config(file), run_config)
  _check_checkpoints(folder)


def _saved_config(file: pathlib.Path) -> dict[str, Any]:
  try:
    saved = json_files.read(file)
    if not isinstance(saved, dict):
      raise json_files.Damaged(f"{file} is no config.")
  except json_files.Damaged as e:
    raise ValueError(
      f"--resume: {e} Bring it back from a copy.{_salvage(file.parent)}"
    ) from e
  return saved


def _salvage(folder: pathlib.Path) -> str:
  """What can be done with checkpoints of a run whose config is lost."""
  if not checkpoints(folder):
    return ""
  return (
    " Its checkpoints are there: without the config, a new run can begin with "
    f"their parameters by --init-from={folder}."
  )


def _compare(
  run_dir: str, before: dict[str, Any], run_config: dict[str, Any]
) -> None:
  changed = {
    name: text
    for name, text in _changes(before, run_config).items()
    if not f"{name}.".startswith(tuple(f"{free}." for free in _FREE))
  }
  if changed:
    more = _other_stages(pathlib.Path(run_dir), changed)
    raise ValueError(
      f"--resume: the run in {run_dir} has another config: "
      f"{'; '.join(changed.values())}. Give the same values, or another "
      f"--run-dir to begin a new run{more}."
    )


def _check_checkpoints(folder: pathlib.Path) -> None:
  """Raises a ValueError where a run has been saved, and nothing is there.

  From the beginning, it would go over what it has written of its steps.
  """
  inner, metrics = folder / "checkpoints", folder / "metrics.jsonl"
  remedy = (
    "Bring them back (is their disk mounted?), or begin anew with another "
    "--run-dir."
  )
  if (inner.exists() or inner.is_symlink()) and not inner.is_dir():
    raise ValueError(f"--resume: {inner} is no folder of checkpoints. {remedy}")
  # The folder is there before the metrics are.
  began = metrics.exists() and metrics.stat().st_size > 0
  if (began and not inner.is_dir()) or (
    not checkpoints(folder) and goodput.was_saved(folder)
  ):
    raise ValueError(
      f"--resume: the run in {folder} has been saved, but {inner} holds no "
      f"checkpoints. {remedy}"
    )


def _other_stages(folder: pathlib.Path, changed: dict[str, str]) -> str:
  """How to train on for more steps than a run has."""
  saved = checkpoints(folder)
  if not saved or not any(name.startswith("stages.") for name in changed):
    return ""
  return (
    ", which may train what this one has come to for more steps: "
    f"--init-from={saved[max(saved)]}"
  )


def _changes(
  before: dict[str, Any], run_config: dict[str, Any]
) -> dict[str, str]:
  """What differs from the config before, by name, as a text."""
  saved, now = _flat(before), _flat(json.loads(json.dumps(run_config)))
  return {
    name: f"{name} is {now.get(name)!r}, was {saved.get(name)!r}"
    for name in sorted(saved | now)
    if saved.get(name) != now.get(name)
  }


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
    if (folder / "config.json").exists():
      before = _saved_config(folder / "config.json")
      changes = _changes(before, run_config)
      for name in changes.keys() & set(_RATES):
        processes.say(f"learns   otherwise from now on: {changes[name]}")
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
