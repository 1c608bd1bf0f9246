"""What a source held, so that it is known again: names, counts, checksums.

A place in the data is a number of documents in an order; it means something
only as long as each number is the same text. So a manifest travels with it.
"""

import array
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import io
import itertools
import json
import os
import pathlib
from typing import Any
import zlib

_SAMPLES = 16  # documents of a mark
_MARKS = 256  # of a manifest, which a checkpoint's metadata hold
_BLOCK = 1 << 16  # bytes, see `blocks`
_TOLD = 5  # differences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
  """What one file is known by, or several that follow one another.

  Attributes:
    name: the path of the (first) file below its source's folder.
    files: how many.
    documents: how many.
    bad: how many of them are bad records.
    digest: CRC-32 of all that is known of their text.
    samples: CRC-32 of some documents from all over them; None is a bad one.
      Of Parquet, no document is read when it is opened: there are none.
  """

  name: str = ""
  files: int = 1
  documents: int
  bad: int = 0
  digest: int
  samples: tuple[int | None, ...] = ()

  def __str__(self) -> str:
    after = self.files - 1
    return self.name + f", or one of the {after} after it," * (after > 0)


class Tally:
  """Adds documents up to a mark. Memory: 8 bytes a document."""

  def __init__(self):
    self._sums = array.array("q")

  def add(self, text: str) -> None:
    self._sums.append(zlib.crc32(text.encode()))

  def add_bad(self) -> None:
    self._sums.append(-1)

  def mark(self) -> Mark:
    sums = self._sums
    count = len(sums)
    taken = min(count, _SAMPLES)
    places = (i * (count - 1) // max(taken - 1, 1) for i in range(taken))
    return Mark(
      documents=count,
      bad=sums.count(-1),
      digest=zlib.crc32(sums.tobytes()),
      samples=tuple(None if sums[i] < 0 else sums[i] for i in places),
    )


def of_tokenizer(name: str, eos_id: int) -> int:
  """Returns the CRC-32 of a tokenizer that was loaded: of what its file says.

  Args:
    name: "bytes", or the path of a tokenizer.json.
    eos_id: its file need not say it.
  """
  file = {} if name == "bytes" else json.loads(pathlib.Path(name).read_bytes())
  return zlib.crc32(json.dumps([file, eos_id], sort_keys=True).encode())


def unknown(documents: int) -> Mark:
  """Returns the mark of so many documents, all of them bad."""
  samples = (None,) * min(documents, _SAMPLES)
  return Mark(documents=documents, bad=documents, digest=0, samples=samples)


def blocks(file: io.BufferedReader) -> int:
  """Returns the CRC-32 of a file's size, and of blocks from all over it."""
  size = file.seek(0, os.SEEK_END)
  total = zlib.crc32(b"%d" % size)
  last = max(size - _BLOCK, 0)
  # The third is anywhere, but at the same place in files of the same size.
  for at in sorted({0, last // 2, total % (last + 1), last}):
    file.seek(at)
    total = zlib.crc32(file.read(_BLOCK), total)
  return total


def condense(marks: Sequence[Mark]) -> list[Mark]:
  """Returns marks that are not too many, each of files that follow another."""
  size = -(-len(marks) // _MARKS)
  return [_together(group) for group in itertools.batched(marks, max(size, 1))]


def _together(marks: Sequence[Mark]) -> Mark:
  if len(marks) == 1:
    return marks[0]
  samples = [sample for mark in marks for sample in mark.samples]
  names = "".join(f"{mark.name}\n{mark.digest}\n" for mark in marks)
  return Mark(
    name=marks[0].name,
    files=len(marks),
    documents=sum(mark.documents for mark in marks),
    bad=sum(mark.bad for mark in marks),
    digest=zlib.crc32(names.encode(errors="surrogateescape")),
    samples=tuple(samples[:: -(-len(samples) // _SAMPLES)] if samples else ()),
  )


def to_json(marks: Iterable[Mark]) -> list[list[Any]]:
  return [[*dataclasses.asdict(mark).values()] for mark in marks]


def from_json(values: list[list[Any]]) -> list[Mark]:
  names = [field.name for field in dataclasses.fields(Mark)]
  marks = []
  for each in values:
    known = dict(zip(names, each, strict=True))
    marks.append(Mark(**known | {"samples": tuple(known["samples"])}))
  return marks


def differences(saved: Sequence[Mark], found: Sequence[Mark]) -> list[str]:
  """Says what is not as it was; of much, the first.

  A record that was bad, or has become so, makes no difference; what is as bad
  as it was is told from other text by all that is known.
  """
  before = {mark.name: mark for mark in saved}
  after = {mark.name: mark for mark in found}
  gone = [mark for mark in saved if mark.name not in after]
  new = [mark for mark in found if mark.name not in before]
  told = []
  for mark in gone:
    same = [x for x in new if (x.documents, x.digest) == _key(mark)]
    if same:
      new.remove(same[0])
      told.append(f"{mark} is called {same[0]} now")
    else:
      told.append(f"{mark} is gone")
  told += [f"{mark} is new" for mark in new]
  told += [
    _how(before[mark.name], mark)
    for mark in found
    if mark.name in before and not _alike(before[mark.name], mark)
  ]
  more = len(told) - _TOLD
  return told[:_TOLD] + [f"{more} more"] * (more > 0)


def _key(mark: Mark) -> tuple[int, int]:
  return mark.documents, mark.digest


def _alike(saved: Mark, found: Mark) -> bool:
  if (saved.files, saved.documents) != (found.files, found.documents):
    return False
  if saved.digest == found.digest:
    return True
  pairs = zip(saved.samples, found.samples)
  known = [x == y for x, y in pairs if None not in (x, y)]
  return saved.bad != found.bad and all(known)


def _how(saved: Mark, found: Mark) -> str:
  if saved.files != found.files:
    return f"{found} is one of {found.files} files, was one of {saved.files}"
  if saved.documents != found.documents:
    return f"{found} has {found.documents} documents, had {saved.documents}"
  return f"{found} holds other text"
