"""The parameters of a checkpoint on disk, read and written part by part.

Orbax reads and writes whole arrays, of which one here may be larger than the
host's memory: all layers' experts. TensorStore, on which it builds, does parts.
"""

from collections.abc import Iterator
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

# Larger parts are cut along their first dimension.
CHUNK_BYTES: Final = 64 * 2**20
# How Orbax lays out one file a chunk, so that parts can be written apart.
_LAYOUT: Final = {"use_ocdbt": False, "use_zarr3": True}
_CODECS: Final = (
  {"name": "bytes", "configuration": {"endian": "little"}},
  {"name": "crc32c"},  # checked whenever a chunk is read
)


class Arrays:
  """The parameters of a finished checkpoint."""

  def __init__(self, path: pathlib.Path):
    """Opens `path`, a checkpoint of Orbax with a "state".

    Raises:
      ValueError: It is no such checkpoint, or says nothing of its model.
    """
    if not ocp.is_orbax_checkpoint(str(path)):
      raise ValueError(f"{path} is no checkpoint.")
    self._state = path / "state"
    saved: Any = ocp.checkpointables_metadata(str(path))
    custom = saved.custom_metadata or {}
    if "model" not in custom:
      raise ValueError(
        f"{path} does not say what model it holds: it was saved by an older"
        " version."
      )
    self.config = config_lib.ModelConfig.from_dict(custom["model"])
    tree = json.loads((self._state / "_METADATA").read_text(encoding="utf-8"))
    self._driver = "zarr3" if tree["use_zarr3"] else "zarr"
    self._ocdbt = tree["use_ocdbt"]
    self._context = ts.Context({"cache_pool": {"total_bytes_limit": 2**28}})
    self._open: dict[str, Any] = {}

  def read(self, place: tensors_lib.Place) -> np.ndarray:
    """A part of a parameter.

    Raises:
      OSError: It cannot be read, or is not what was written; names it.
    """
    if place.leaf not in self._open:
      self._open[place.leaf] = self._array(place.leaf)
    with _told(self._state, place):
      return self._open[place.leaf][place.index].read().result()

  def _array(self, leaf: str) -> Any:
    name = _stored_name(leaf)
    kvstore: dict[str, Any] = {
      "driver": "file",
      "path": f"{self._state}/{name}/",
    }
    if self._ocdbt:
      base = f"file://{self._state}/"
      kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return ts.open(
      {"driver": self._driver, "kvstore": kvstore},
      context=self._context,
      read=True,
    ).result()


class NewArrays:
  """The parameters of a checkpoint that is being written.

  They lie in PATH.partial, which becomes PATH when they are all there.
  """

  def __init__(
    self, path: pathlib.Path, leaves: dict[str, jax.ShapeDtypeStruct]
  ):
    """Opens `path` for parameters of these shapes and dtypes."""
    self._target, self._leaves = path, leaves
    self._path = path.with_name(path.name + ".partial")
    self._open: dict[str, Any] = {}

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

  def sync(self) -> None:
    """Returns when all that was written is on the disk."""
    os.sync()

  def finish(self, model: config_lib.ModelConfig) -> None:
    """Makes it a checkpoint with a "state" of parameters and router biases."""
    # Orbax writes what goes around the arrays, for a tree of small ones.
    around = self._path.with_name(self._path.name + ".around")
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
        str(around),
        {"state": tree},
        custom_metadata={"model": model.to_dict()},
      )
    file = around / "state" / "_METADATA"
    metadata = json.loads(file.read_text(encoding="utf-8"))
    for entry in metadata["tree_metadata"].values():
      keys = [key["key"] for key in entry["key_metadata"]]
      leaf = _leaf_name(".".join(keys))
      entry["value_metadata"]["write_shape"] = self._chunk(leaf)
    file.write_text(json.dumps(metadata), encoding="utf-8")
    for entry in [*(around / "state").iterdir(), *around.iterdir()]:
      to = self._path / entry.relative_to(around)
      if not to.exists():
        os.rename(entry, to)
    shutil.rmtree(around)
    self.sync()
    self._path.rename(self._target)

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


def _bits(array: np.ndarray) -> np.ndarray:
  flat = array.reshape(-1).view(np.uint8)
  return flat.view(np.uint64) if flat.size % 8 == 0 else flat


@contextlib.contextmanager
def _told(folder: pathlib.Path, place: tensors_lib.Place) -> Iterator[None]:
  """TensorStore raises ValueError, whatever the reason."""
  try:
    yield
  except ValueError as e:
    name = f"{place.leaf}{list(place.index)}"
    raise OSError(f"{folder}: {name}: {str(e).splitlines()[0]}") from e


def _stored_name(leaf: str) -> str:
  """Where a train state has it."""
  part = "router_bias" if leaf.endswith("router.bias_E") else "params"
  return f"{part}.{leaf}.value"


def _leaf_name(stored: str) -> str:
  return stored.split(".", 1)[1].removesuffix(".value")
