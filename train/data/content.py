"""The bytes of files: where they lie, or unpacked where they are compressed."""

import bz2
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import gzip
import io
import lzma
import os
import pathlib
import stat
import tempfile
from typing import Any, BinaryIO
import weakref
import zlib

from train.data import documents as documents_lib

DataError = documents_lib.DataError
BadRecord = documents_lib.BadRecord

_UNPACKERS = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}
_ZSTD = (".zst", ".zstd")  # read by pyarrow
_PACKED = (".gz", *_UNPACKERS, *_ZSTD)
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Content:
  """What a file holds, after it is unpacked.

  Attributes:
    path: of the file.
    stamp: its size and time, by which caches know it from an older one there.
    spool: where it lies unpacked; None where it was not compressed.
    span: its first byte in the spool, and the one after its last.
  """

  path: pathlib.Path
  stamp: tuple[int, int]
  spool: "Spool | None" = None
  span: tuple[int, int] = (0, 0)

  def open(self) -> io.BufferedReader:
    """Returns a reader of its own: threads may have one each."""
    if self.spool is None:
      return self.path.open("rb")
    return io.BufferedReader(_Span(self.spool.fileno(), *self.span))


class Spool:
  """One temporary file, without a name, of all that a source has unpacked.

  A document in the middle of a compressed file can be had no other way than by
  unpacking what is before it. Takes the room of the unpacked files, in the
  folder TMPDIR, and a file handle; both go with the process.
  """

  def __init__(self):
    self._file: io.BufferedRandom | None = None

  def fileno(self) -> int:
    assert self._file is not None
    return self._file.fileno()

  def add(self, path: pathlib.Path) -> tuple[int, int]:
    """Unpacks a file; returns its span.

    Raises:
      BadRecord: it is not compressed as its suffix says, or cut off.
      DataError: there is no room, or a package is missing.
    """
    if self._file is None:
      try:
        self._file = tempfile.TemporaryFile(prefix="unpacked-")
        weakref.finalize(self, self._file.close)
      except OSError as e:
        raise DataError(_no_room(path, e)) from e
    begin = self._file.seek(0, os.SEEK_END)
    for chunk in _unpack(path):
      try:
        self._file.write(chunk)
        self._file.flush()
      except OSError as e:
        raise DataError(_no_room(path, e)) from e
    return begin, self._file.tell()


def suffixes(path: pathlib.Path) -> tuple[str, str]:
  """Returns a file's suffix and that of its compression, in small letters."""
  *_, before, last = ("", "", *(s.lower() for s in path.suffixes))
  return (before, last) if last in _PACKED else (last, "")


def open_content(path: pathlib.Path, spool: Spool) -> Content:
  """Returns a file's content; one that is compressed is unpacked now.

  Raises:
    OSError: it cannot be read.
    BadRecord: it is no file, or not compressed as its suffix says.
    DataError: see `Spool.add`.
  """
  found = path.stat()
  if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
    raise BadRecord(
      f"{path} is no regular file; narrow the glob.", file=str(path)
    )
  stamp = found.st_size, found.st_mtime_ns
  if not suffixes(path)[1]:
    return Content(path, stamp)
  return Content(path, stamp, spool, spool.add(path))


def _unpack(path: pathlib.Path) -> Iterator[bytes]:
  packed = suffixes(path)[1]
  try:
    with path.open("rb") as file:
      # Read as one of no parts, it would be what a copy that failed leaves.
      if not file.peek(1):
        raise EOFError("it is empty, as nothing that is packed is")
      if packed in _UNPACKERS:
        yield from _parts(file, _UNPACKERS[packed])
      else:
        with contextlib.closing(_reader(file, packed)) as reader:
          while chunk := reader.read(_CHUNK):
            yield chunk
  except ImportError as e:
    raise DataError(
      f'{path} needs the package `pyarrow`: pip install "dsa-jax[parquet]", or'
      " unpack it."
    ) from e
  # What the four raise for bytes that are not theirs.
  except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as e:
    raise BadRecord(
      f"{path} cannot be unpacked ({type(e).__name__}: {e}): it is cut off,"
      " damaged, or not compressed as its suffix says. Write it anew, or narrow"
      " the glob.",
      file=str(path),
    ) from e


def _parts(file: BinaryIO, make: Callable[[], Any]) -> Iterator[bytes]:
  """Unpacks parts that follow one another, zeros between them or after them.

  Raises:
    OSError, EOFError, lzma.LZMAError: there is anything else. (`bz2.open` and
      `lzma.open` end without a word at what begins no part.)
  """
  data = file.read(_CHUNK)
  while data:
    part = make()
    while not part.eof:
      yield part.decompress(data, _CHUNK)
      data = b""
      if part.needs_input and not (data := file.read(_CHUNK)):
        raise EOFError("it ends in the middle")
    data = part.unused_data.lstrip(b"\0")
    while not data and (more := file.read(_CHUNK)):
      data = more.lstrip(b"\0")


def _reader(file: BinaryIO, packed: str) -> Any:
  if packed == ".gz":
    return gzip.open(file, "rb")
  import pyarrow as pa

  return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")


def _no_room(path: pathlib.Path, why: OSError) -> str:
  return (
    f"{path} cannot be unpacked ({why}): set TMPDIR to a folder with room for"
    " all that is compressed, or unpack it where it is."
  )


class _Span(io.RawIOBase):
  """Part of a file that many read at once."""

  def __init__(self, file: int, begin: int, end: int):
    self._file, self._begin, self._end = file, begin, end
    self._at = begin

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    count = min(len(buffer), max(self._end - self._at, 0))
    data = os.pread(self._file, count, self._at)
    buffer[: len(data)] = data
    self._at += len(data)
    return len(data)

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    bases = {
      os.SEEK_SET: self._begin,
      os.SEEK_CUR: self._at,
      os.SEEK_END: self._end,
    }
    self._at = max(bases[whence] + offset, self._begin)
    return self._at - self._begin

  def tell(self) -> int:
    return self._at - self._begin
