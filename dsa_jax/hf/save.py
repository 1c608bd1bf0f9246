"""Writes a model as a Hugging Face folder that others read."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import json
import pathlib
import re
from typing import Any, Final
import warnings

from flax import nnx
import jax
import numpy as np

from dsa_jax import config as config_lib
from dsa_jax import transformer
from dsa_jax.hf import companions
from dsa_jax.hf import config_json
from dsa_jax.hf import files
from dsa_jax.hf import finite
from dsa_jax.hf import fp8
from dsa_jax.hf import header
from dsa_jax.hf import load
from dsa_jax.hf import prefetch
from dsa_jax.hf import tensors as tensors_lib

type Fetch = Callable[[tensors_lib.Place], np.ndarray]

_F32: Final = header.DTYPES["F32"]
_BF16: Final = header.DTYPES["BF16"]


def save_hf(
  model: transformer.Transformer,
  folder: str | pathlib.Path,
  *,
  format: config_json.Format = "bf16",  # noqa: A002 - the word its users know
  max_shard_size: int | str = "5GB",
  like: str | pathlib.Path | None = None,
) -> None:
  """Writes config.json and safetensors, with names and shapes as released.

  config.json comes last: a folder without it is not whole.

  Args:
    model: Its arrays may be sharded over the devices of this process.
    folder: Made here; must be empty or not exist.
    format: "bf16"; "float32"; or "fp8", as released: linear weights of layers
      in e4m3, with a float32 scale, a power of two, for each 128 x 128 of them.
    max_shard_size: Bytes of a file, as a number or like "5GB". A file has at
      least one tensor.
    like: A folder of the model it came from, by default the one it was loaded
      from. It gives the tokenizer, the chat template, and what config.json says
      besides the model's numbers; also, scales: blocks of weights that were not
      changed since return to the same FP8 bits.

  Raises:
    ValueError: The folder is not empty, another process holds a part of the
      model, a weight is not finite, or an argument is not understood.
    OSError: It cannot be written; names file and tensor. What is left has no
      config.json.
  """
  leaves = {
    tensors_lib.leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model))
  }
  for name, leaf in leaves.items():
    if not leaf.is_fully_addressable:
      raise ValueError(
        f"{name} is shared with other processes: save an Orbax checkpoint, and"
        " convert it by `python -m train.convert`."
      )
  if like is None and model.source is not None:
    if pathlib.Path(model.source).exists():
      like = model.source
    else:
      warnings.warn(
        f"{model.source}, which the model was loaded from, is gone: no"
        " tokenizer is copied, and FP8 scales are computed anew.",
        stacklevel=2,
      )
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} is not empty; give another folder.")
  out = Export(model.config, folder, format, parse_size(max_shard_size), like)
  fetch = lambda place: _fetch(leaves[place.leaf], place.index)
  for i in range(len(out.plan(fetch))):
    out.write(i, fetch)
  out.finish()


@dataclasses.dataclass(frozen=True)
class _Unit:
  """A tensor and what is written of it: itself, perhaps its scale."""

  tensor: tensors_lib.Tensor
  specs: tuple[files.Spec, ...]


class Export:
  """A folder to be, written file by file."""

  def __init__(
    self,
    cfg: config_lib.ModelConfig,
    folder: pathlib.Path,
    form: config_json.Format,
    max_size: int,
    like: str | pathlib.Path | None,
  ):
    """Checks everything that can be wrong before anything is written.

    Raises:
      ValueError: `form` is unknown, `like` is another model or has a file that
        is not to be copied, or config.json cannot say what the model is.
    """
    if form not in ("bf16", "fp8", "float32"):
      raise ValueError(f"format={form!r} must be bf16, fp8 or float32.")
    self._cfg, self._folder, self._form = cfg, folder, form
    self._max_size = max_size
    self._entries = raw = None
    self._companions: list[companions.Companion] = []
    if like is not None:
      like = pathlib.Path(like)
      raw = config_json.read_json(like)
      self._companions = companions.find(like)
      self._stored = files.Folder(like)
      self._entries = self._stored.entries
    self._json = config_json.to_json(cfg, form, raw)
    self._files: list[list[_Unit]] = []

  def plan(self, fetch: Fetch) -> list[str]:
    """The names of the files; `fetch` is asked for small tensors alone."""
    units = [
      self._unit(tensor, fetch) for tensor in tensors_lib.tensors(self._cfg)
    ]
    self._files = list(_cut(units, self._max_size))
    return [self._name(i) for i in range(len(self._files))]

  def specs(self, i: int) -> list[files.Spec]:
    """Describes the tensors of file `i`."""
    return [spec for unit in self._files[i] for spec in unit.specs]

  def write(self, i: int, fetch: Fetch) -> int:
    """Writes file `i`, whole or not at all; its CRC-32.

    Raises:
      ValueError: A weight is not finite; names tensor and place.
      OSError: The file cannot be written; names file and tensor.
    """
    self._folder.mkdir(parents=True, exist_ok=True)

    def make(unit):
      parts = [fetch(place) for place in unit.tensor.places]
      array = in_order(unit.tensor.join(parts))
      finite.check(array, f"{unit.tensor.name}, which is to be written,")
      return self._made(unit, array)

    arrays = (
      x for made in prefetch.prefetch(make, self._files[i]) for x in made
    )
    return files.write(self._folder / self._name(i), self.specs(i), arrays)

  def finish(self) -> None:
    """Writes the index, what is carried along, and at last config.json."""
    if len(self._files) > 1:
      where = {
        spec.name: self._name(i)
        for i in range(len(self._files))
        for spec in self.specs(i)
      }
      size = sum(s.size for i in range(len(self._files)) for s in self.specs(i))
      index = {"metadata": {"total_size": size}, "weight_map": where}
      _put_json(self._folder / files.INDEX, index)
    companions.copy(self._companions, self._folder)
    _put_json(self._folder / "config.json", self._json)

  def _name(self, i: int) -> str:
    number = len(self._files)
    if number == 1:
      return "model.safetensors"
    return f"model-{i + 1:05d}-of-{number:05d}.safetensors"

  def _unit(self, tensor, fetch) -> _Unit:
    name, shape = tensor.name, tensor.shape
    dtype = _F32 if self._form == "float32" else _BF16
    if tensor.kind == "float32" and dtype == _BF16:
      dtype = self._exact(tensor, fetch)
    if tensor.kind != "linear" or self._form != "fp8":
      return _Unit(tensor, (files.Spec(name, dtype, shape),))
    weight = files.Spec(name, header.DTYPES["F8_E4M3"], shape)
    name += load.SCALE
    known = self._entries.get(name) if self._entries else None
    scale = known.dtype if known else "F32"
    return _Unit(
      tensor,
      (
        weight,
        files.Spec(name, header.DTYPES[scale], fp8.scale_shape(shape)),
      ),
    )

  def _exact(self, tensor, fetch) -> np.dtype:
    """Type of a float32 value: bf16 where it came so and still is that."""
    known = self._entries.get(tensor.name) if self._entries else None
    if known is None or known.dtype != "BF16":
      return _F32
    values = fetch(tensor.places[0])
    return _BF16 if (values.astype(_BF16) == values).all() else _F32

  def _made(self, unit: _Unit, array: np.ndarray) -> list[np.ndarray]:
    if len(unit.specs) == 1:
      return [array.astype(unit.specs[0].dtype, copy=False)]
    known, name = None, unit.specs[1].name
    if self._entries and name in self._entries:
      known = self._stored.read(name)
    weight, scale = fp8.quantise(array, known)
    return [weight, scale.astype(unit.specs[1].dtype)]


def _cut(units: list[_Unit], max_size: int) -> Iterator[list[_Unit]]:
  """Files of at most `max_size` bytes, or of one tensor."""
  part: list[_Unit] = []
  filled = 0
  for unit in units:
    size = sum(spec.size for spec in unit.specs)
    if part and filled + size > max_size:
      yield part
      part, filled = [], 0
    part.append(unit)
    filled += size
  yield part


def in_order(array: np.ndarray) -> np.ndarray:
  """The same in C order. Blocks stay in the cache: twice as fast as at once."""
  if array.flags.c_contiguous:
    return array
  bits = array.view(f"u{array.itemsize}")
  out = np.empty(bits.shape, bits.dtype)
  for i in range(0, bits.shape[1], 32):
    out[:, i : i + 32] = bits[:, i : i + 32]
  return out.view(array.dtype)


def _fetch(leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray:
  """A part of a parameter, from whichever devices hold it."""
  part = np.empty(leaf.shape[len(index) :], leaf.dtype)
  for shard in leaf.addressable_shards:
    if shard.replica_id:
      continue
    bounds = [
      cut.indices(size)[:2] for cut, size in zip(shard.index, leaf.shape)
    ]
    outer, inner = bounds[: len(index)], bounds[len(index) :]
    if all(begin <= i < end for i, (begin, end) in zip(index, outer)):
      at = tuple(i - begin for i, (begin, _) in zip(index, outer))
      to = tuple(slice(begin, end) for begin, end in inner)
      part[to] = np.asarray(shard.data[at])
  return part


def _put_json(file: pathlib.Path, value: Any) -> None:
  partial = file.with_name(file.name + ".partial")
  partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  partial.replace(file)


def parse_size(size: int | str) -> int:
  """Bytes of a number, or of words such as 500MB and 5GB.

  Raises:
    ValueError: It is neither, or none at all.
  """
  units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
  match = re.fullmatch(r"([0-9]{1,15}) *([KMG]B)?", str(size).upper())
  if not match or not int(match[1]):
    raise ValueError(
      f"max_shard_size={size!r} is no size; give bytes, or one like 5GB."
    )
  return int(match[1]) * units[match[2] or ""]
