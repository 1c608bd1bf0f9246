"""Reads a Hugging Face folder into a model, on whatever mesh."""

import contextlib
import functools
import pathlib
from typing import Any, Final, Literal
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from dsa_jax import config as config_lib
from dsa_jax import transformer
from dsa_jax.hf import config_json
from dsa_jax.hf import files
from dsa_jax.hf import finite
from dsa_jax.hf import fp8
from dsa_jax.hf import header as header_lib
from dsa_jax.hf import prefetch
from dsa_jax.hf import tensors as tensors_lib

type Stage = Literal["pretrain", "extend", "warmup", "sparse"]

SCALE: Final = "_scale_inv"  # after the name of an FP8 weight
_INDEXER: Final = ".indexer."
_NO_MESH: Final = jax.sharding.Mesh(np.empty((), object), ())


def load_hf(
  folder: str | pathlib.Path,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: DTypeLike | None = None,
  stage: Stage | None = None,
) -> transformer.Transformer:
  """The model in a Hugging Face folder: DeepSeek-V3, V3.1, V3.2 or GLM's DSA.

  Tensors are read one after another, file by file, and go straight to the
  devices that hold them: the host has a few of them at a time, and a process
  reads only what its devices need.

  Args:
    folder: Has config.json and safetensors, of FP8 (e4m3, blocks of 128 x 128
      with their scales), bf16 or fp32.
    mesh: What to shard the model over; by default the mesh in context.
    dtype: For parameters and activations; by default the config's. (The
      indexer's head weights and the router's bias are fp32 regardless.)
    stage: What the model is loaded for. A model without an indexer (V3, V3.1)
      gets a new one for the stages that do not choose keys by it yet:
      "pretrain", "extend" and "warmup".

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: The config asks for what is not supported here, the tensors are
      not exactly those of the model, or one of them holds a NaN or an infinity;
      names the key, or file and tensor.
  """
  folder = pathlib.Path(folder)
  stored = files.Folder(folder)
  cfg = config_json.read(stored, dtype)
  tensors = wanted(stored, cfg, stage)  # checked before memory is taken
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    model = nnx.eval_shape(
      lambda: transformer.Transformer(cfg, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [tensors_lib.leaf_name(path) for path, _ in leaves]
    filled = {name: _Leaf(leaf) for name, (_, leaf) in zip(names, leaves)}
    needed = [
      tensor
      for tensor in tensors
      if any(filled[p.leaf].needs(p.index) for p in tensor.places)
    ]
    with jax.set_mesh(_NO_MESH):  # each device is filled by itself
      for parts in prefetch.prefetch(functools.partial(read, stored), needed):
        for place, part in parts:
          filled[place.leaf].put(place.index, part)
    arrays = {name: filled.pop(name).array() for name in names}
    if not has_indexer(stored):
      arrays |= fresh_indexer(cfg)
  loaded = jax.tree.unflatten(treedef, [arrays[name] for name in names])
  model = nnx.merge(graphdef, loaded)
  model.source = str(folder.resolve())
  return model


def wanted(
  stored: files.Folder, cfg: config_lib.ModelConfig, stage: Stage | None
) -> list[tensors_lib.Tensor]:
  """The tensors to read, in the order in which they lie in the files.

  Args:
    stored: The folder.
    cfg: The model in it.
    stage: As of `load_hf`.

  Raises:
    ValueError: The tensors are not exactly those of the model.
  """
  tensors = tensors_lib.tensors(cfg)
  _check(stored, tensors, cfg, stage)
  entries = stored.entries
  found = [t for t in tensors if not t.copy and t.name in entries]
  return sorted(
    found, key=lambda t: (entries[t.name].file, entries[t.name].begin)
  )


def read(
  stored: files.Folder, tensor: tensors_lib.Tensor
) -> list[tuple[tensors_lib.Place, np.ndarray]]:
  """Values of a tensor; float32 if it was FP8, else its own dtype.

  Raises:
    ValueError: Some value is not finite, or a scale not positive; names it.
  """
  array = stored.read(tensor.name)
  finite.check(array, f"{tensor.name} in {stored.entries[tensor.name].file}")
  if array.dtype == header_lib.DTYPES["F8_E4M3"]:
    name = tensor.name + SCALE
    scale = stored.read(name)
    finite.check_scale(scale, f"{name} in {stored.entries[name].file}")
    array = fp8.dequantise(array, scale)
  return list(zip(tensor.places, tensor.split(array)))


def has_indexer(stored: files.Folder) -> bool:
  """Whether any layer has one."""
  return any(_INDEXER in name for name in stored.entries)


def fresh_indexer(cfg: config_lib.ModelConfig) -> dict[str, jax.Array]:
  """New parameters of the indexers, by name."""

  @jax.jit
  def make(key):  # all else is not computed
    state = nnx.state(transformer.Transformer(cfg, rngs=nnx.Rngs(key)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {tensors_lib.leaf_name(path): leaf for path, leaf in leaves}
    return {name: x for name, x in named.items() if _INDEXER in name}

  return make(jax.random.key(0))


def _check(stored, tensors, cfg, stage) -> None:
  """The folder has the model's tensors, in their shapes, and no others."""
  fresh = not has_indexer(stored)
  if fresh and stage not in ("pretrain", "extend", "warmup"):
    raise ValueError(
      f"{stored.path} has no indexer, so that there is none to choose keys by:"
      ' load it with stage="warmup" and train a new one.'
    )
  if fresh:
    warnings.warn(
      f"{stored.path} has no indexer: it gets a new one of {cfg.index_heads}"
      f" heads, K={cfg.top_k}, which knows nothing until it is trained.",
      stacklevel=4,
    )
  unknown = set(stored.entries)
  for tensor in tensors:
    entry = stored.entries.get(tensor.name)
    if entry is None:
      if not (tensor.copy or (fresh and _INDEXER in tensor.name)):
        raise ValueError(
          f"{stored.path} has no tensor {tensor.name}, which the model needs."
        )
      continue
    if entry.shape != tensor.shape:
      raise ValueError(
        f"{tensor.name} in {entry.file} is {list(entry.shape)}; the model"
        f" needs {list(tensor.shape)}."
      )
    unknown.discard(tensor.name)
    if stored.dtype(tensor.name).itemsize == 1:  # FP8 of some kind
      _check_scale(stored, tensor, entry)
      unknown.discard(tensor.name + SCALE)
  if unknown:
    some = sorted(unknown)
    raise ValueError(
      f"{stored.path} has {len(some)} tensors that the model does not:"
      f" {', '.join(some[:5])}{' ...' if len(some) > 5 else ''}"
    )
  _check_copies(stored, tensors)


def _check_scale(stored, tensor, entry) -> None:
  name = tensor.name + SCALE
  if tensor.kind != "linear" or entry.dtype != "F8_E4M3":
    raise ValueError(
      f"{tensor.name} in {entry.file} is {entry.dtype}, which is not supported"
      " for it."
    )
  scale = stored.entries.get(name)
  if scale is None:
    raise ValueError(
      f"{tensor.name} in {entry.file} is {entry.dtype}, but there is no {name}."
    )
  expected = fp8.scale_shape(tensor.shape)
  if scale.shape != expected or scale.dtype not in ("F32", "F8_E8M0"):
    raise ValueError(
      f"{name} in {scale.file} is {scale.dtype}{list(scale.shape)}; it must be"
      f" F32 or F8_E8M0, {list(expected)}."
    )


def _check_copies(stored, tensors) -> None:
  """The MTP layer's copies of the trunk's tensors are that."""
  originals = {(t.places[0].leaf): t.name for t in tensors if not t.copy}
  for copy in tensors:
    if not copy.copy or copy.name not in stored.entries:
      continue
    original = originals[copy.places[0].leaf]
    if not stored.same(copy.name, original):
      warnings.warn(
        f"{copy.name} differs from {original}: the model has only the latter,"
        " and reads no other.",
        stacklevel=5,
      )


class _Leaf:
  """A parameter on its devices, filled part by part."""

  def __init__(self, leaf: jax.ShapeDtypeStruct):
    self._dtype, self._shape = leaf.dtype, leaf.shape
    mesh = jax.sharding.get_mesh()
    if mesh.empty:  # one device, and JAX may still choose another
      self._sharding = None
      indices = {None: (slice(None),) * len(leaf.shape)}
    else:
      spec = leaf.sharding.spec if leaf.sharding else jax.P()
      self._sharding = jax.NamedSharding(mesh, spec)
      indices: Any = self._sharding.addressable_devices_indices_map(self._shape)
    # Of each device, its first and its last place in every dimension.
    self._bounds = {
      device: [cut.indices(size)[:2] for cut, size in zip(index, self._shape)]
      for device, index in indices.items()
    }
    self._blocks = {
      device: jnp.zeros(
        [end - begin for begin, end in bounds], self._dtype, device=device
      )
      for device, bounds in self._bounds.items()
    }

  def needs(self, index: tuple[int, ...]) -> bool:
    """Whether a device here holds something of this layer and expert."""
    return any(_inside(index, bounds) for bounds in self._bounds.values())

  def put(self, index: tuple[int, ...], part: np.ndarray) -> None:
    """Fills this layer and expert."""
    for device, bounds in self._bounds.items():
      if not _inside(index, bounds):
        continue
      inner = bounds[len(index) :]
      own = part[tuple(slice(begin, end) for begin, end in inner)]
      at = [i - begin for i, (begin, _) in zip(index, bounds)]
      own = own.reshape((1,) * len(at) + own.shape).astype(self._dtype)
      at = np.array(at + [0] * len(inner), np.int32)
      block = _fill(self._blocks[device], jax.device_put(own, device), at)
      # The host does not run ahead of the devices.
      self._blocks[device] = jax.block_until_ready(block)

  def array(self) -> jax.Array:
    if self._sharding is None:
      return self._blocks[None]
    return jax.make_array_from_single_device_arrays(
      self._shape, self._sharding, list(self._blocks.values())
    )


def _inside(index, bounds) -> bool:
  return all(begin <= i < end for i, (begin, end) in zip(index, bounds))


@functools.partial(jax.jit, donate_argnums=0)
def _fill(block, part, at):
  return jax.lax.dynamic_update_slice(block, part, list(at))
