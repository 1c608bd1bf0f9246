"""The header of a safetensors file: which tensors it holds, and where.

A file is the length of its header (8 bytes, little-endian), the header (JSON:
of each tensor its dtype, shape and place), and the tensors' bytes, one tensor
after another without a gap. A header that says anything else is refused.
"""

import dataclasses
import math
import os
import pathlib
from typing import Any, Final

import ml_dtypes
import numpy as np

from dsa_jax import json_file
from dsa_jax import ranges
from dsa_jax import regular_file

DTYPES: Final = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
# All of the 671B model in one file has 14 million; a larger one is no header.
_MAX_BYTES: Final = 2**25
_MAX_DIMS: Final = 8  # of a tensor; the models here have two


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


def read(file: pathlib.Path) -> dict[str, Entry]:
  """The tensors of a file, by name.

  Raises:
    ValueError: The file is cut short, or its header is none of safetensors;
      names the file, and the tensor.
    OSError: It is missing or unreadable.
  """
  with regular_file.open_(file) as opened:
    size = os.fstat(opened.fileno()).st_size
    length = int.from_bytes(opened.read(8), "little")
    if not 2 <= length <= min(_MAX_BYTES, size - 8):
      raise ValueError(f"{file} is cut short, or no safetensors file.")
    raw = opened.read(length)
  source = f"{file}: its broken header"
  if raw[:1] != b"{":
    raise ValueError(f"{source} does not begin with {{.")
  header = json_file.parse(raw, source)
  if not isinstance(header.pop("__metadata__", {}), dict):
    raise ValueError(f"{file}: __metadata__ in its header is no JSON object.")
  begin = 8 + length
  entries = {
    name: _entry(file, name, value, begin) for name, value in header.items()
  }
  _check_places(file, entries, begin, size)
  return entries


def is_name(name: str) -> bool:
  """Whether a tensor may have this name, and an error may show it."""
  return name.isprintable() and len(name) <= 256


def _entry(file: pathlib.Path, name: str, value: Any, begin: int) -> Entry:
  """A tensor, whose bytes are counted from `begin`."""
  wrong = f"{file} has a broken header: {ranges.shown(name)}"
  if not is_name(name):
    raise ValueError(f"{wrong} is no name of a tensor.")
  if not isinstance(value, dict) or value.keys() != {
    *("dtype", "shape", "data_offsets")
  }:
    raise ValueError(f"{wrong} must have dtype, shape and data_offsets alone.")
  dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
  if not isinstance(dtype, str) or not is_name(dtype):
    raise ValueError(f"{wrong} has dtype={ranges.shown(dtype)}.")
  if not _are_counts(shape) or len(shape) > _MAX_DIMS:
    raise ValueError(f"{wrong} has shape={ranges.shown(shape)}.")
  if not _are_counts(place) or len(place) != 2 or place[0] > place[1]:
    raise ValueError(f"{wrong} has data_offsets={ranges.shown(place)}.")
  entry = Entry(file, dtype, tuple(shape), begin + place[0], begin + place[1])
  if dtype in DTYPES:
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if entry.size != needed:
      raise ValueError(
        f"{file}: {name} is {dtype}{ranges.shown(shape)}, but has"
        f" {ranges.shown(entry.size)} bytes."
      )
  return entry


def _are_counts(values: Any) -> bool:
  return isinstance(values, list) and all(
    type(x) is int and x >= 0 for x in values
  )


def _check_places(file, entries: dict[str, Entry], place: int, size: int):
  """The tensors lie one after another, from `place` to the file's end."""
  inner = sorted(entries.items(), key=lambda x: (x[1].begin, x[1].end))
  for name, entry in inner:
    if entry.end > size:
      raise ValueError(
        f"{file} is cut short: {name} ends at byte"
        f" {ranges.shown(entry.end)}, the file at {size}."
      )
    if entry.begin != place:
      what = "overlaps" if entry.begin < place else "leaves a gap after"
      raise ValueError(f"{file}: {name} {what} the tensor before it.")
    place = entry.end
  if place != size:
    raise ValueError(f"{file} has {size - place} bytes after its last tensor.")
