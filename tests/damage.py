"""Damaged JSON and damaged files, and what came of reading them."""

from collections.abc import Callable
from collections.abc import Iterator
import copy
import dataclasses
import json
import math
import os
import pathlib
import signal
import socket
from typing import Any
import warnings

LIMIT = 5.0  # seconds that a reader may take


def nested(levels: int) -> Any:
  value: Any = 1
  for i in range(levels):
    value = [value] if i % 2 else {"k": value}
  return value


# What may stand where something else belongs.
HOSTILE = (
  *(None, True, False, 0, 1, -1, 3, 1.5, -0.5, 1e-9, 1e30, 10**12, -(10**12)),
  *(2**31, 2**63, 2**64, 10**300, 10**400, math.nan, math.inf, -math.inf),
  *("", "1", "nan", "a\nb\0\u2028", "x" * 5000, "\ud800"),
  *([], {}, [None], [1, 2], ["full"], {"a": {"b": 1}}, [[]] * 3),
  *(nested(40), nested(900)),
)


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
  """The paths of everything within a JSON value."""
  if isinstance(value, dict):
    inner = value.items()
  else:
    inner = enumerate(value) if isinstance(value, list) else ()
  for key, x in inner:
    yield (*path, key)
    yield from paths(x, (*path, key))


def replaced(value: Any, path: tuple, new: Any) -> Any:
  """A JSON value with another one in a place."""
  value = copy.deepcopy(value)
  inner = value
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = new
  return value


def without(value: Any, path: tuple) -> Any:
  value = copy.deepcopy(value)
  inner = value
  for key in path[:-1]:
    inner = inner[key]
  del inner[path[-1]]
  return value


def changes(old: Any, new: Any, path: tuple = ()) -> Iterator[tuple]:
  """The paths of what a JSON value says, and an older one does not."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in new:
      yield from changes(old.get(key), new[key], (*path, key))
  elif old != new and new is not None:
    yield path


def dumps(value: Any) -> bytes:
  return json.dumps(value).encode()


def doubled(value: dict[str, Any], key: str, new: Any) -> bytes:
  """An object in which a key stands twice."""
  text = dumps(value)
  return text[:-1] + b", " + dumps({key: new})[1:]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a reader made of a file."""

  result: Any
  """None if it was refused."""
  said: str
  """The error or the warnings."""

  @property
  def refused(self) -> bool:
    return self.result is None


def read(reader: Callable[[], Any]) -> Outcome:
  """Calls a reader, which may refuse in one line, and must come back."""

  def late(*_):
    raise AssertionError(f"it took more than {LIMIT} s")

  before = signal.signal(signal.SIGALRM, late)
  signal.setitimer(signal.ITIMER_REAL, LIMIT)
  try:
    with warnings.catch_warnings(record=True) as told:
      warnings.simplefilter("always")
      result = reader()
    assert result is not None
    lines = [str(warning.message) for warning in told]
    assert not any("\n" in line for line in lines), lines
    return Outcome(result, " ".join(lines))
  except (ValueError, OSError) as e:
    assert "\n" not in str(e), str(e)
    assert 10 < len(str(e)) < 1000, str(e)[:1000]
    return Outcome(None, str(e))
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _fifo(file: pathlib.Path) -> None:
  os.mkfifo(file)


def _socket(file: pathlib.Path) -> None:
  here = os.getcwd()
  os.chdir(file.parent)  # a socket's path has 107 characters at most
  try:
    with socket.socket(socket.AF_UNIX) as made:
      made.bind(file.name)
  finally:
    os.chdir(here)


# What may lie where a file belongs; none of them can be read as one.
OTHERS: dict[str, Callable[[pathlib.Path], None]] = {
  "fifo": _fifo,
  "socket": _socket,
  "folder": lambda file: file.mkdir(),
  "device": lambda file: file.symlink_to("/dev/zero"),
  "terminal": lambda file: file.symlink_to("/dev/tty"),
  "dangling": lambda file: file.symlink_to("nowhere"),
  "loop": lambda file: file.symlink_to(file.name),
  "empty": lambda file: file.touch(),
}
