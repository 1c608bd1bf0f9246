"""Files of JSON that programs here wrote, whole or by the line."""

from collections.abc import Iterator
import json
import pathlib
from typing import Any


class Damaged(ValueError):
  """A file is not what was written there; says which one."""


def read(file: pathlib.Path) -> Any:
  """The value in a file.

  Raises:
    Damaged: It cannot be read, or is no JSON.
  """
  try:
    return parse(file.read_bytes())
  except (OSError, ValueError) as e:
    raise Damaged(f"{file} {_why(e)}.") from e


def read_lines(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """The number, from 1, and the value of each line of a file.

  Half a line at the end, as a killed process leaves it, is left out.

  Raises:
    Damaged: A line is no JSON, or the file cannot be read.
  """
  try:
    with file.open("rb") as opened:  # may be large
      for number, line in enumerate(opened, start=1):
        try:
          yield number, parse(line)
        except ValueError as e:
          if line.endswith(b"\n"):  # hence not the last one
            raise Damaged(f"{file}, line {number} is malformed ({e}).") from e
  except OSError as e:
    raise Damaged(f"{file} {_why(e)}.") from e


def parse(text: bytes) -> Any:
  """The value that a text spells; a ValueError if it is no JSON."""
  if not text.strip():
    raise ValueError("it is empty")
  try:
    return json.loads(text)
  except RecursionError as e:
    raise ValueError("it is nested too deep") from e


def _why(e: OSError | ValueError) -> str:
  if isinstance(e, OSError):
    return f"cannot be read ({e.strerror})"
  return f"is damaged ({e})"
