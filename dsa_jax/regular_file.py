"""Files that others made, opened without a wait.

Opening a FIFO waits for a writer, reading a device may never end, and a path
that is to be a file may be a folder: what is no regular file is refused. An
error of a disk names the file, also where it was open already.
"""

import io
import os
import pathlib
import stat
from typing import Any


class _Named(io.FileIO):
  """Tells which file cannot be read, as only opening one does by itself."""

  def readinto(self, buffer: Any) -> int | None:
    try:
      return super().readinto(buffer)
    except OSError as e:
      raise OSError(e.errno, e.strerror, os.fspath(self.name)) from e


def open_(file: pathlib.Path) -> io.BufferedReader:
  """Opens a regular file, or a link to one, for reading.

  A read of many bytes at once goes past the buffer.

  Raises:
    ValueError: It is a folder, a FIFO, a socket or a device.
    OSError: It is missing or unreadable.
  """
  if not stat.S_ISREG(os.stat(file).st_mode):
    raise ValueError(f"{file} is no regular file.")
  return io.BufferedReader(_Named(file))


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
