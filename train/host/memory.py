"""The memory of this host."""

import os
import pathlib
from typing import Final

# Where Linux tells a container's limit: "max", or a number of bytes. Control
# groups, version 2 and version 1.
_LIMITS: Final = (
  pathlib.Path("/sys/fs/cgroup/memory.max"),
  pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def total() -> int:
  """Bytes of memory that this host has, or less if a container has less."""
  found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  for file in _LIMITS:
    try:
      limit = file.read_text().strip()
    except OSError:
      continue
    if limit.isdecimal():
      found.append(int(limit))
  return min(found)
