"""Parquet files: a row is a document."""

import collections
import dataclasses
import functools
import os
import threading
from typing import Any
import zlib

from train.data import content as content_lib
from train.data import documents as documents_lib
from train.data import manifest
from train.data import records

DataError = documents_lib.DataError
BadRecord = documents_lib.BadRecord

# Of a row group's text, decoded: no document can be had without all of it.
_GROUP_BYTES = 1 << 31
_CACHED_BYTES, _CACHED_GROUPS = 1 << 31, 8
_FEWEST, _MOST = 16, 1024  # rows that are decoded at a time

_SMALLER = (
  "all of which is decoded to read a document; write it with"
  " row_group_size=1000."
)


@dataclasses.dataclass(frozen=True)
class _Column:
  """The column that holds the text, of one row group.

  Attributes:
    rows: how many it has.
    bytes: its size, unpacked; a text that comes again may take none.
    empty: whether every row is null, as its statistics say.
    mark: a checksum of all that.
  """

  rows: int
  bytes: int
  empty: bool
  mark: int


def open_row_groups(
  content: content_lib.Content, field: records.Field
) -> tuple[list[documents_lib.File], manifest.Mark]:
  """Opens a Parquet file, of which the metadata are read.

  Row groups of nothing but nulls are left out.

  Raises:
    DataError: pyarrow is missing.
    BadRecord: it is not Parquet, or has no such column of strings, or too much
      text in a row group.
  """
  path = content.path
  try:
    import pyarrow  # noqa: F401
  except ImportError as e:
    raise DataError(
      f'{path} needs the package `pyarrow`: pip install "dsa-jax[parquet]", or'
      " convert it to JSON lines."
    ) from e
  try:
    metadata = _metadata(content)
    schema = metadata.schema.to_arrow_schema()
    strings = [each.name for each in schema if _is_text(each.type)]
    strings = [name for name in strings if schema.names.count(name) == 1]
    known = field.name in strings
    columns = _columns(metadata, field.name) if known else []
  # Thrift, schemas, encryption: a broken footer may say anything.
  except Exception as e:
    raise BadRecord(
      f"{path} is not Parquet, or damaged ({type(e).__name__}: {e}); convert"
      " it, or narrow the glob.",
      file=str(path),
    ) from e
  if not known:
    raise BadRecord(
      f"{path} has no column {field.name!r} of strings; give {field.option} one"
      f" of {records.shown(strings)}, of all columns"
      f" {records.shown(schema.names)}.",
      file=str(path),
      records=max(metadata.num_rows, 1),
    )
  largest = max((column.bytes for column in columns), default=0)
  if largest > _GROUP_BYTES:
    raise BadRecord(
      f"{path} has a row group with {largest:,} bytes of text, {_SMALLER}",
      file=str(path),
      records=metadata.num_rows,
    )
  groups, first = [], 0
  with content.open() as file:
    total = manifest.blocks(file)
  for group, column in enumerate(columns):
    if not column.empty:
      groups.append(_RowGroup(content, field.name, group, first, column.rows))
    first += column.rows
    total = zlib.crc32(b"%d" % column.mark, total)
  rows = sum(map(len, groups))
  return groups, manifest.Mark(documents=rows, digest=total)


def _is_text(kind: Any) -> bool:
  import pyarrow as pa

  if pa.types.is_dictionary(kind):  # categories
    kind = kind.value_type
  return kind in (pa.string(), pa.large_string(), pa.string_view())


def _columns(metadata: Any, name: str) -> list[_Column]:
  """Returns a column's part in each row group.

  Raises:
    ValueError: their sizes do not agree, or there are two.
  """
  paths = [each.path for each in metadata.schema]
  if paths.count(name) > 1:
    raise ValueError(f"{name} stands for two columns")
  index, columns = paths.index(name), []
  for group in range(metadata.num_row_groups):
    part = metadata.row_group(group)
    chunk = part.column(index)
    if not 0 <= part.num_rows == chunk.num_values:
      raise ValueError(f"{chunk.num_values} values in {part.num_rows} rows")
    known = chunk.statistics
    nulls = known.null_count if known and known.has_null_count else 0
    ends = (known.min_raw, known.max_raw) if known and known.has_min_max else ()
    facts = part.num_rows, chunk.total_uncompressed_size, nulls, ends
    columns.append(
      _Column(
        rows=part.num_rows,
        bytes=chunk.total_uncompressed_size,
        empty=nulls == part.num_rows,
        mark=zlib.crc32(repr(facts).encode()),
      )
    )
  if metadata.num_rows != sum(column.rows for column in columns):
    raise ValueError(f"{metadata.num_rows} rows, but other numbers in groups")
  return columns


class _RowGroup:
  """One document a row; a null is an empty text.

  Reading one decodes the whole group's column, and shuffled reads seldom meet a
  group again soon: groups should be small (100 rows), or be JSON lines.
  """

  def __init__(
    self,
    content: content_lib.Content,
    column: str,
    group: int,
    first: int,
    rows: int,
  ):
    self._content, self._column, self._group = content, column, group
    self._first, self._rows = first, rows
    self._too_large = False

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, index: int) -> str:
    file, at = self.place(index)
    column = None
    if not self._too_large:
      column = _decoded(self._content, self._column, self._group)
    if column is None:  # of which its size in the file says nothing
      self._too_large = True
      raise BadRecord(
        f"{file}, row {at}, is in a row group with more than"
        f" {_GROUP_BYTES:,} bytes of text, {_SMALLER}",
        file=file,
        at=at,
      )
    try:
      return column[index].as_py() or ""
    except UnicodeDecodeError as e:
      raise BadRecord(
        f"{file}, row {at}, is not UTF-8 ({e}); write it anew.",
        file=file,
        at=at,
      ) from e

  def place(self, index: int) -> tuple[str, int]:
    return str(self._content.path), self._first + index


def _source(content: content_lib.Content) -> Any:
  """Returns what pyarrow reads a file from."""
  import pyarrow as pa

  if content.spool is None:
    return pa.OSFile(os.fsencode(content.path))
  return pa.PythonFile(content.open(), "r")


@functools.lru_cache(maxsize=64)  # files; 64 footers are some 64 MB
def _metadata(content: content_lib.Content) -> Any:
  from pyarrow import parquet

  with _source(content) as source:
    return parquet.read_metadata(source)


# The columns of row groups that were read last, the oldest first.
_cache: collections.OrderedDict[Any, Any] = collections.OrderedDict()
_caching = threading.Lock()


@functools.lru_cache(maxsize=1024)
def _turn(*key: Any) -> threading.Lock:
  """Returns a lock: of many threads that want a group, one decodes it."""
  del key
  return threading.Lock()


def _decoded(content: content_lib.Content, column: str, group: int) -> Any:
  """Returns a row group's texts; None if they are too large."""
  from pyarrow import parquet

  key = (content, column, group)
  with _turn(*key):
    with _caching:
      if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    with (
      _source(content) as source,
      parquet.ParquetFile(source, metadata=_metadata(content)) as file,
    ):
      found = _decode(file, column, group)
    if found is None:
      return None
    with _caching:
      _cache[key] = found
      while len(_cache) > 1 and (
        len(_cache) > _CACHED_GROUPS
        or sum(each.nbytes for each in _cache.values()) > _CACHED_BYTES
      ):
        _cache.popitem(last=False)
    return found


def _decode(file: Any, column: str, group: int) -> Any:
  """Like `_decoded`, of an open file: stops where it has become too large."""
  import pyarrow as pa

  if pa.types.is_dictionary(file.schema_arrow.field(column).type):
    # Categories are as large as they are in the file.
    return file.read_row_group(group, columns=[column])[column]
  # No text is larger than all of them are in the file.
  index = [each.path for each in file.metadata.schema].index(column)
  part = file.metadata.row_group(group).column(index)
  rows = _GROUP_BYTES // max(part.total_uncompressed_size, 1)
  rows = min(max(rows, _FEWEST), _MOST)
  found, size = [], 0
  for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
    found.append(batch[column])
    size += batch.nbytes
    if size > _GROUP_BYTES:
      return None
  return pa.chunked_array(found)
