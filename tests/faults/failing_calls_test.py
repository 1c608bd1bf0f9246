"""The calls that are to fail do, and no others."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.faults import failing_calls

PROGRAM = """
import json, os, pathlib, sys
from tests.faults import failing_calls
folder = pathlib.Path(sys.argv[1])
fault = failing_calls.Fault(**json.loads(sys.argv[2]))
failing_calls.begin(folder, fault)
for kind in failing_calls.KINDS:
  for i in range(4):
    path, other = folder / f"{kind}{i}", folder / f"{kind}{i}.other"
    out = None
    try:
      if kind == "mkdir":
        path.mkdir()
      elif kind in ("rename", "unlink"):
        path.rename(other) if kind == "rename" else path.unlink()
      else:
        out = os.open(path, os.O_WRONLY)
        if kind == "write":
          os.write(out, b"x") if i % 2 else os.pwrite(out, b"x", 0)
        elif kind == "fsync":
          os.fsync(out) if i % 2 else os.fdatasync(out)
      print(kind, i, 0)
    except OSError as e:
      print(kind, i, e.errno)
    if out is not None:
      os.close(out)
(folder.parent / "elsewhere").mkdir()
counts = failing_calls.counts()
failing_calls.begin(folder, None)
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
  try:
    return failing_calls.variables(tmp_path_factory.mktemp("library"))
  except RuntimeError as e:
    pytest.skip(str(e))


@pytest.mark.parametrize("kind", failing_calls.KINDS)
def test_calls_fail_from_the_nth_on(tmp_path, variables, kind):
  folder = tmp_path / "run"
  folder.mkdir()
  for name in failing_calls.KINDS:
    for i in range(4):
      if name != "mkdir":
        (folder / f"{name}{i}").touch()
  fault = {"kind": kind, "first": 2, "count": 2, "error": errno.ENOSPC}
  root = pathlib.Path(__file__).parents[2]
  out = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(folder), json.dumps(fault)],
    env=variables | {"PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()
  found = {tuple(x.split()[:2]): int(x.split()[2]) for x in out[:-1]}
  assert len(found) == 24
  failed = [name for name, why in found.items() if why]
  assert failed == [(kind, "1"), (kind, "2")]
  assert {found[name] for name in failed} == {errno.ENOSPC}
  opens = 12  # of each of three kinds, four
  assert json.loads(out[-1]) == {
    name: opens if name == "open" else 4 for name in failing_calls.KINDS
  }
  assert os.path.exists(tmp_path / "elsewhere")
