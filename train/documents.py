"""Random access to collections of documents: a document is one string.

What is wrong with a collection is found when it is opened, not after hours of
training. For that, text and JSON lines are read once; of Parquet, the metadata.
"""

import array
import bisect
from collections.abc import Sequence
import functools
import glob
import itertools
import json
import os
import pathlib
from typing import Any
import zlib

import grain
import numpy as np

type Source = grain.sources.RandomAccessDataSource[str]


class DataError(ValueError):
  """The data, or what was said of them, cannot be used; says what to do."""


class Documents:
  """The documents of several files, one after the other: a grain source.

  Attributes:
    num_bytes: size of the files, as they are on disk.
  """

  def __init__(self, files: Sequence[Source], num_bytes: int):
    self._files = files
    self._ends = list(itertools.accumulate(map(len, files)))
    self.num_bytes = num_bytes

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> str:
    """Returns document `index` of [0, len); it may be empty if from Parquet."""
    if not 0 <= index < len(self):
      raise IndexError(f"{index=} is not in [0, {len(self)}).")
    file = bisect.bisect_right(self._ends, index)
    return self._files[file][index - (self._ends[file - 1] if file else 0)]


class Subset:
  """The documents at `indices`, int [len], of a collection."""

  def __init__(self, documents: Source, indices: np.ndarray):
    self._documents, self._indices = documents, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> str:
    return self._documents[int(self._indices[index])]


def split(documents: Source, fraction: float) -> tuple[Subset, Subset]:
  """Returns the documents to train on, and the `fraction` to hold out.

  A document's side hangs on its index alone: it stays when documents are added
  after it (unless there are so few that a side would have none).

  Raises:
    DataError: a side would have no text.
  """
  if len(documents) < 2:
    raise DataError(
      f"{len(documents)} document is too few: it takes one to train on and one"
      " to hold out. Cut it into several files, or into JSON lines."
    )
  hashes = (zlib.crc32(str(i).encode()) for i in range(len(documents)))
  hashes = np.fromiter(hashes, np.uint32, len(documents))
  held = hashes < fraction * 2**32
  held[hashes.argmin()], held[hashes.argmax()] = True, False
  sides = [Subset(documents, np.flatnonzero(side)) for side in (~held, held)]
  for side in sides:
    # Parquet may hold empty rows; with nothing else, packing would never end.
    if not any(side[i] for i in range(len(side))):
      raise DataError(
        f"{len(side)} of {len(documents)} documents make one side of the"
        " held-out split and are all empty; remove the empty ones."
      )
  return sides[0], sides[1]


def open_documents(source: str, text_field: str) -> Documents:
  """Opens and checks a collection.

  Args:
    source: "stdlib", the .py files of Python's standard library; or globs with
      commas between them (`**` crosses folders) of *.jsonl, *.parquet and text
      files, which may have any other suffix and are one document each.
    text_field: the field (JSON lines) or column (Parquet) that holds the text.

  Returns:
    The documents that are not empty, in the order of their files' paths.

  Raises:
    DataError: nothing matches, a file is malformed, or all are empty.
  """
  paths = _stdlib_paths() if source == "stdlib" else _glob(source)
  files: list[Source] = []
  num_bytes = 0
  for path in paths:
    try:
      files += _open_file(path, text_field)
    except DataError:
      if source == "stdlib":
        continue  # a few of Python's own files are Latin-1
      raise
    num_bytes += path.stat().st_size
  files = [file for file in files if len(file)]
  if not files:
    raise DataError(
      f"{source=} matches {len(paths)} files, all of them empty; point it at"
      " files that hold text."
    )
  return Documents(files, num_bytes)


def _open_file(path: pathlib.Path, text_field: str) -> list[Source]:
  match path.suffix.lower():
    case ".jsonl":
      return [_JsonLines(path, text_field)]
    case ".parquet":
      return _row_groups(path, text_field)
    case _:
      return [_TextFile(path)]


class _TextFile:
  """One document, or none if the file is empty."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._len = 1 if _decode(path.read_bytes(), path, 0) else 0

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, index: int) -> str:
    # Not read_text(): it would turn "\r\n" into "\n".
    return self._path.read_bytes().decode()


class _JsonLines:
  """One document a line; blank lines and empty texts are left out."""

  def __init__(self, path: pathlib.Path, field: str):
    self._path, self._field = path, field
    self._offsets = array.array("q")  # of the lines, in bytes: 8 a document
    offset = 0
    with path.open("rb") as file:
      for number, line in enumerate(file, 1):
        text = _decode(line, path, offset)
        if text.strip() and _json_text(text, field, f"{path}:{number}"):
          self._offsets.append(offset)
        offset += len(line)

  def __len__(self) -> int:
    return len(self._offsets)

  def __getitem__(self, index: int) -> str:
    with self._path.open("rb") as file:  # a handle of its own: threads
      file.seek(self._offsets[index])
      return json.loads(file.readline())[self._field]


def _row_groups(path: pathlib.Path, column: str) -> list[Source]:
  try:
    import pyarrow as pa
  except ImportError as e:
    raise DataError(
      f"{path} needs the package `pyarrow`:"
      ' pip install "dsa-jax[parquet]", or convert it to JSON lines.'
    ) from e
  try:
    metadata = _metadata(path)
  except (pa.ArrowInvalid, OSError) as e:
    raise DataError(
      f"{path} is not Parquet ({e}); convert it, or narrow the glob."
    ) from e
  schema = metadata.schema.to_arrow_schema()
  kinds = (pa.string(), pa.large_string(), pa.string_view())
  strings = [field.name for field in schema if field.type in kinds]
  if column not in strings:
    raise DataError(
      f"{path} has no column {column!r} of strings; set text_field to one of"
      f" {strings}, of all columns {schema.names}."
    )
  return [
    _RowGroup(path, column, group, metadata.row_group(group).num_rows)
    for group in range(metadata.num_row_groups)
  ]


class _RowGroup:
  """One document a row; a null is an empty text.

  Reading one decodes the whole group's column, and shuffled reads seldom meet a
  group again soon: groups should be small (100 rows), or be JSON lines.
  """

  def __init__(self, path: pathlib.Path, column: str, group: int, rows: int):
    self._args, self._rows = (path, column, group), rows

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, index: int) -> str:
    return _read_column(*self._args)[index].as_py() or ""


@functools.lru_cache(maxsize=64)  # files; 64 footers are some 64 MB
def _metadata(path: pathlib.Path) -> Any:
  from pyarrow import parquet

  return parquet.read_metadata(path)


@functools.lru_cache(maxsize=8)  # groups, whatever the number of threads
def _read_column(path: pathlib.Path, column: str, group: int) -> Any:
  from pyarrow import parquet

  with parquet.ParquetFile(path, metadata=_metadata(path)) as file:
    return file.read_row_group(group, columns=[column])[column]


def _json_text(line: str, field: str, where: str) -> str:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as e:
    raise DataError(
      f"{where} is not JSON ({e}); each line must be one object."
    ) from e
  if not isinstance(record, dict):
    raise DataError(
      f"{where} holds a {type(record).__name__}, not an object; each line must"
      f' be like {{"{field}": "..."}}.'
    )
  if field not in record:
    raise DataError(
      f"{where} has no field {field!r}; set text_field to one of {[*record]}."
    )
  text = record[field]
  if not isinstance(text, str):
    raise DataError(
      f"{where}: field {field!r} holds a {type(text).__name__}, not a string;"
      " set text_field to a field of strings, or remove the line."
    )
  try:
    text.encode()
  except UnicodeEncodeError as e:  # JSON can spell half a surrogate pair
    raise DataError(
      f"{where}: field {field!r} is not valid Unicode ({e}); remove the line."
    ) from e
  return text


def _decode(data: bytes, path: pathlib.Path, offset: int) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise DataError(
      f"{path} is not UTF-8: byte {data[e.start]:#04x} at offset"
      f" {offset + e.start}; convert it (iconv -t UTF-8), or narrow the glob."
    ) from e


def _glob(source: str) -> list[pathlib.Path]:
  paths = set()
  for pattern in source.split(","):
    pattern = os.path.expanduser(pattern.strip())
    found = {p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)}
    if not found:
      raise DataError(
        f"{pattern!r} of {source=} matches no file in {os.getcwd()}; give"
        " 'stdlib' or globs such as 'books/**/*.txt,web/*.jsonl'."
      )
    paths |= found
  return [pathlib.Path(path) for path in sorted(paths)]


def _stdlib_paths() -> list[pathlib.Path]:
  # The tests are left out: they are as long as the library, and odd on purpose.
  # So are the encodings, which are tables of characters.
  skipped = {"site-packages", "dist-packages", "encodings"}
  skipped |= {"test", "tests", "idle_test"}
  paths: list[pathlib.Path] = []
  for folder, folders, names in os.walk(os.path.dirname(os.__file__)):
    folders[:] = [name for name in folders if name not in skipped]
    paths += [pathlib.Path(folder, name) for name in names]
  return sorted(path for path in paths if path.suffix == ".py")
