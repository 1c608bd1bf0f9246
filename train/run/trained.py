"""A trained model, in a folder of a run, a checkpoint, or of Hugging Face."""

import dataclasses
import pathlib
from typing import Any, Literal
import warnings

import jax

import dsa_jax
from dsa_jax import frame as frame_lib
from dsa_jax.hf import config_json
from dsa_jax.hf import files
from dsa_jax.hf import load
from train.host import json_files
from train.learn import step as step_lib
from train.run import arrays as arrays_lib
from train.run import origin as origin_lib
from train.run import run_folder

type _DType = Literal["bfloat16", "float32"]


class Trained:
  """A model that was found, and is not loaded yet.

  Attributes:
    path: The folder that holds the parameters.
    config: The model.
    attention: How it attended when it was trained last.
  """

  path: pathlib.Path
  config: dsa_jax.ModelConfig
  attention: frame_lib.Attention

  def __init__(self, model: str, step: int | None, dtype: _DType | None):
    """Finds a model.

    Args:
      model: A run's folder, one checkpoint, or a Hugging Face folder.
      step: Of a run's folder: which checkpoint; by default the newest.
      dtype: What to compute in; by default the model's own.

    Raises:
      ValueError: There is none, or a file of it is damaged; names it.
      OSError: A file cannot be read, or is not what was saved.
    """
    run_folder.check_path("MODEL", model)
    folder = pathlib.Path(model)
    if not folder.is_dir():
      raise ValueError(
        f"MODEL={model} is no folder; give that of a run, of a checkpoint, or "
        "of a Hugging Face model."
      )
    self._arrays: arrays_lib.Arrays | None = None
    self._tokenizer: str | None = None
    self._dtype = dtype
    if (folder / "config.json").exists() and (
      "model_type" in config_json.read_json(folder)
    ):
      self._find_hf(folder, step)
    else:
      self._find_checkpoint(folder.resolve(), step)

  @property
  def tokenizer(self) -> str:
    """ "bytes", or the path of a tokenizer.json.

    Raises:
      ValueError: Nothing says which it was trained with.
    """
    if self._tokenizer is None:
      raise ValueError(
        f"{self.path} has no tokenizer.json, and no run's config names a "
        "tokenizer; give --tokenizer=FILE, or --tokenizer=bytes."
      )
    return self._tokenizer

  def load(
    self, mesh: jax.sharding.Mesh, attention: frame_lib.Attention
  ) -> dsa_jax.Transformer:
    """The model, on the mesh in context.

    Args:
      mesh: That mesh.
      attention: What it is loaded for: for "dense", it needs no indexer.

    Raises:
      ValueError: A tensor is missing or not finite; see `load_hf`.
      OSError: A parameter is not what was saved.
    """
    if self._arrays is None:
      with warnings.catch_warnings():
        stage = None
        if attention == "dense":  # a new indexer is not asked
          stage = "warmup"
          warnings.filterwarnings("ignore", ".* has no indexer")
        return dsa_jax.load_hf(self.path, dtype=self._dtype, stage=stage)
    model, init = step_lib.init(self.config, 0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params, bias = step_lib.on_mesh(shapes, mesh)
    loaded = self._arrays.load({"params": params, "router_bias": bias})
    return model.merge(loaded["params"], loaded["router_bias"])

  def _find_hf(self, folder: pathlib.Path, step: int | None) -> None:
    if step is not None:
      raise ValueError(
        f"step={step} is for the folder of a run, but MODEL={folder} is a "
        "Hugging Face folder: leave it out."
      )
    stored = files.Folder(folder)
    self.path, self.config = folder, config_json.read(stored, self._dtype)
    self.attention = "sparse" if load.has_indexer(stored) else "dense"
    self._tokenizer = _beside(folder)

  def _find_checkpoint(self, folder: pathlib.Path, step: int | None) -> None:
    self.path = _checkpoint(folder, step)
    self._arrays = arrays_lib.Arrays(self.path)
    self.config = self._arrays.config
    if self._dtype is not None:
      self.config = dataclasses.replace(self.config, dtype=self._dtype)
    run = self.path.parent.parent
    self.attention, self._tokenizer = "sparse", _beside(run / "hf")
    if (run / "config.json").exists():
      self.attention, self._tokenizer = _of_run(run, int(self.path.name))


def _beside(folder: pathlib.Path) -> str | None:
  """The tokenizer in a folder of a model, if there is one."""
  file = folder / "tokenizer.json"
  return str(file) if file.exists() else None


def _checkpoint(folder: pathlib.Path, step: int | None) -> pathlib.Path:
  """The checkpoint that a folder and a step name."""
  if step is not None:
    found = run_folder.checkpoints(folder)
    if step not in found:
      there = ", ".join(map(str, sorted(found))) or "none"
      raise ValueError(
        f"step={step}: {folder} has no such checkpoint; there are: {there}."
      )
    return found[step]
  path = origin_lib.find(folder)
  if path is None:
    raise ValueError(
      f"MODEL={folder} is neither a Hugging Face folder (config.json with "
      "model_type) nor a run's folder with a checkpoint, nor a checkpoint."
    )
  return path


def _of_run(
  run: pathlib.Path, step: int
) -> tuple[frame_lib.Attention, str | None]:
  """How a run attended up to a step, and its tokenizer."""
  file = run / "config.json"
  cfg = json_files.read(file)
  try:
    kind, tokenizer = _stage(cfg["stages"], step), cfg["data"]["tokenizer"]
  except (KeyError, TypeError, IndexError) as e:
    raise json_files.Damaged(
      f"{file} is not the config of a run: {e!r}."
    ) from e
  return "sparse" if kind == "sparse" else "dense", tokenizer


def _stage(stages: list[dict[str, Any]], step: int) -> str:
  """The kind of the stage that a step is of."""
  end = 0
  for stage in stages:
    end += stage["steps"]
    if step <= end:
      return stage["kind"]
  return stages[-1]["kind"]
