"""Files that are there whole, or as they were before: never half of one."""

import os
import pathlib


def write(file: pathlib.Path, text: str) -> None:
  """Writes a file; a process that is killed meanwhile leaves the old one."""
  partial(file).write_text(text, encoding="utf-8")
  replace(file)


def partial(file: pathlib.Path) -> pathlib.Path:
  """Where the file is as long as it is being written."""
  return file.with_name(file.name + ".partial")


def replace(file: pathlib.Path) -> None:
  """Puts what was written to `partial(file)` in its place."""
  os.replace(partial(file), file)
