"""Collections of documents with random access: a document is one string."""

import bisect
from collections.abc import Sequence
import itertools
from typing import Protocol, runtime_checkable
import zlib

import grain
from jaxtyping import UInt32
import numpy as np

from train.data import manifest

_LOOKED_AT = 1000  # documents, for one that has text

type Texts = grain.sources.RandomAccessDataSource[str]


class DataError(ValueError):
  """The data, or what was said of them, cannot be used; says what to do.

  In one line that can be printed, whatever a library or a path puts into it.
  """

  def __init__(self, message: str):
    super().__init__(
      "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    )


class BadRecord(DataError):
  """A record, or a file, that holds no document.

  Attributes:
    file: its path, or the name of a dataset.
    at: where in it: the byte where it begins (JSON), or its number from 0 (all
      others).
    head: its first bytes; none where they cannot be told.
    records: how many are lost by it.
  """

  def __init__(
    self,
    message: str,
    *,
    file: str,
    at: int = 0,
    head: bytes = b"",
    records: int = 1,
  ):
    super().__init__(message)
    self.file, self.at, self.records = file, at, records
    self.head = head[:64]


@runtime_checkable  # for tests, which check signatures
class File(Protocol):
  """The documents of one file."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> str:
    """Returns a document; raises whatever its reader does if it cannot."""
    ...

  def place(self, index: int) -> tuple[str, int]:
    """Returns file and place of a document, as a `BadRecord` names them."""
    ...


class Documents:
  """The documents of several files, one after the other.

  Attributes:
    num_bytes: size of the files, as they are on disk.
    marks: what they are known by, see `manifest.py`.
  """

  def __init__(
    self,
    files: Sequence[File],
    num_bytes: int,
    marks: Sequence[manifest.Mark],
  ):
    self.marks = tuple(marks)
    self._files = files
    self._ends = list(itertools.accumulate(map(len, files)))
    self.num_bytes = num_bytes

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> str:
    """Returns document `index` of [0, len); some may be empty."""
    file, i = self._find(index)
    return file[i]

  def place(self, index: int) -> tuple[str, int]:
    """Returns file and place of a document, as a `BadRecord` names them."""
    file, i = self._find(index)
    return file.place(i)

  def _find(self, index: int) -> tuple[File, int]:
    if not 0 <= index < len(self):
      raise IndexError(f"{index=} is not in [0, {len(self)}).")
    file = bisect.bisect_right(self._ends, index)
    return self._files[file], index - (self._ends[file - 1] if file else 0)


class Subset:
  """The documents at `indices`, int [len], of a collection."""

  def __init__(self, documents: Texts, indices: np.ndarray):
    self._documents, self._indices = documents, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> str:
    return self._documents[int(self._indices[index])]


def has_text(documents: Texts) -> bool:
  """Whether some document is not empty; of very many, some are looked at."""
  count = len(documents)
  places = np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(int)
  return any(documents[int(place)] for place in places)


def split(
  documents: Texts, fraction: float, name: str
) -> tuple[Subset, Subset]:
  """Returns the documents to train on, and the `fraction` to hold out.

  Of a source, called `name` in errors.

  A document's side hangs on its index alone: it stays when documents are added
  after it (unless there are so few that a side would have none).

  Raises:
    DataError: a side would have no text.
  """
  if len(documents) < 2:
    raise DataError(
      f"Source {name!r}: {len(documents)} document is too few: it takes one to"
      " train on and one to hold out. Cut it into several files, or into JSON"
      " lines."
    )
  hashes = _hashes(len(documents))
  held = hashes < fraction * 2**32
  held[hashes.argmin()], held[hashes.argmax()] = True, False
  sides = [Subset(documents, np.flatnonzero(side)) for side in (~held, held)]
  for side in sides:
    # Parquet may hold empty rows; with nothing else, packing would never end.
    if not has_text(side):
      looked = min(len(side), _LOOKED_AT)
      raise DataError(
        f"Source {name!r}: {len(side)} of {len(documents)} documents make one"
        f" side of the held-out split, and the {looked} looked at are all"
        " empty; remove the empty ones."
      )
  return sides[0], sides[1]


def _hashes(count: int) -> UInt32[np.ndarray, " N"]:
  """Returns the CRC-32 of each number below `count`, as text."""
  ones = 2**32 - 1
  table = [zlib.crc32(bytes([byte]), ones) ^ ones for byte in range(256)]
  table = np.array(table, np.uint32)
  digits = np.frombuffer(b"0123456789", np.uint8)

  def append(states, digits):
    bytes_ = np.tile(digits, len(states))
    states = np.repeat(states, len(digits))
    return table[states.astype(np.uint8) ^ bytes_] ^ states >> 8

  # Of all numbers of so many digits: each goes on from its first ones.
  start = np.array([ones], np.uint32)
  parts = [append(start, digits[:1]), append(start, digits[1:])]
  while (left := count - sum(map(len, parts))) > 0:
    parts.append(append(parts[-1][: -(-left // 10)], digits))
  return ~np.concatenate(parts)[:count]
