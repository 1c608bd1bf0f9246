"""What a checkpoint says of itself, under a CRC-32.

It lies in the metadata that Orbax writes beside the arrays.
"""

import dataclasses
import json
import pathlib
from typing import Any, Final
import zlib

import jax
import numpy as np

from train.host import json_files
from train.run import fingerprint

_FILE: Final = "_CHECKPOINT_METADATA"  # Orbax's; has what is ours as a part


class Broken(OSError):
  """A checkpoint is not what was saved; says which one, and why."""


def reason(e: Exception) -> str:
  """What an error says, on one line."""
  return next(iter(str(e).splitlines()), type(e).__name__)


@dataclasses.dataclass(frozen=True)
class SavedArray:
  """An array as it was when it was saved."""

  dtype: str
  shape: list[int]
  marks: str
  """The fingerprint of each of its parts, as 8 hexadecimal digits."""

  def mark(self, part: int) -> int:
    """Fingerprint of one part, by its number in C order."""
    return int(self.marks[8 * part : 8 * part + 8], 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """All that a checkpoint holds besides its arrays."""

  arrays: dict[str, SavedArray]
  """By name, as `fingerprint.name` has it."""
  model: dict[str, Any]
  """What the parameters are those of, see `ModelConfig.to_dict`."""
  progress: str | None = None
  """Of a run, as JSON."""
  bits_per_byte: float | None = None
  """Of held-out text, where it was measured after this step."""
  files: dict[str, int] = dataclasses.field(default_factory=dict)
  """CRC-32 of the files that a conversion keeps beside the parameters."""

  def sealed(self) -> dict[str, Any]:
    """Values for Orbax to write."""
    values = dataclasses.asdict(self)
    return values | {"crc32": _checksum(values)}


def saved_arrays(tree: Any) -> dict[str, SavedArray]:
  """Describes the arrays of a tree by name; all processes call it."""
  marks = fingerprint.of(tree)
  return {
    name: saved_array(x.dtype, x.shape, marks[name])
    for name, x in (
      (fingerprint.name(path), x)
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
    )
  }


def saved_array(dtype: Any, shape: Any, marks: np.ndarray) -> SavedArray:
  """Describes an array of this dtype, shape and fingerprint."""
  digits = "".join(f"{int(mark):08x}" for mark in marks.reshape(-1))
  return SavedArray(np.dtype(dtype).name, [*shape], digits)


def read(checkpoint: pathlib.Path) -> Record:
  """The record in a checkpoint's folder.

  Raises:
    Broken: There is none, or it is not what was written.
  """
  try:
    values = dict(json_files.read(checkpoint / _FILE)["custom_metadata"])
    if values.pop("crc32", None) != _checksum(values):
      raise ValueError(
        "its metadata are damaged, or have no CRC-32 yet (of an older version)"
      )
    arrays = {k: SavedArray(**x) for k, x in values.pop("arrays").items()}
    return Record(arrays=arrays, **values)
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    why = str(e) if isinstance(e, ValueError) else f"{_FILE} lacks parts: {e!r}"
    raise Broken(f"{checkpoint}: {why}") from e


def _checksum(values: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())
