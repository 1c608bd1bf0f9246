"""Records that hold no document: counted, written down, and left out."""

import json
import pathlib
import threading

import jax

from train.data import documents as documents_lib
from train.host import processes

_SHOWN = 3  # bad records that an error tells of


class Quarantine:
  """The bad records of one source: how many there are, and how many may be.

  Each is written once, as a line of JSON, to FOLDER/PROCESS.jsonl:
    source  the source's name
    file    path of the file, or name of the dataset
    at      see `BadRecord`
    why     what is wrong with it
    head    its first bytes, those that are not UTF-8 as \\xNN
  A run that goes on does not write again what the folder holds already. What
  cannot be written waits for the next bad record, and ends no run.

  Threads may share it. Memory: a few hundred bytes a bad record.

  Attributes:
    count: bad records that this process has met.
  """

  count: int

  def __init__(
    self, source: str, max_share: float, folder: pathlib.Path | None
  ):
    """Writes nothing yet, see `begin`.

    Args:
      source: the source's name.
      max_share: share of its records that may be bad, of [0, 1).
      folder: where the file goes; None writes none.
    """
    self.count = 0
    self._source, self._max_share, self._folder = source, max_share, folder
    self._records: int | None = None  # not known before all files are open
    self._seen: set[tuple[str, int]] = set()
    self._first: list[str] = []
    self._waiting: list[tuple[tuple[str, int], str]] = []  # place and line
    self._written: set[tuple[str, int]] = set()
    self._begun = False
    self._told = False  # that something cannot be written
    self._lock = threading.Lock()

  def add(self, bad: documents_lib.BadRecord) -> None:
    """Counts a record, if it is not known to be bad, and writes it down.

    Raises:
      BadRecord: none may be bad, and the source is still being opened.
      DataError: more are bad than may be.
    """
    if self._records is None and not self._max_share:
      raise bad
    with self._lock:
      place = bad.file, bad.at
      if place not in self._seen:
        self._seen.add(place)
        self.count += bad.records
        if len(self._first) < _SHOWN:
          self._first.append(str(bad))
        self._waiting.append((place, self._line(bad)))
        if self._begun:
          self._write()
      self._check()

  def opened(self, records: int) -> None:
    """Says how many records the source has, now that all were looked at.

    Raises:
      DataError: more are bad than may be.
    """
    self._records = records
    self._check()

  def begin(self) -> None:
    """Lets one process write what all found when they opened the source.

    From now on each process writes what it finds.
    """
    with self._lock:
      if self._begun:
        return
      self._begun = True
      if self._folder is None:
        return
      self._written = _places(self._folder, self._source)
      if processes.is_first():
        self._write()
      else:
        self._waiting.clear()

  def _check(self) -> None:
    if self._records is None or self.count <= self._max_share * self._records:
      return
    listed = ""
    if self._begun and self._folder and not self._waiting:
      listed = f" All are listed in {self._folder}."
    raise documents_lib.DataError(
      f"Source {self._source!r}: {self.count} of {self._records} records are"
      f" bad, more than data.max_bad_share={self._max_share} allows. The first:"
      f" {' '.join(self._first)}{listed} Mend them or leave them out, or raise"
      " data.max_bad_share to go on without them."
    )

  def _line(self, bad: documents_lib.BadRecord) -> str:
    values = {
      "source": self._source,
      "file": bad.file,
      "at": bad.at,
      "why": str(bad),
      "head": bad.head.decode(errors="backslashreplace"),
    }
    return json.dumps(values)

  def _write(self) -> None:
    """Appends those that wait, but for what was written by an earlier start."""
    lines = [
      line for place, line in self._waiting if place not in self._written
    ]
    if self._folder is not None and lines:
      file = self._folder / f"{jax.process_index()}.jsonl"
      try:
        self._folder.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
          # The line break comes first: a line may be torn where a machine died.
          out.write("".join("\n" + line for line in lines))
      except OSError as e:
        if not self._told:
          processes.say(
            f"ERROR: bad records of source {self._source!r} cannot be written"
            f" to {file} ({e}); they are left out all the same, and written"
            " with the next one that can be."
          )
        self._told = True
        return
    self._waiting.clear()


def _places(folder: pathlib.Path, source: str) -> set[tuple[str, int]]:
  """Returns file and place of the records of a source that are in `folder`."""
  places = set()
  for file in folder.glob("*.jsonl"):
    try:
      lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
      continue  # what it holds may be written again
    for line in lines:
      try:
        record = json.loads(line)
        if record["source"] == source:
          places.add((record["file"], record["at"]))
      except (ValueError, TypeError, KeyError):
        continue  # empty, or torn
  return places
