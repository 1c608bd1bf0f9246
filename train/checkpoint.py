"""A run's folder: its config, and checkpoints of all that a step changes."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

import dsa_jax
from dsa_jax.hf import tensors as tensors_lib
from train import arrays as arrays_lib
from train import config as config_lib
from train import processes
from train import step as step_lib

# What may differ between a run and its continuation: where things lie, what is
# logged and saved, and which devices compute, by what.
_FREE = (
  "run_dir",
  "mesh",
  "distributed",
  "kernels",
  "checkpoint",
  "log",
  "resume",
  "stop_at",
)


class Checkpoints:
  """The checkpoints of one run, saved in the background.

  RUN_DIR/config.json is the run's config; RUN_DIR/checkpoints/STEP holds the
  train state and the place in the data after that step.
  """

  def __init__(self, cfg: config_lib.TrainConfig):
    """Opens the folder, and changes nothing there but to begin a new run.

    Raises:
      ValueError: The folder holds a run and `resume` is off, or holds none and
        it is on, or holds a run with another config.
    """
    self._dir = pathlib.Path(cfg.run_dir).resolve()
    self._check(cfg)
    processes.meet("run_dir")  # before anyone writes there
    policies: Any = ocp.training.preservation_policies
    keep = [
      policies.LatestN(cfg.checkpoint.keep),
      policies.CustomSteps(cfg.stage_ends),
    ]
    self._checkpointer = ocp.training.Checkpointer(
      str(self._dir / "checkpoints"),
      context=_context(),
      preservation_policy=policies.AnyPreservationPolicy(keep),
    )

  @property
  def latest(self) -> int:
    """The newest checkpoint's step; 0 if there is none."""
    newest = self._checkpointer.latest
    return newest.step if newest else 0

  def begin(self, cfg: config_lib.TrainConfig) -> None:
    """Writes down which run this folder holds."""
    if not processes.is_first():
      return
    text = json.dumps(dataclasses.asdict(cfg), indent=2)
    (self._dir / "config.json").write_text(text + "\n", encoding="utf-8")

  def save(
    self,
    state: step_lib.TrainState,
    step: int,
    data: dict[str, Any],
    model: dsa_jax.ModelConfig,
  ) -> None:
    """Copies the state, and writes it while training goes on.

    Args:
      state: Of all processes together.
      step: The last one done.
      data: Where the data stand, as JSON can hold it.
      model: What the parameters are those of, in this stage.
    """
    if step > self.latest:
      self._checkpointer.save_checkpointables_async(
        step,
        {"state": state},
        force=True,
        custom_metadata={"data": data, "model": model.to_dict()},
      )

  def restore_state(
    self, like: step_lib.TrainState, mesh: jax.sharding.Mesh
  ) -> step_lib.TrainState:
    """The newest state, in the shapes and specs of `like`, on `mesh`."""
    loaded = self._checkpointer.load_checkpointables(
      self.latest, {"state": step_lib.on_mesh(like, mesh)}
    )
    return loaded["state"]

  def data_state(self) -> dict[str, Any]:
    """Where the data stood."""
    saved: Any = self._checkpointer.checkpointables_metadata(self.latest)
    return saved.custom_metadata["data"]

  def wait(self) -> None:
    """Until everything is written."""
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.close()  # waits, too

  def _check(self, cfg: config_lib.TrainConfig) -> None:
    file = self._dir / "config.json"
    if not cfg.resume:
      if self._dir.exists() and (
        not self._dir.is_dir() or any(self._dir.iterdir())
      ):
        raise ValueError(
          f"run_dir={cfg.run_dir} is not empty: go on with the run in it by "
          "--resume, or give another --run-dir."
        )
      self._dir.mkdir(parents=True, exist_ok=True)
      return
    if not file.exists():
      raise ValueError(
        f"--resume: run_dir={cfg.run_dir} holds no run (no config.json); give "
        "the --run-dir of one, or begin one without --resume."
      )
    saved = _flat(json.loads(file.read_text(encoding="utf-8")))
    now = _flat(json.loads(json.dumps(dataclasses.asdict(cfg))))
    changed = [
      f"{name} is {now.get(name)!r}, was {saved.get(name)!r}"
      for name in sorted(saved | now)
      if name.split(".")[0] not in _FREE and saved.get(name) != now.get(name)
    ]
    if changed:
      raise ValueError(
        f"--resume: the run in {cfg.run_dir} has another config: "
        f"{'; '.join(changed)}. Give the same values, or another --run-dir to "
        "begin a new run."
      )


def _context() -> ocp.Context:
  """Chunks of one layer and expert, so that parts of an array are read apart.

  What converts a checkpoint then needs no memory for all layers at once.
  """
  options = ocp.options.ArrayOptions.Saving.StorageOptions

  def storage(key, value):
    del value
    stacked = tensors_lib.stacked(tensors_lib.leaf_name(key))
    return options(
      chunk_byte_size=arrays_lib.CHUNK_BYTES, shard_axes=tuple(range(stacked))
    )

  context = ocp.Context()
  context.array_options.saving.scoped_storage_options_creator = storage
  return context


class Origin:
  """A checkpoint of another run, to begin with its parameters."""

  def __init__(self, cfg: config_lib.TrainConfig):
    """Finds what `init_from` names, and compares it with the model.

    Raises:
      ValueError: There is no checkpoint, it lacks parameters of the model, or
        has them in other shapes.
    """
    path = find(pathlib.Path(cfg.init_from or "").resolve())
    if path is None:
      raise ValueError(
        f"init_from={cfg.init_from!r} is no run with a checkpoint, and no "
        "checkpoint; give a run's folder, or RUN_DIR/checkpoints/STEP."
      )
    self._path = path
    saved: Any = ocp.metadata(str(self._path), "state").metadata
    _, init = step_lib.init(cfg.model, cfg.seed)
    params, _ = jax.eval_shape(init, jax.random.key(cfg.seed))
    has, needs = _shapes(saved["params"]), _shapes(params)
    missing = sorted(needs.keys() - has.keys())
    if missing and all("/indexer/" in name for name in missing):
      raise ValueError(
        f"init_from={self._path} has no indexer ({missing[0]} and "
        f"{len(missing) - 1} more are missing), so that there is none to train "
        "or to choose keys by; begin with a checkpoint of a model that has one."
      )
    for name, shape in needs.items():
      if has.get(name) != shape:
        found = f"{has[name]} there" if name in has else "missing there"
        raise ValueError(
          f"init_from={self._path} holds another model: {name} is {found}, "
          f"{shape} here. Give this run that model, or another --init-from."
        )

  def __str__(self) -> str:
    return str(self._path)

  def restore(self, like: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Parameters and router biases, in the shapes of `like`, on `mesh`."""
    params, bias = step_lib.on_mesh(like, mesh)
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # no optimizer state
    with context:
      loaded: Any = ocp.load_checkpointables(
        str(self._path), {"state": {"params": params, "router_bias": bias}}
      )
    return loaded["state"]["params"], loaded["state"]["router_bias"]


def find(folder: pathlib.Path) -> pathlib.Path | None:
  """The checkpoint that a run's folder, or a checkpoint's, stands for."""
  steps = [p for p in folder.glob("checkpoints/*") if p.name.isdigit()]
  found = max(steps, key=lambda p: int(p.name), default=folder)
  whole = (found / "state").exists() and ocp.is_orbax_checkpoint(str(found))
  return found if whole else None


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
  """Shape of each parameter by its name, a/b/c."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  names = ([k.key for k in path if hasattr(k, "key")] for path, _ in leaves)
  return {
    "/".join(n for n in name if n != "value"): tuple(leaf.shape)
    for name, (_, leaf) in zip(names, leaves)
  }


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": [1]}} -> {"a.b.0": 1}."""
  if isinstance(tree, list):
    tree = {str(i): x for i, x in enumerate(tree)}
  if not isinstance(tree, dict):
    return {prefix: tree}
  flat = {}
  for name, child in tree.items():
    flat |= _flat(child, f"{prefix}.{name}" if prefix else name)
  return flat
