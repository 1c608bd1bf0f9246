"""Files that others made, opened without a wait.

Opening a FIFO waits for a writer, reading a device may never end, and a path
that is to be a file may be a folder: what is no regular file is refused.
"""

import os
import pathlib
import stat
from typing import BinaryIO


def open_(file: pathlib.Path) -> BinaryIO:
  """Opens a regular file, or a link to one, for reading.

  Raises:
    ValueError: It is a folder, a FIFO, a socket or a device.
    OSError: It is missing or unreadable.
  """
  if not stat.S_ISREG(os.stat(file).st_mode):
    raise ValueError(f"{file} is no regular file.")
  return open(file, "rb")


def read(file: pathlib.Path, most: int) -> bytes:
  """All of a file that has at most so many bytes.

  Raises:
    ValueError: It is larger, or no regular file.
    OSError: It is missing or unreadable.
  """
  with open_(file) as opened:
    raw = opened.read(most + 1)
  if len(raw) > most:
    raise ValueError(f"{file} has more than {most:,} bytes.")
  return raw
