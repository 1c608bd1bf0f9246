"""Makes system calls of a process fail: its n-th fsync, say, with ENOSPC.

What counts are calls on paths in one folder, by way of libc: Python's as well
as TensorStore's. The process must have been started with `variables`.
"""

import ctypes
import dataclasses
import errno
import os
import pathlib
import shutil
import subprocess
from typing import Final

KINDS: Final = ("open", "write", "fsync", "rename", "unlink", "mkdir")
FOREVER: Final = 10**9

_SOURCE: Final = pathlib.Path(__file__).with_suffix(".c")


@dataclasses.dataclass(frozen=True)
class Fault:
  """Calls that fail."""

  kind: str
  first: int
  """The first one, from 1."""
  count: int
  """How many fail in succession."""
  error: int
  """The errno."""

  def __str__(self) -> str:
    many = "for ever" if self.count == FOREVER else f"{self.count} times"
    name = errno.errorcode[self.error]
    return f"{self.kind} {self.first} fails with {name}, {many}"


def variables(work: pathlib.Path) -> dict[str, str]:
  """The environment of a process whose calls may fail.

  Raises:
    RuntimeError: There is no C compiler, or no libc to stand before.
  """
  compiler = shutil.which("cc")
  if compiler is None or not os.path.exists("/proc/self/fd"):
    raise RuntimeError("Failing calls need Linux and a C compiler, `cc`.")
  library = work / "failing_calls.so"
  if not library.exists():
    options = "-O1 -shared -fPIC -D_GNU_SOURCE".split()
    subprocess.run(
      [compiler, *options, "-o", str(library), str(_SOURCE), "-ldl"], check=True
    )
  return {**os.environ, "LD_PRELOAD": str(library)}


def begin(folder: pathlib.Path, fault: Fault | None) -> None:
  """Has calls of this process fail from now on, or none; counts anew."""
  if fault is None:
    fault = Fault(KINDS[0], 0, 0, 0)
  ctypes.CDLL(None).fail_calls(
    str(folder).encode(),
    KINDS.index(fault.kind),
    ctypes.c_long(fault.first),
    ctypes.c_long(fault.first + fault.count - 1),
    fault.error,
  )


def counts() -> dict[str, int]:
  """How many calls there were since `begin`, by kind."""
  seen = ctypes.CDLL(None).counted_calls
  seen.restype = ctypes.c_long
  return {kind: seen(i) for i, kind in enumerate(KINDS)}
