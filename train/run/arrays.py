"""The arrays of a checkpoint on disk: who reads them finds what was saved.

Orbax reads and writes whole arrays, of which one here may be larger than the
host's memory: all layers' experts. TensorStore, on which it builds, does parts.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import json
import math
import os
import pathlib
import shutil
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import tensorstore as ts

from dsa_jax import config as config_lib
from dsa_jax.hf import save
from dsa_jax.hf import tensors as tensors_lib
from train.host import atomic_files
from train.host import json_files
from train.host import processes
from train.run import fingerprint
from train.run import record as record_lib

# Larger parts are cut along their first dimension.
CHUNK_BYTES: Final = 64 * 2**20
# How Orbax lays out one file a chunk, so that parts can be written apart.
_LAYOUT: Final = {"use_ocdbt": False, "use_zarr3": True}
_CODECS: Final = (
  {"name": "bytes", "configuration": {"endian": "little"}},
  {"name": "crc32c"},  # checked whenever a chunk is read
)

# What a damaged file ends in: errors of TensorStore, of JSON, and of what is
# not in it.
_DAMAGES: Final = (
  *(ValueError, TypeError, LookupError),
  *(OSError, NotImplementedError),
)


class Arrays:
  """The arrays of a finished checkpoint. What is read is what was saved.

  Attributes:
    record: What the checkpoint holds besides.
  """

  def __init__(self, path: pathlib.Path):
    """Opens `path`, a checkpoint with a "state".

    Raises:
      Broken: It is none, or its record is not what was saved.
    """
    self._path, self._state = path, path / "state"
    self.record = record_lib.read(path)
    self._context = ts.Context({"cache_pool": {"total_bytes_limit": 2**28}})
    self._open: dict[str, Any] = {}

  @property
  def config(self) -> config_lib.ModelConfig:
    """The model whose parameters these are."""
    return config_lib.ModelConfig.from_dict(self.record.model)

  def load[Tree](self, like: Tree) -> Tree:
    """All arrays of a tree, or of a part of it; all processes call it.

    They are read in the dtype that they have there, compared, and cast one
    by one: until then the devices hold them in that dtype.

    Args:
      like: Their shapes, dtypes and shardings.

    Raises:
      Broken: One is missing, cannot be read, or is not what was saved; the same
        in all processes.
    """
    saved = self.record.arrays
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    names = [fingerprint.name(path) for path, _ in leaves]
    loaded: list[jax.Array] = []
    try:
      for name, (_, x) in zip(names, leaves):
        loaded.append(self._on_devices(name, x))
      why = None
    # Not what devices raise: memory that runs out is no damage.
    except _DAMAGES as e:
      why = f"{type(e).__name__}: {record_lib.reason(e)}"
    if not processes.all_agree(why is None):
      why = why or "another process cannot read it"
      raise record_lib.Broken(f"{self._path}: {why}")
    found = record_lib.saved_arrays(tree.unflatten(loaded))
    for name in names:
      if found[name] != saved[name]:
        raise record_lib.Broken(f"{self._path}: {name} is not what was saved")
    for i, (_, to) in enumerate(leaves):
      loaded[i] = loaded[i].astype(to.dtype)
    return tree.unflatten(loaded)

  def read(self, place: tensors_lib.Place) -> np.ndarray:
    """A part of a parameter.

    Raises:
      Broken: It cannot be read, or is not what was saved; names it.
    """
    with _told(self._state, place):
      name = _stored_name(place.leaf)
      part = self._array(name)[place.index].read().result()
      saved = self.record.arrays[name]
      number = _number(place.index, saved.shape)
      if fingerprint.of_part(part) != saved.mark(number):
        raise ValueError("it is not what was saved")
    return part

  def _on_devices(self, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array as it was saved, each device's part read for itself."""
    array = self._array(name)
    if array.shape != like.shape:
      raise ValueError(f"{name} is {[*array.shape]} there")
    read = lambda index: array[index].read().result()
    return jax.make_array_from_callback(like.shape, like.sharding, read)

  def _array(self, name: str) -> Any:
    if name in self._open:
      return self._open[name]
    tree = json_files.read(self._state / "_METADATA")
    folder = {"driver": "file", "path": f"{self._state}/{name}/"}
    if tree["use_ocdbt"]:
      base = {"driver": "file", "path": f"{self._state}/"}
      folder = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    array = ts.open(
      {"driver": "zarr3" if tree["use_zarr3"] else "zarr", "kvstore": folder},
      context=self._context,
      read=True,
    ).result()
    saved = self.record.arrays[name]
    if ([*array.shape], array.dtype.name) != (saved.shape, saved.dtype):
      raise ValueError(f"{name} is {array.dtype.name}{[*array.shape]} there")
    self._open[name] = array
    return array


class NewArrays:
  """The parameters of a checkpoint that is being written.

  They lie in PATH.partial, which becomes PATH when they are all there.
  """

  def __init__(
    self, path: pathlib.Path, leaves: dict[str, jax.ShapeDtypeStruct]
  ):
    """Opens `path` for parameters of these shapes and dtypes.

    Raises:
      Damaged: What was noted of parts that are there already cannot be read.
    """
    self._target, self._leaves = path, leaves
    self._path = path.with_name(path.name + ".partial")
    self._notes = path.with_name(path.name + ".fingerprints.json")
    self._open: dict[str, Any] = {}
    # Of each parameter's parts; those that are not there yet have none.
    self._marks: dict[str, list[int | None]] = {
      leaf: [None] * math.prod(x.shape[: tensors_lib.stacked(leaf)])
      for leaf, x in leaves.items()
    }
    if self._notes.exists():
      noted = json_files.read(self._notes)
      if not _fits(noted, self._marks):
        raise json_files.Damaged(
          f"{self._notes} is not what was noted: delete "
          f"{self._notes.parents[1]}, and convert anew."
        )
      self._marks = noted

  def write(self, place: tensors_lib.Place, part: np.ndarray) -> None:
    """Writes a part of a parameter, reads it again, and compares.

    Raises:
      OSError: It is not on the disk as it was given; names the parameter.
    """
    array = self._array(place.leaf)[place.index]
    part = save.in_order(part.astype(array.dtype.numpy_dtype, copy=False))
    with _told(self._path, place):
      array.write(part, can_reference_source_data_indefinitely=True).result()
      again = array.read().result()
    if not np.array_equal(_bits(again), _bits(part)):
      raise OSError(f"{self._path}: {place.leaf} is not what was written.")
    number = _number(place.index, self._leaves[place.leaf].shape)
    self._marks[place.leaf][number] = fingerprint.of_part(part)

  def sync(self) -> None:
    """Returns when all that was written is on the disk."""
    os.sync()
    atomic_files.write(self._notes, json.dumps(self._marks))

  def finish(self, model: config_lib.ModelConfig, kept: dict[str, int]) -> None:
    """Makes it a checkpoint with a "state" of parameters and router biases.

    Args:
      model: Whose parameters they are.
      kept: CRC-32 of the files that are kept beside them.
    """
    if not self._target.exists():
      around = self._path.with_name(self._path.name + ".around")
      self._write_around(around, self._record(model, kept))
      for entry in [*(around / "state").iterdir(), *around.iterdir()]:
        to = self._path / entry.relative_to(around)
        if not to.exists():
          os.rename(entry, to)
      shutil.rmtree(around)
      self.sync()
      self._path.rename(self._target)
    self._notes.unlink(missing_ok=True)

  def _record(
    self, model: config_lib.ModelConfig, kept: dict[str, int]
  ) -> record_lib.Record:
    arrays = {}
    for leaf, like in self._leaves.items():
      if None in self._marks[leaf]:
        raise ValueError(
          f"{self._notes} lacks a part of {leaf}, as of an older version: "
          f"delete {self._notes.parents[1]}, and convert anew."
        )
      marks = np.array(self._marks[leaf], np.uint32)
      arrays[_stored_name(leaf)] = record_lib.saved_array(
        like.dtype, like.shape, marks
      )
    return record_lib.Record(arrays=arrays, model=model.to_dict(), files=kept)

  def _write_around(
    self, around: pathlib.Path, record: record_lib.Record
  ) -> None:
    """Orbax writes what goes around the arrays, for a tree of small ones."""
    shutil.rmtree(around, ignore_errors=True)
    tree: dict[str, Any] = {}
    for leaf, like in self._leaves.items():
      *inner, last = _stored_name(leaf).split(".")
      branch = tree
      for key in inner:
        branch = branch.setdefault(key, {})
      branch[last] = jnp.zeros((1,) * len(like.shape), like.dtype)
    context = ocp.Context()
    for option, value in _LAYOUT.items():
      setattr(context.array_options.saving, option, value)
    context.array_options.saving.array_metadata_store = None
    with context:
      ocp.save_checkpointables(
        str(around), {"state": tree}, custom_metadata=record.sealed()
      )
    file = around / "state" / "_METADATA"
    metadata = json_files.read(file)
    for entry in metadata["tree_metadata"].values():
      keys = [key["key"] for key in entry["key_metadata"]]
      leaf = _leaf_name(".".join(keys))
      entry["value_metadata"]["write_shape"] = self._chunk(leaf)
    atomic_files.write(file, json.dumps(metadata))

  def _array(self, leaf: str) -> Any:
    if leaf not in self._open:
      like = self._leaves[leaf]
      file = f"{self._path}/state/{_stored_name(leaf)}/"
      grid = {"name": "regular"} | {
        "configuration": {"chunk_shape": self._chunk(leaf)}
      }
      self._open[leaf] = ts.open(
        {
          "driver": "zarr3",
          "kvstore": {"driver": "file", "path": file},
          "context": {"file_io_sync": False},  # `sync` does it for many
          "metadata": {
            "shape": list(like.shape),
            "data_type": jnp.dtype(like.dtype).name,
            "chunk_grid": grid,
            "codecs": list(_CODECS),
          },
          "store_data_equal_to_fill_value": True,  # Orbax wants every chunk
        },
        open=True,
        create=True,
      ).result()
    return self._open[leaf]

  def _chunk(self, leaf: str) -> list[int]:
    """A layer's part, an expert's, or less of it."""
    like = self._leaves[leaf]
    stacked = tensors_lib.stacked(leaf)
    rows, *rest = like.shape[stacked:]
    row = math.prod(rest) * jnp.dtype(like.dtype).itemsize
    return [1] * stacked + [min(rows, max(1, CHUNK_BYTES // row)), *rest]


def _fits(noted: Any, marks: dict[str, list[int | None]]) -> bool:
  """Whether something is a mark, or None, for each part of each parameter."""
  if not isinstance(noted, dict) or noted.keys() != marks.keys():
    return False
  is_mark = lambda x: x is None or type(x) is int and 0 <= x < 2**32
  return all(
    isinstance(noted[leaf], list)
    and len(noted[leaf]) == len(parts)
    and all(map(is_mark, noted[leaf]))
    for leaf, parts in marks.items()
  )


def _bits(array: np.ndarray) -> np.ndarray:
  flat = array.reshape(-1).view(np.uint8)
  return flat.view(np.uint64) if flat.size % 8 == 0 else flat


def _number(index: tuple[int, ...], shape: Sequence[int]) -> int:
  """The number of a parameter's part, in C order."""
  return int(np.ravel_multi_index(index, shape[: len(index)])) if index else 0


@contextlib.contextmanager
def _told(folder: pathlib.Path, place: tensors_lib.Place) -> Iterator[None]:
  """Names the part that an error is of."""
  try:
    yield
  except _DAMAGES as e:
    name = f"{place.leaf}{list(place.index)}"
    raise record_lib.Broken(f"{folder}: {name}: {record_lib.reason(e)}") from e


def _stored_name(leaf: str) -> str:
  """Where a train state has it."""
  part = "router_bias" if leaf.endswith("router.bias_E") else "params"
  return f"{part}.{leaf}.value"


def _leaf_name(stored: str) -> str:
  return stored.split(".", 1)[1].removesuffix(".value")
