"""Readers of the kinds of files that documents come from.

What is wrong with a file is found when it is opened, not after hours of
training. For that, text, JSON and ArrayRecord are read once; of Parquet and of
Hugging Face datasets, the metadata and samples.
"""

import array
import codecs
from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import io
import itertools
import pathlib

import grain

from train.data import content as content_lib
from train.data import documents as documents_lib
from train.data import manifest
from train.data import records
from train.data import tables

DataError = documents_lib.DataError
BadRecord = documents_lib.BadRecord
Content = content_lib.Content
Field = records.Field

# Takes a bad record: returns to go on without it, or raises.
type Reject = Callable[[BadRecord], None]

_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_PARQUET = (".parquet", ".parq", ".pq")
_ARRAY_RECORD = (".array_record", ".arrayrecord")

_UNPACK = "is compressed; unpack it, or narrow the glob"
_TABLE = (
  "is a table, not text; convert it to Parquet or JSON lines, or name it *.txt"
  " if its commas and all are to be trained on"
)
_ARROW = "is in Arrow's format; convert it to Parquet"
_OBJECTS = (
  "holds JSON lines, which its name does not say; name it *.jsonl, or *.txt if"
  " its braces and all are to be trained on"
)
_COMPRESSED = "is compressed, which its name does not say; add the suffix"
# What cannot be read, by suffix and by first bytes, whatever the suffix.
_REFUSED = {
  **dict.fromkeys((".csv", ".tsv", ".psv"), _TABLE),
  **dict.fromkeys((".zip", ".tar", ".7z", ".rar", ".z"), _UNPACK),
  **dict.fromkeys((".tgz", ".tbz", ".tbz2", ".txz"), _UNPACK),
  **dict.fromkeys((".lz4", ".br", ".lzma"), _UNPACK),
  **dict.fromkeys((".arrow", ".feather"), _ARROW),
}
_MAGIC = {
  b"\x1f\x8b": f"{_COMPRESSED} .gz",
  b"\x28\xb5\x2f\xfd": f"{_COMPRESSED} .zst",
  b"BZh91AY&SY": f"{_COMPRESSED} .bz2",
  b"\xfd7zXZ\0": f"{_COMPRESSED} .xz",
  b"PK\x03\x04": _UNPACK,
  b"PAR1": "is Parquet; name it *.parquet",
  b"ARROW1": _ARROW,
  b"%PDF-": "is PDF; convert it to text, or narrow the glob",
  b"version https://git-lfs": "is not there yet but for a pointer to it; call"
  " git lfs pull",
}


@dataclasses.dataclass(frozen=True)
class Opened:
  """A file that was opened.

  Attributes:
    files: its documents, in one part or several.
    mark: what it is known by.
  """

  files: list[documents_lib.File]
  mark: manifest.Mark


def open_file(
  path: pathlib.Path, field: Field, reject: Reject, spool: content_lib.Spool
) -> Opened:
  """Opens and checks one file, of the kind that its suffix names.

  A bad record keeps its number and becomes an empty document, so that all
  others keep theirs when it is mended, or goes bad only later.

  Args:
    path: *.jsonl, *.ndjson, *.json, *.parquet, *.parq, *.array_record or
      *.arrayrecord, in small or large letters, all but the last compressed or
      not (*.gz, *.zst, *.bz2, *.xz); any other is text, one document.
    field: the field (JSON) or column (Parquet) that holds the text.
    reject: is given every record, or file, that is bad.
    spool: where compressed files are unpacked.

  Raises:
    DataError: a package is missing, or room for what is unpacked; or whatever
      `reject` raises.
  """
  try:
    return _open(path, field, reject, spool)
  except BadRecord as e:
    bad = e
  except OSError as e:
    bad = BadRecord(f"{path} cannot be read ({e}).", file=str(path))
  reject(bad)
  blank = _Blank(bad)
  return Opened([blank], blank.mark)


def _open(
  path: pathlib.Path, field: Field, reject: Reject, spool: content_lib.Spool
) -> Opened:
  suffix, packed = content_lib.suffixes(path)
  if suffix in _REFUSED:
    raise BadRecord(f"{path} {_REFUSED[suffix]}.", file=str(path))
  if packed and suffix in _ARRAY_RECORD:
    raise BadRecord(f"{path} {_UNPACK}.", file=str(path))
  content = content_lib.open_content(path, spool)
  if suffix in _PARQUET:
    _check_head(_head(content).removeprefix(b"PAR1"), path)
    return Opened(*tables.open_row_groups(content, field))
  if suffix in (*_JSON_LINES, ".json"):
    _check_head(_head(content), path)
    is_array = suffix == ".json" and _begins_array(content)
    kind = _JsonArray if is_array else _JsonLines
    reader = kind(content, field, reject)
  elif suffix in _ARRAY_RECORD:
    reader = _ArrayRecords(path, field, reject)
  else:
    reader = _TextFile(content)
  return Opened([reader], reader.mark)


def _head(content: Content) -> bytes:
  with content.open() as file:
    return file.read(64)


def _check_head(head: bytes, path: pathlib.Path) -> None:
  """Raises a BadRecord if a file's first bytes are those of another kind."""
  for magic, what in _MAGIC.items():
    if head.startswith(magic):
      raise BadRecord(f"{path} {what}.", file=str(path), head=head)


class _Blank:
  """Empty documents in place of a bad file's."""

  def __init__(self, bad: BadRecord):
    self._bad = bad
    self.mark = manifest.unknown(bad.records)

  def __len__(self) -> int:
    return self._bad.records

  def __getitem__(self, index: int) -> str:
    return ""

  def place(self, index: int) -> tuple[str, int]:
    return self._bad.file, index


class _TextFile:
  """One document, or none if the file is empty."""

  def __init__(self, content: Content):
    self._content = content
    data = self._bytes()
    _check_head(data[:64], content.path)
    if content_lib.suffixes(content.path)[0] != ".txt" and _begins_lines(data):
      raise BadRecord(
        f"{content.path} {_OBJECTS}.", file=str(content.path), head=data
      )
    self._num_bytes = len(data)
    tally = manifest.Tally()
    if data:
      tally.add(self._decode(data))
    self.mark = tally.mark()

  def __len__(self) -> int:
    return min(self._num_bytes, 1)

  def __getitem__(self, index: int) -> str:
    data = self._bytes()
    if len(data) != self._num_bytes:
      file, at = self.place(0)
      raise BadRecord(
        f"{file} has {len(data)} bytes; it had {self._num_bytes} when it was"
        " opened.",
        file=file,
        at=at,
        head=data,
      )
    return self._decode(data)

  def place(self, index: int) -> tuple[str, int]:
    return str(self._content.path), index

  def _bytes(self) -> bytes:
    # Not as text: that would turn "\r\n" into "\n".
    with self._content.open() as file:
      return file.read()

  def _decode(self, data: bytes) -> str:
    return records.decode(data, str(self._content.path), self.place(0), 0)


class _JsonRecords:
  """One document a record; empty texts are left out.

  Which records there are, and where each ends, is left to its kinds.
  """

  def __init__(self, content: Content, field: Field, reject: Reject):
    self._content, self._field = content, field
    self._file = str(content.path)
    # Of the records, in bytes: 8 a document; -1 - offset of a bad one.
    self._offsets = array.array("q")
    tally = manifest.Tally()
    with content.open() as file:
      for where, offset, data in self._scan(file):
        try:
          text = self._text(data, where, offset)
        except BadRecord as e:
          reject(e)
          self._offsets.append(-1 - offset)
          tally.add_bad()
        else:
          if text:
            self._offsets.append(offset)
            tally.add(text)
    self.mark = tally.mark()

  def __len__(self) -> int:
    return len(self._offsets)

  def __getitem__(self, index: int) -> str:
    offset = self._offsets[index]
    if offset < 0:
      return ""
    with self._content.open() as file:  # a handle of its own: threads
      file.seek(offset)
      data = self._cut(file, index)
    return self._text(data, f"{self._file}, byte {offset},", offset)

  def place(self, index: int) -> tuple[str, int]:
    offset = self._offsets[index]
    return self._file, max(offset, -1 - offset)

  def _scan(self, file: io.BufferedReader) -> Iterator[tuple[str, int, bytes]]:
    """Yields what errors call a record, its offset and its bytes."""
    raise NotImplementedError

  def _cut(self, file: io.BufferedReader, index: int) -> bytes:
    """Reads a record, at which the file stands."""
    raise NotImplementedError

  def _text(self, data: bytes, where: str, offset: int) -> str:
    raise NotImplementedError


class _JsonLines(_JsonRecords):
  """An object a line; blank lines are left out."""

  def _scan(self, file: io.BufferedReader) -> Iterator[tuple[str, int, bytes]]:
    offset = 0
    for number, line in enumerate(file, 1):
      yield f"{self._file}:{number}", offset, line
      offset += len(line)

  def _cut(self, file: io.BufferedReader, index: int) -> bytes:
    return file.readline()

  def _text(self, data: bytes, where: str, offset: int) -> str:
    place = self._file, offset
    line = records.decode(data, self._file, place, offset)
    if not line.strip():
      return ""
    return records.text_of(line, self._field, where, place)


class _JsonArray(_JsonRecords):
  """An object an element. The whole file is in memory while it is opened."""

  def _scan(self, file: io.BufferedReader) -> Iterator[tuple[str, int, bytes]]:
    data = file.read()
    text = records.decode(data, self._file, (self._file, 0), 0)
    try:
      spans = records.spans(text)
    except (ValueError, RecursionError) as e:
      raise BadRecord(
        f"{self._file} is not a JSON array ({e}); give an array of objects, or"
        " JSON lines.",
        file=self._file,
        head=data,
      ) from e
    offset, last = len(data) - len(text.encode()), 0  # of a byte order mark
    for number, (begin, end) in enumerate(spans):
      offset += len(text[last:begin].encode())
      last = begin
      piece = text[begin:end].encode()
      yield f"{self._file}, element {number},", offset, piece

  def _cut(self, file: io.BufferedReader, index: int) -> bytes:
    if index + 1 == len(self):
      return file.read()
    _, here = self.place(index)
    _, beyond = self.place(index + 1)
    return file.read(beyond - here)

  def _text(self, data: bytes, where: str, offset: int) -> str:
    place = self._file, offset
    line = records.decode(data, self._file, place, offset)
    # What is read later goes on to the next element, or to the end.
    return records.text_of(line, self._field, where, place, records.parse_first)


def _begins_array(content: Content) -> bool:
  """Whether a *.json file is an array; if not, it must be JSON lines.

  Raises:
    BadRecord: it is neither.
  """
  path = str(content.path)
  with content.open() as file:
    lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
    first = next(filter(None, lines), b"")
  if not first or first.startswith(b"["):
    return bool(first)
  line = records.decode(first, path, (path, 0), 0)
  try:
    records.parse(line)
  except (ValueError, RecursionError) as e:
    raise BadRecord(
      f"{path} is neither a JSON array of objects nor JSON lines ({e} in the"
      " first line); write it as one of them, or narrow the glob.",
      file=path,
      head=first,
    ) from e
  return False


def _begins_lines(data: bytes) -> bool:
  """Whether a file begins with two lines that are a JSON object each."""
  data = data.removeprefix(codecs.BOM_UTF8)
  if not data[:64].lstrip().startswith(b"{"):
    return False
  lines = filter(None, (line.strip() for line in io.BytesIO(data)))
  first = [*itertools.islice(lines, 2)]
  try:
    objects = [records.parse(line.decode()) for line in first]
  except (ValueError, RecursionError):
    return False
  return len(objects) == 2 and all(isinstance(x, tuple) for x in objects)


class _ArrayRecords:
  """One document a record, which is a JSON object as in JSON lines.

  Every file stays open. Its groups should be of size 1, as grain wants them.
  """

  def __init__(self, path: pathlib.Path, field: Field, reject: Reject):
    self._path, self._field = path, field
    try:
      self._records = grain.sources.ArrayRecordDataSource(str(path))
      count = len(self._records)
    except ImportError as e:
      raise DataError(
        f"{path} needs the package `array_record`, which there is not for every"
        " system: pip install array_record, or convert it to JSON lines."
      ) from e
    except TypeError as e:
      raise BadRecord(
        f"{path} has a name that is not UTF-8, which the package array_record"
        " cannot open; rename it, or narrow the glob.",
        file=str(path),
      ) from e
    except (RuntimeError, ValueError) as e:
      raise BadRecord(
        f"{path} is not ArrayRecord ({e}); convert it, or narrow the glob.",
        file=str(path),
      ) from e
    self._bad, tally = set(), manifest.Tally()
    for index in range(count):
      try:
        tally.add(self[index])
      except BadRecord as e:
        reject(e)
        self._bad.add(index)
        tally.add_bad()
    self.mark = tally.mark()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> str:
    if index in self._bad:
      return ""
    place, where = self.place(index), f"{self._path}, record {index},"
    bad = functools.partial(BadRecord, file=str(self._path), at=index)
    try:
      record = self._records[index]
    except (RuntimeError, ValueError) as e:
      raise bad(f"{where} cannot be read ({e}); write the file anew.") from e
    line = records.decode(record, where, place, 0)
    return records.text_of(line, self._field, where, place)

  def place(self, index: int) -> tuple[str, int]:
    return str(self._path), index
