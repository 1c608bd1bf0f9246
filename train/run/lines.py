"""A file of JSON objects, one a line, each of them once."""

from collections.abc import Callable
from collections.abc import Iterator
import json
import os
import pathlib
from typing import Any

from dsa_jax import ranges
from train.host import json_files
from train.host import outputs
from train.host import processes


class Lines:
  """Writes lines, and takes back those that will come again.

  What cannot be written is told, stays in memory (some 500 bytes a line of
  metrics), and is tried again with each line after it.
  """

  def __init__(
    self, file: pathlib.Path, stays: Callable[[dict[str, Any]], bool]
  ):
    """Reads the file, if there is one, and drops all lines but those that stay.

    See `keep` for what it raises.
    """
    self._file, self._output = file, outputs.Output(str(file))
    self._out: int | None = None  # its descriptor
    self._size: int | None = None  # bytes that are there and right, if known
    self._longer = True  # something else may follow them
    self._owed = b""  # what comes after them
    self.keep(stays)

  def add(self, line: dict[str, Any]) -> None:
    """Writes a line, after those that are owed."""
    self._owed += json.dumps(line).encode() + b"\n"
    self._write()

  def keep(self, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Drops all lines but those that stay.

    The file is cut at the first line that goes, and not copied: a full disk
    would not allow that. What is no line, after the last one that stays, goes
    too: a killed process leaves half of one, and a power cut may leave zeros.

    Raises:
      Damaged: What is no line stands before one that stays.
      OSError: The file cannot be read.
    """
    size, after, cut, wrong = 0, [], False, None
    for number, text in enumerate(self._texts(), start=1):
      try:
        line = json_files.parse(text)
        kept = isinstance(line["kind"], str) and stays(line)
      except (ValueError, KeyError, TypeError) as e:
        why = ranges.shown(e)  # some errors have the whole line in them
        kept, wrong = False, wrong or f"line {number} is malformed: {why}"
      if kept and wrong:
        raise json_files.Damaged(f"{self._file}, {wrong}. Delete it to go on.")
      cut = cut or not kept or not text.endswith(b"\n")
      if not cut:
        size += len(text)
      elif kept:
        after.append(text.removesuffix(b"\n") + b"\n")
    if wrong:
      processes.say(f"{self._file}, {wrong}; it is left out.")
    there = size if self._size is None else min(size, self._size)
    owed = self._owed[: size - there] if size > there else b""
    self._size, self._owed, self._longer = there, owed + b"".join(after), True
    self._write()

  def sync(self) -> None:
    """Has what was written survive a power cut."""
    if self._owed or self._longer:
      self._write()
    if self._out is not None:
      with self._output.attempt():
        os.fsync(self._out)

  def close(self) -> None:
    """The last try."""
    self.sync()
    if self._owed:
      processes.say(
        f"ERROR: {len(self._owed.splitlines())} lines of {self._file} could not"
        " be written, and are lost."
      )
    if self._out is not None:
      with self._output.attempt():
        out, self._out = self._out, None
        os.close(out)

  def _texts(self) -> Iterator[bytes]:
    """All lines, those that are owed at last."""
    try:
      with self._file.open("rb") as saved:  # may be large
        size = 0
        for text in saved:
          if size == self._size:
            break
          size += len(text)
          yield text
    except FileNotFoundError:
      pass
    yield from self._owed.splitlines(keepends=True)

  def _write(self) -> None:
    """Writes what is owed, at its place: again if that has failed before."""
    with self._output.attempt():
      assert self._size is not None
      if self._out is None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._out = os.open(self._file, flags, 0o666)
      if self._longer:
        os.ftruncate(self._out, self._size)
        self._longer = False
      if self._owed:
        done = 0
        while done < len(self._owed):
          done += os.pwrite(self._out, self._owed[done:], self._size + done)
        self._size, self._owed = self._size + done, b""
