"""Provenance: versions, devices, command and code of each attempt of a run.

RUN_DIR/versions/N.json is that of the N-th; N.diff beside it is what the code
had that is not committed.
"""

from importlib import metadata
import json
import os
import pathlib
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from typing import Any, Final

import jax

from train.host import atomic_files
from train.host import processes

# Variables of the environment that change what is compiled, or how it runs;
# besides, those of JAX's own settings. No others: a program may be given its
# secrets by any name.
_VARIABLES: Final = frozenset(
  {
    "XLA_FLAGS",
    *(f"XLA_PYTHON_CLIENT_{x}" for x in ("ALLOCATOR", "PREALLOCATE")),
    *("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"),
    *("LIBTPU_INIT_ARGS", "TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY"),
    *("TPU_ACCELERATOR_TYPE", "TPU_TOPOLOGY", "TPU_WORKER_ID"),
    *("TPU_WORKER_HOSTNAMES", "TPU_HOST_BOUNDS", "TPU_PROCESS_BOUNDS"),
    *("TPU_CHIPS_PER_HOST_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS"),
    *("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES", "TPU_MEGACORE"),
    *("TPU_PREMAPPED_BUFFER_SIZE", "CUDA_VISIBLE_DEVICES"),
    *("CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "NVIDIA_TF32_OVERRIDE"),
    *(f"NCCL_{x}" for x in ("DEBUG", "ALGO", "PROTO", "P2P_DISABLE")),
    *(f"NCCL_{x}" for x in ("P2P_LEVEL", "IB_DISABLE", "IB_HCA", "NET")),
    *(f"NCCL_{x}" for x in ("SOCKET_IFNAME", "NVLS_ENABLE", "BUFFSIZE")),
    *(f"NCCL_{x}" for x in ("MIN_NCHANNELS", "MAX_NCHANNELS", "TIMEOUT")),
  }
)

# A secret in a value, after what tells that it is one: in a URL, of an option,
# or of a header; or by the shape that its issuer gives it.
_SECRETS: Final = re.compile(
  r"(://)[^/\s@]+(?=@)"
  r"|((?:token|secret|passwd|password|credentials?|signature|[_-]key|apikey"
  r"|[?&]key|[?&]sig)=)[^&,;\s'\"]+"
  r"|(\bbearer\s+)\S+"
  r"|\b(?:hf_|gh[pousr]_|github_pat_|sk-|xox[abp]-|AKIA|AIza|ya29\.|eyJ)"
  r"[\w./+=-]{8,}",
  re.IGNORECASE,
)

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
    "command": _without_secrets(shlex.join(sys.orig_argv)),
    "folder": os.getcwd(),
    "processes": jax.process_count(),
    "devices": {
      "kind": devices[0].device_kind,
      "count": len(devices),
      # Of libtpu, or of CUDA and its driver.
      "runtime": devices[0].client.platform_version,
    },
    "environment": {
      name: _without_secrets(value)
      for name, value in sorted(os.environ.items())
      if name in _VARIABLES or name.lower() in jax.config.values
    },
    "python": sys.version,
    "system": platform.platform(),
    "packages": dict(sorted(packages.items(), key=lambda x: x[0].lower())),
  }


def _without_secrets(text: str) -> str:
  """The text, but for what looks like a password or a key in it."""
  return _SECRETS.sub(
    lambda found: "".join(x for x in found.groups() if x) + "***", text
  )


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
