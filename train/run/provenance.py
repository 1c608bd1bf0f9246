"""Provenance: versions, devices, command and code of each attempt of a run.

RUN_DIR/versions/N.json is that of the N-th; N.diff beside it is what the code
had that is not committed.
"""

from importlib import metadata
import json
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import sys
import time
from typing import Any, Final

import jax

from train.host import atomic_files
from train.host import processes

# Variables of the environment that change what is compiled, or how it runs.
_VARIABLES: Final = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "NCCL_", "CUDA_")

_GIT_SECONDS: Final = 30


def write(run_dir: str | pathlib.Path) -> None:
  """Writes what runs now beside what ran before; the first process does.

  That it cannot is told: it is no reason not to train.
  """
  if not processes.is_first():
    return
  folder = pathlib.Path(run_dir) / "versions"
  try:
    folder.mkdir(exist_ok=True)
    # What an earlier attempt wrote is never lost, were it half of it.
    names = (x.name.partition(".")[0] for x in folder.iterdir())
    number = 1 + max((int(x) for x in names if x.isdecimal()), default=0)
    code, diff = _code(pathlib.Path(__file__).parent)
    if diff:
      (folder / f"{number}.diff").write_bytes(diff)
    text = json.dumps(_surroundings() | {"code": code}, indent=2)
    atomic_files.write(folder / f"{number}.json", text + "\n")
  except OSError as e:
    processes.say(
      f"WARNING: what runs could not be written to {folder} ({e.strerror})."
    )


def _surroundings() -> dict[str, Any]:
  devices = jax.devices()
  packages = {x.name: x.version for x in metadata.distributions() if x.name}
  return {
    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "host": socket.gethostname(),
    "command": shlex.join(sys.orig_argv),
    "folder": os.getcwd(),
    "processes": jax.process_count(),
    "devices": {
      "kind": devices[0].device_kind,
      "count": len(devices),
      # Of libtpu, or of CUDA and its driver.
      "runtime": devices[0].client.platform_version,
    },
    "environment": {
      name: value
      for name, value in sorted(os.environ.items())
      if name.startswith(_VARIABLES)
    },
    "python": sys.version,
    "system": platform.platform(),
    "packages": dict(sorted(packages.items(), key=lambda x: x[0].lower())),
  }


def _code(folder: pathlib.Path) -> tuple[dict[str, Any], bytes]:
  """Which code lies in `folder`, and what is not committed of it.

  An installed copy may lie inside of some other checkout: only what Git knows
  counts.
  """
  try:
    _git(folder, "ls-files", "--error-unmatch", pathlib.Path(__file__).name)
    top = _git(folder, "rev-parse", "--show-toplevel").removesuffix(b"\n")
    top = pathlib.Path(os.fsdecode(top))
    commit = _git(top, "rev-parse", "HEAD").decode().strip()
    # New files too, by name: they may be large, and be data.
    changed = os.fsdecode(_git(top, "status", "--porcelain")).splitlines()
    diff = _git(top, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff")
  except (OSError, subprocess.SubprocessError) as e:
    return {"commit": None, "why": _reason(e)}, b""
  return {"commit": commit, "changed": changed}, diff


def _git(folder: pathlib.Path, *arguments: str) -> bytes:
  """Returns Git's output; it takes no locks and changes nothing."""
  done = subprocess.run(
    ["git", *arguments],
    cwd=folder,
    env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    check=True,
    timeout=_GIT_SECONDS,
  )
  return done.stdout


def _reason(e: OSError | subprocess.SubprocessError) -> str:
  if isinstance(e, subprocess.CalledProcessError) and e.stderr:
    return os.fsdecode(e.stderr).strip().splitlines()[0]
  return str(e)
