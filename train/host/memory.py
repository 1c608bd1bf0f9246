"""The memory of this host."""

import os


def total() -> int:
  """Bytes of memory that this host has."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
