"""Safetensors files: read by tensor, FP8 included, and written as a stream.

A file is the length of its header (8 bytes, little-endian), the header (JSON:
of each tensor its dtype, shape and place), and the tensors' bytes. A folder of
several files has an index that names the file of each tensor.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any, Final
import zlib

import ml_dtypes
import numpy as np

INDEX: Final = "model.safetensors.index.json"

DTYPES: Final = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
# A header of 100 MB is more than any model has; a larger one is no header.
_MAX_HEADER: Final = 100 * 2**20
_PIECE: Final = 2**24  # bytes that are read or written at once


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where a tensor lies."""

  file: pathlib.Path
  dtype: str
  """As the file has it: F32, BF16, F8_E4M3, ..."""
  shape: tuple[int, ...]
  begin: int
  """Place of its bytes in the file."""
  end: int

  @property
  def size(self) -> int:
    """Bytes."""
    return self.end - self.begin


class Folder:
  """The tensors of all files of a folder, each read when asked for."""

  def __init__(self, path: pathlib.Path):
    """Reads the headers, and nothing else.

    Raises:
      FileNotFoundError: There is no file, or one of the index is missing.
      ValueError: A file is cut short or none of safetensors, or the index and
        the files disagree; names file and tensor.
    """
    self.path = path
    index = path / INDEX
    if index.exists():
      where = _json(index).get("weight_map", {})
      files = sorted({path / name for name in where.values()})
    else:
      where = {}
      files = sorted(path.glob("model*.safetensors"))
    if not files:
      raise FileNotFoundError(
        f"{path} has no model.safetensors or model-*-of-*.safetensors."
      )
    numbered = re.search(r"-of-(\d+)\.safetensors$", files[0].name)
    if not where and numbered and int(numbered[1]) != len(files):
      raise FileNotFoundError(
        f"{path} has {len(files)} of the {int(numbered[1])} files of the model."
      )
    self.entries: dict[str, Entry] = {}
    for file in files:
      if not file.exists():
        named = [name for name, at in where.items() if path / at == file]
        raise FileNotFoundError(
          f"{file} is missing; {INDEX} says that it holds {named[0]} and"
          f" {len(named) - 1} more tensors."
        )
      self.entries |= _header(file)
    for name, file in where.items():
      if name not in self.entries or self.entries[name].file != path / file:
        raise ValueError(f"{path / file} has no {name}, but {INDEX} says so.")

  def read(self, name: str) -> np.ndarray:
    """The tensor of this name, in the dtype it is stored in.

    Raises:
      ValueError: There is none, its dtype is none of `DTYPES`, or the file has
        been cut short.
    """
    if name not in self.entries:
      raise ValueError(
        f"{self.path} has no tensor {name}, which the model needs."
      )
    entry = self.entries[name]
    array = np.empty(entry.shape, self.dtype(name))
    raw = array.reshape(-1).view(np.uint8)
    with open(entry.file, "rb", buffering=0) as file:
      file.seek(entry.begin)
      done = 0
      while done < raw.size and (some := file.readinto(raw[done:])):
        done += some
    if done < raw.size:
      raise ValueError(f"{entry.file} is cut short within {name}.")
    return array

  def dtype(self, name: str) -> np.dtype:
    """Storage type of a tensor.

    Raises:
      ValueError: It is none of `DTYPES`.
    """
    entry = self.entries[name]
    if entry.dtype not in DTYPES:
      raise ValueError(
        f"{name} in {entry.file} is {entry.dtype}; what is read is"
        f" {', '.join(DTYPES)}."
      )
    return DTYPES[entry.dtype]

  def same(self, one: str, other: str) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    a, b = self.entries[one], self.entries[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
      return False
    with open(a.file, "rb") as first, open(b.file, "rb") as second:
      first.seek(a.begin)
      second.seek(b.begin)
      left = a.size
      while left:
        size = min(left, _PIECE)
        if first.read(size) != second.read(size):
          return False
        left -= size
    return True


@dataclasses.dataclass(frozen=True)
class Spec:
  """A tensor that is to be written."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """Bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def write(
  file: pathlib.Path, specs: list[Spec], arrays: Iterable[np.ndarray]
) -> int:
  """Writes one file, whole or not at all.

  Args:
    file: Its bytes go to FILE.partial, which is renamed at the end.
    specs: What the arrays will be, in order.
    arrays: The tensors; taken one by one, so that one is held at a time.

  Returns:
    The CRC-32 of all that was written.

  Raises:
    OSError: It could not be written; names file and tensor.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  place = 0
  for spec in specs:
    header[spec.name] = {
      "dtype": _NAMES[spec.dtype],
      "shape": list(spec.shape),
      "data_offsets": [place, place := place + spec.size],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
  partial = file.with_name(file.name + ".partial")
  try:
    with _told(file, "the header"):
      out = open(partial, "wb", buffering=0)
    with out:
      with _told(file, "the header"):
        checksum = _put(out, len(text).to_bytes(8, "little") + text, 0)
      for spec, array in zip(specs, arrays, strict=True):
        assert (array.dtype, array.shape) == (spec.dtype, spec.shape), spec.name
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with _told(file, spec.name):
          checksum = _put(out, raw, checksum)
      with _told(file, "the end"):
        os.fsync(out.fileno())
    os.replace(partial, file)
  finally:
    partial.unlink(missing_ok=True)
  return checksum


def checksum(file: pathlib.Path) -> int:
  """The CRC-32 of a file."""
  value = 0
  with open(file, "rb", buffering=0) as opened:
    while some := opened.read(_PIECE):
      value = zlib.crc32(some, value)
  return value


@contextlib.contextmanager
def _told(file: pathlib.Path, what: str) -> Iterator[None]:
  """Names what could not be written."""
  try:
    yield
  except OSError as e:
    raise OSError(e.errno, f"{e.strerror}, at {what}", str(file)) from e


def _put(out, raw, checksum: int) -> int:
  view = memoryview(raw)
  for at in range(0, len(view), _PIECE):
    some = view[at : at + _PIECE]
    checksum = zlib.crc32(some, checksum)
    while some:  # an unbuffered write may take a part
      some = some[out.write(some) :]
  return checksum


def _header(file: pathlib.Path) -> dict[str, Entry]:
  size = file.stat().st_size
  with open(file, "rb") as opened:
    length = int.from_bytes(opened.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
      raise ValueError(f"{file} is cut short, or no safetensors file.")
    try:
      header: dict[str, Any] = json.loads(opened.read(length))
    except ValueError as e:
      raise ValueError(f"{file} has a broken header: {e}.") from e
  header.pop("__metadata__", None)
  entries = {}
  for name, entry in header.items():
    begin, end = (8 + length + x for x in entry["data_offsets"])
    if end > size:
      raise ValueError(
        f"{file} is cut short: {name} ends at byte {end:,}, the file at"
        f" {size:,}."
      )
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if dtype in DTYPES and end - begin != Spec(name, DTYPES[dtype], shape).size:
      raise ValueError(
        f"{file}: {name} is {dtype}{list(shape)}, but has {end - begin} bytes."
      )
    entries[name] = Entry(file, dtype, shape, begin, end)
  return entries


def _json(file: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except ValueError as e:
    raise ValueError(f"{file} is no JSON: {e}.") from e
