"""The checkpoint that a run begins with the parameters of."""

import json
import pathlib
from typing import Any

import jax

import dsa_jax
from train.learn import step as step_lib
from train.run import arrays as arrays_lib
from train.run import fingerprint
from train.run import run_folder


class Origin:
  """A checkpoint of another run, to begin with its parameters."""

  def __init__(self, init_from: str, model: dsa_jax.ModelConfig):
    """Finds what `init_from` names, and compares it with the model.

    Raises:
      ValueError: There is no checkpoint, it lacks parameters of the model, or
        has them in other shapes.
      Broken: Its metadata are not what was saved.
    """
    run_folder.check_path("init_from", init_from)
    path = find(pathlib.Path(init_from).resolve())
    if path is None:
      raise ValueError(
        f"{init_from=} is no run with a checkpoint, and no "
        "checkpoint; give a run's folder, or RUN_DIR/checkpoints/STEP."
      )
    self._path, self._arrays = path, arrays_lib.Arrays(path)
    _, init = step_lib.init(model, 0)
    params, _ = jax.eval_shape(init, jax.random.key(0))
    has = {name: x.shape for name, x in self._arrays.record.arrays.items()}
    needs = {
      fingerprint.name(path): [*x.shape]
      for path, x in jax.tree_util.tree_leaves_with_path({"params": params})
    }
    missing = sorted(needs.keys() - has.keys())
    if missing and all(".indexer." in name for name in missing):
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
    return json.loads(self._arrays.record.progress or "{}")

  def restore(
    self, like: step_lib.Parameters, mesh: jax.sharding.Mesh
  ) -> step_lib.Parameters:
    """Parameters and router biases, in the shapes of `like`, on `mesh`.

    Raises:
      Broken: They are not what was saved.
    """
    params, bias = step_lib.on_mesh(like, mesh)
    loaded = self._arrays.load({"params": params, "router_bias": bias})
    return loaded["params"], loaded["router_bias"]


def find(folder: pathlib.Path) -> pathlib.Path | None:
  """The checkpoint that a run's folder, or a checkpoint's, stands for."""
  steps = run_folder.checkpoints(folder)
  newest_first = [steps[step] for step in sorted(steps, reverse=True)]
  found = (
    path for path in (*newest_first, folder) if (path / "state").is_dir()
  )
  return next(found, None)
