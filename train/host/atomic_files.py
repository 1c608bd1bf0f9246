"""Files that are there whole, or as they were before: never half of one.

What is written is on the disk before it takes its place, so a power cut leaves
the old file or the new one, too.
"""

import errno
import os
import pathlib
from typing import Final

# Said by file systems that have nothing to sync of a folder.
_NO_FOLDERS: Final = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)


def write(file: pathlib.Path, text: str) -> None:
  """Writes a file; a process that is killed meanwhile leaves the old one."""
  partial(file).write_text(text, encoding="utf-8")
  replace(file)


def partial(file: pathlib.Path) -> pathlib.Path:
  """Where the file is as long as it is being written."""
  return file.with_name(file.name + ".partial")


def replace(file: pathlib.Path) -> None:
  """Puts what was written to `partial(file)` in its place."""
  sync(partial(file))
  os.replace(partial(file), file)
  sync(file.parent)


def sync(path: pathlib.Path) -> None:
  """Returns when a file, or the names in a folder, are on the disk."""
  opened = os.open(path, os.O_RDONLY)
  try:
    os.fsync(opened)
  except OSError as e:
    if e.errno not in _NO_FOLDERS or not path.is_dir():
      raise
  finally:
    os.close(opened)


def sync_all(folder: pathlib.Path) -> None:
  """Returns when a folder is on the disk, with all that is in it."""
  for inner, _, files in os.walk(folder, topdown=False):
    for path in (pathlib.Path(inner, name) for name in files):
      if not path.is_symlink():
        sync(path)
    sync(pathlib.Path(inner))
