"""Readers of the kinds of files that documents come from.

What is wrong with a file is found when it is opened, not after hours of
training. For that, text, JSON lines and ArrayRecord are read once; of Parquet
and of Hugging Face datasets, the metadata.
"""

import array
from collections.abc import Callable
import functools
import importlib
import json
import pathlib
from typing import Any

import grain

from train.data import documents as documents_lib

DataError = documents_lib.DataError
BadRecord = documents_lib.BadRecord

# Takes a bad record: returns to go on without it, or raises.
type Reject = Callable[[BadRecord], None]

# What `hf:NAME?...` may say: arguments of datasets.load_dataset.
_HUB_OPTIONS = ("name", "split", "revision", "data_dir", "data_files")


def open_file(
  path: pathlib.Path, text_field: str, reject: Reject
) -> list[documents_lib.File]:
  """Opens and checks one file, of the kind that its suffix names.

  A bad record keeps its number and becomes an empty document, so that all
  others keep theirs when it is mended, or goes bad only later.

  Args:
    path: *.jsonl, *.parquet, *.array_record or *.arrayrecord; any other is
      text, one document.
    text_field: the field (JSON) or column (Parquet) that holds the text.
    reject: is given every record, or file, that is bad.

  Raises:
    DataError: a package is missing; or whatever `reject` raises.
  """
  try:
    match path.suffix.lower():
      case ".jsonl":
        return [_JsonLines(path, text_field, reject)]
      case ".parquet":
        return _row_groups(path, text_field)
      case ".array_record" | ".arrayrecord":
        return [_ArrayRecords(path, text_field, reject)]
      case _:
        return [_TextFile(path)]
  except BadRecord as e:
    bad = e
  except OSError as e:
    bad = BadRecord(f"{path} cannot be read ({e}).", file=str(path))
  reject(bad)
  return [_Blank(bad)]


class _Blank:
  """Empty documents in place of a bad file's."""

  def __init__(self, bad: BadRecord):
    self._bad = bad

  def __len__(self) -> int:
    return self._bad.records

  def __getitem__(self, index: int) -> str:
    return ""

  def place(self, index: int) -> tuple[str, int]:
    return self._bad.file, index


class _TextFile:
  """One document, or none if the file is empty."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    data = path.read_bytes()
    self._num_bytes = len(data)
    _decode(data, str(path), (str(path), 0), 0)

  def __len__(self) -> int:
    return min(self._num_bytes, 1)

  def __getitem__(self, index: int) -> str:
    # Not read_text(): it would turn "\r\n" into "\n".
    data = self._path.read_bytes()
    if len(data) != self._num_bytes:
      raise BadRecord(
        f"{self._path} has {len(data)} bytes; it had {self._num_bytes} when it"
        " was opened.",
        file=str(self._path),
        head=data,
      )
    return _decode(data, str(self._path), self.place(0), 0)

  def place(self, index: int) -> tuple[str, int]:
    return str(self._path), index


class _JsonLines:
  """One document a line; blank lines and empty texts are left out."""

  def __init__(self, path: pathlib.Path, field: str, reject: Reject):
    self._path, self._field = path, field
    # Of the lines, in bytes: 8 a document; -1 - offset of a bad one.
    self._offsets = array.array("q")
    offset = 0
    with path.open("rb") as file:
      for number, line in enumerate(file, 1):
        try:
          text = _decode(line, str(path), (str(path), offset), offset)
          if text.strip() and self._parse(text, f"{path}:{number}", offset):
            self._offsets.append(offset)
        except BadRecord as e:
          reject(e)
          self._offsets.append(-1 - offset)
        offset += len(line)

  def _parse(self, line: str, where: str, offset: int) -> str:
    return _json_text(line, self._field, where, (str(self._path), offset))

  def __len__(self) -> int:
    return len(self._offsets)

  def __getitem__(self, index: int) -> str:
    offset = self._offsets[index]
    if offset < 0:
      return ""
    with self._path.open("rb") as file:  # a handle of its own: threads
      file.seek(offset)
      line = file.readline()
    text = _decode(line, str(self._path), self.place(index), offset)
    return self._parse(text, f"{self._path}, byte {offset},", offset)

  def place(self, index: int) -> tuple[str, int]:
    offset = self._offsets[index]
    return str(self._path), max(offset, -1 - offset)


class _ArrayRecords:
  """One document a record, which is a JSON object as in JSON lines.

  Every file stays open. Its groups should be of size 1, as grain wants them.
  """

  def __init__(self, path: pathlib.Path, field: str, reject: Reject):
    self._path, self._field = path, field
    try:
      self._records = grain.sources.ArrayRecordDataSource(str(path))
    except ImportError as e:
      raise DataError(
        f"{path} needs the package `array_record`, which there is not for every"
        " system: pip install array_record, or convert it to JSON lines."
      ) from e
    except RuntimeError as e:
      raise BadRecord(
        f"{path} is not ArrayRecord ({e}); convert it, or narrow the glob.",
        file=str(path),
      ) from e
    self._bad = set()
    for index in range(len(self._records)):
      try:
        self[index]
      except BadRecord as e:
        reject(e)
        self._bad.add(index)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> str:
    if index in self._bad:
      return ""
    place, where = self.place(index), f"{self._path}, record {index},"
    try:
      record = self._records[index]
    except RuntimeError as e:
      raise BadRecord(
        f"{where} cannot be read ({e}); write the file anew.",
        file=str(self._path),
        at=index,
      ) from e
    line = _decode(record, where, place, 0)
    return _json_text(line, self._field, where, place)

  def place(self, index: int) -> tuple[str, int]:
    return str(self._path), index


def _row_groups(path: pathlib.Path, column: str) -> list[documents_lib.File]:
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
    raise BadRecord(
      f"{path} is not Parquet ({e}); convert it, or narrow the glob.",
      file=str(path),
    ) from e
  schema = metadata.schema.to_arrow_schema()
  kinds = (pa.string(), pa.large_string(), pa.string_view())
  strings = [field.name for field in schema if field.type in kinds]
  if column not in strings:
    raise BadRecord(
      f"{path} has no column {column!r} of strings; set text_field to one of"
      f" {strings}, of all columns {schema.names}.",
      file=str(path),
      records=metadata.num_rows,
    )
  first, groups = 0, []
  for group in range(metadata.num_row_groups):
    rows = metadata.row_group(group).num_rows
    groups.append(_RowGroup(path, column, group, first, rows))
    first += rows
  return groups


class _RowGroup:
  """One document a row; a null is an empty text.

  Reading one decodes the whole group's column, and shuffled reads seldom meet a
  group again soon: groups should be small (100 rows), or be JSON lines.
  """

  def __init__(
    self, path: pathlib.Path, column: str, group: int, first: int, rows: int
  ):
    self._args, self._first, self._rows = (path, column, group), first, rows

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, index: int) -> str:
    return _read_column(*self._args)[index].as_py() or ""

  def place(self, index: int) -> tuple[str, int]:
    return str(self._args[0]), self._first + index


@functools.lru_cache(maxsize=64)  # files; 64 footers are some 64 MB
def _metadata(path: pathlib.Path) -> Any:
  from pyarrow import parquet

  return parquet.read_metadata(path)


@functools.lru_cache(maxsize=8)  # groups, whatever the number of threads
def _read_column(path: pathlib.Path, column: str, group: int) -> Any:
  from pyarrow import parquet

  with parquet.ParquetFile(path, metadata=_metadata(path)) as file:
    return file.read_row_group(group, columns=[column])[column]


class HubDataset:
  """A Hugging Face dataset: one document a row; a null is an empty text.

  Attributes:
    num_bytes: size of the texts.
  """

  def __init__(self, path: str, column: str):
    """Downloads what is not in the cache yet, see `datasets.load_dataset`.

    Args:
      path: hf:NAME?OPTION=VALUE&..., such as hf:allenai/c4?name=en&split=train.
        Options are name (the configuration), split (train if not given),
        revision, data_dir and data_files, as `datasets.load_dataset` has them.
      column: the column that holds the text.

    Raises:
      DataError: the package is missing, there is no such dataset, or it has no
        such column.
    """
    self._path, self._column = path, column
    name, _, query = path.removeprefix("hf:").partition("?")
    options = {"split": "train"}
    for part in query.split("&") if query else []:
      option, _, value = part.partition("=")
      if option not in _HUB_OPTIONS or not value:
        raise DataError(
          f"{path!r}: {part!r} is not OPTION=VALUE with an option of"
          f" {[*_HUB_OPTIONS]}; give, for instance,"
          " hf:allenai/c4?name=en&split=train."
        )
      options[option] = value
    try:
      datasets: Any = importlib.import_module("datasets")
    except ImportError as e:
      raise DataError(
        f"{path!r} needs the package `datasets`:"
        ' pip install "dsa-jax[datasets]".'
      ) from e
    try:
      dataset = datasets.load_dataset(name, **options)
    except Exception as e:  # of the hub, of a file system, of who wrote it
      raise DataError(
        f"{path!r} cannot be loaded ({type(e).__name__}: {e}); give the name,"
        " configuration and split of a dataset, as its page on the hub has"
        " them."
      ) from e
    strings = [
      name
      for name, feature in dataset.features.items()
      if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if column not in strings:
      raise DataError(
        f"{path!r} has no column {column!r} of strings; set text_field to one"
        f" of {strings}, of all columns {[*dataset.features]}."
      )
    self._rows = dataset.select_columns([column])
    self.num_bytes = int(self._rows.data.nbytes)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> str:
    return self._rows[index][self._column] or ""

  def place(self, index: int) -> tuple[str, int]:
    return self._path, index


def _json_text(
  line: str, field: str, where: str, place: tuple[str, int]
) -> str:
  """Returns the text of a record at `place`, called `where` in errors."""
  file, at = place
  head = line[:64].encode(errors="surrogatepass")
  bad = functools.partial(BadRecord, file=file, at=at, head=head)
  try:
    record = json.loads(line)
  except (json.JSONDecodeError, RecursionError) as e:
    raise bad(
      f"{where} is not JSON ({e}); each line must be one object."
    ) from e
  if not isinstance(record, dict):
    raise bad(
      f"{where} holds a {type(record).__name__}, not an object; each line must"
      f' be like {{"{field}": "..."}}.'
    )
  if field not in record:
    raise bad(
      f"{where} has no field {field!r}; set text_field to one of {[*record]}."
    )
  text = record[field]
  if not isinstance(text, str):
    raise bad(
      f"{where}: field {field!r} holds a {type(text).__name__}, not a string;"
      " set text_field to a field of strings, or remove the line."
    )
  try:
    text.encode()
  except UnicodeEncodeError as e:  # JSON can spell half a surrogate pair
    raise bad(
      f"{where}: field {field!r} is not valid Unicode ({e}); remove the line."
    ) from e
  return text


def _decode(
  data: bytes, where: str, place: tuple[str, int], offset: int
) -> str:
  """Returns the text of a record, of which `offset` is the first byte's."""
  file, at = place
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise BadRecord(
      f"{where} is not UTF-8: byte {data[e.start]:#04x} at offset"
      f" {offset + e.start}; convert it (iconv -t UTF-8), or narrow the glob.",
      file=file,
      at=at,
      head=data,
    ) from e
