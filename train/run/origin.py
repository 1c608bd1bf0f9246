"""The checkpoint that a run begins with the parameters of."""

import json
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

import dsa_jax
from train.learn import step as step_lib


class Origin:
  """A checkpoint of another run, to begin with its parameters."""

  def __init__(self, init_from: str, model: dsa_jax.ModelConfig):
    """Finds what `init_from` names, and compares it with the model.

    Raises:
      ValueError: There is no checkpoint, it lacks parameters of the model, or
        has them in other shapes.
    """
    path = find(pathlib.Path(init_from).resolve())
    if path is None:
      raise ValueError(
        f"{init_from=} is no run with a checkpoint, and no "
        "checkpoint; give a run's folder, or RUN_DIR/checkpoints/STEP."
      )
    self._path = path
    saved: Any = ocp.metadata(str(self._path), "state").metadata
    _, init = step_lib.init(model, 0)
    params, _ = jax.eval_shape(init, jax.random.key(0))
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

  def progress(self) -> dict[str, Any]:
    """The progress of the run that saved it, see `checkpoint.Progress`."""
    saved: Any = ocp.checkpointables_metadata(str(self._path))
    return json.loads(saved.custom_metadata["progress"])

  def restore(
    self, like: step_lib.Parameters, mesh: jax.sharding.Mesh
  ) -> step_lib.Parameters:
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
