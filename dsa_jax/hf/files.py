"""Safetensors files: read by tensor, FP8 included, and written as a stream.

A folder of several files has an index that names the file of each tensor.
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

import numpy as np

from dsa_jax import json_file
from dsa_jax import ranges
from dsa_jax import regular_file
from dsa_jax.hf import header as header_lib

INDEX: Final = "model.safetensors.index.json"

_NAMES: Final = {dtype: name for name, dtype in header_lib.DTYPES.items()}
_PIECE: Final = 2**24  # bytes that are read or written at once
# Follows from config.json; some releases carry it in each layer.
_DERIVED: Final = "rotary_emb.inv_freq"
_ALONE: Final = "model.safetensors"
_PART: Final = re.compile(r"model-(\d{1,9})-of-(\d{1,9})\.safetensors")
_FILE: Final = re.compile(r"[\w-][\w. -]*\.safetensors")


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
    where = _weight_map(path)
    named = [path / file for file in sorted(set(where.values()))]
    self.entries: dict[str, header_lib.Entry] = {}
    for file in named or _numbered(path):
      if where and not file.exists():
        its = [name for name, at in where.items() if at == file.name]
        raise FileNotFoundError(
          f"{file} is missing; {INDEX} says that it holds {its[0]} and"
          f" {len(its) - 1} more tensors."
        )
      for name, entry in header_lib.read(file).items():
        if name.endswith(_DERIVED):
          continue
        if name in self.entries:
          other = self.entries[name].file
          raise ValueError(f"{name} is both in {other} and in {file}.")
        self.entries[name] = entry
    for name, file in where.items():
      if name not in self.entries or self.entries[name].file != path / file:
        raise ValueError(f"{path / file} has no {name}, but {INDEX} says so.")
    for name, entry in self.entries.items():
      if where and name not in where:
        raise ValueError(f"{entry.file} has {name}, which {INDEX} does not.")

  def read(self, name: str) -> np.ndarray:
    """The tensor of this name, in the dtype it is stored in.

    Raises:
      ValueError: There is none, its dtype is none of `header.DTYPES`, or the
        file has been cut short.
    """
    if name not in self.entries:
      raise ValueError(
        f"{self.path} has no tensor {name}, which the model needs."
      )
    entry = self.entries[name]
    array = np.empty(entry.shape, self.dtype(name))
    raw = array.reshape(-1).view(np.uint8)
    with regular_file.open_(entry.file) as file:
      file.seek(entry.begin)
      done = file.readinto(raw)
    if done < raw.size:
      raise ValueError(f"{entry.file} is cut short within {name}.")
    return array

  def dtype(self, name: str) -> np.dtype:
    """Storage type of a tensor.

    Raises:
      ValueError: It is none of `header.DTYPES`.
    """
    entry = self.entries[name]
    if entry.dtype not in header_lib.DTYPES:
      raise ValueError(
        f"{name} in {entry.file} is {entry.dtype}; what is read is"
        f" {', '.join(header_lib.DTYPES)}."
      )
    return header_lib.DTYPES[entry.dtype]

  def same(self, one: str, other: str) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    a, b = self.entries[one], self.entries[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
      return False
    open_ = regular_file.open_
    with open_(a.file) as first, open_(b.file) as second:
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
  with regular_file.open_(file) as opened:
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


def _weight_map(path: pathlib.Path) -> dict[str, str]:
  """The file of each tensor, as the index says it; none without an index.

  A name is that of a file in the folder: it leads to no other folder, though
  the file may be a link, as in the cache of Hugging Face's hub.
  """
  index = path / INDEX
  if not os.path.lexists(index):
    return {}
  where = json_file.read(index).get("weight_map")
  if not isinstance(where, dict) or not where:
    raise ValueError(f"{index}: weight_map must name the file of each tensor.")
  for name, file in where.items():
    if not header_lib.is_name(name):
      raise ValueError(f"{index}: {ranges.shown(name)} is no name of a tensor.")
    if not isinstance(file, str) or not _FILE.fullmatch(file):
      raise ValueError(
        f"{index}: weight_map puts {ranges.shown(name)} into"
        f" {ranges.shown(file)}, which is no name of a safetensors file."
      )
  if _ALONE not in where.values() and os.path.lexists(path / _ALONE):
    raise ValueError(
      f"{index} names other files than {_ALONE}, which is there, too: remove"
      " one of them."
    )
  return {k: v for k, v in where.items() if not k.endswith(_DERIVED)}


def _numbered(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder without an index."""
  files = sorted(path.glob("model*.safetensors"))
  if not files:
    raise FileNotFoundError(
      f"{path} has no {_ALONE} or model-*-of-*.safetensors."
    )
  if [file.name for file in files] == [_ALONE]:
    return files
  found = [_PART.fullmatch(file.name) for file in files]
  parts = {int(part[1]) for part in found if part}
  totals = {int(part[2]) for part in found if part}
  if len(parts) < len(files) or len(totals) > 1 or 0 in parts:
    raise ValueError(
      f"{path} has no {INDEX}, and the names of its {len(files)} safetensors"
      f" files do not say how they belong together: {files[0].name} ..."
    )
  (total,) = totals
  if len(parts) < total or max(parts) > total:
    raise FileNotFoundError(
      f"{path} has {len(files)} of the {total} files of the model."
    )
  return files
