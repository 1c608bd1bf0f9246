"""The checkpoints of a run: of all that a step changes."""

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import shutil
import time
from typing import Any, Final
import zlib

import jax
from orbax.checkpoint import v1 as ocp

import dsa_jax
from dsa_jax import ranges
from dsa_jax.hf import tensors as tensors_lib
from train.host import processes
from train.learn import step as step_lib
from train.run import arrays as arrays_lib
from train.run import fingerprint
from train.run import metrics as metrics_lib
from train.run import run_folder

_TEMPORARY: Final = ".orbax-checkpoint-tmp"  # what Orbax has not finished


class Broken(Exception):
  """A checkpoint is not what was saved."""


@dataclasses.dataclass
class Progress:
  """State of a run besides its train state."""

  data: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Where the data stand, as JSON can hold it."""
  tokens: dict[str, int] = dataclasses.field(default_factory=dict)
  """Seen so far, by source."""
  rollbacks: int = 0
  """How often the run went back to a checkpoint."""
  owes_evaluation: bool = False
  """The run was stopped before it could evaluate after this step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When to save. The end of each stage is always saved, and stays."""

  every: ranges.Count = 1000
  """Steps between checkpoints."""
  keep: ranges.Count = 3
  """How many of the newest stay, besides."""
  keep_every: ranges.Count | None = None
  """Those of every so many-th step stay, too."""
  keep_best: ranges.Index = 0
  """So many stay that lost least on held-out text, of those saved right after
  an evaluation."""

  def __post_init__(self):
    ranges.check(self)


class Checkpoints:
  """The checkpoints of one run, saved in the background.

  RUN_DIR/config.json is the run's config; RUN_DIR/checkpoints/STEP holds the
  train state and the progress after that step. Each has the state's
  fingerprint, so that what is read is known to be what was saved, on whatever
  mesh. What is not used any more lies in RUN_DIR/set_aside.
  """

  def __init__(
    self,
    run_dir: str,
    cfg: CheckpointConfig,
    run_config: dict[str, Any],
    *,
    stage_ends: Sequence[int],
    resume: bool,
  ):
    """Opens the folder, and writes down which run it holds.

    Args:
      run_dir: The run's folder.
      cfg: Which checkpoints to keep.
      run_config: The run's config as nested dicts, for config.json.
      stage_ends: Steps whose checkpoints always stay.
      resume: Whether the folder may hold this run already.

    Raises:
      ValueError: The folder is not this run's, see `run_folder.check`.
      run_folder.NotSaved: Nothing can be written there.
    """
    self._dir = pathlib.Path(run_dir).resolve()
    run_folder.open_(run_dir, run_config, resume=resume)
    policies: Any = ocp.training.preservation_policies
    keep = [
      policies.LatestN(cfg.keep),
      policies.CustomSteps(stage_ends),
    ]
    if cfg.keep_every:
      keep.append(policies.EveryNSteps(cfg.keep_every))
    if cfg.keep_best:
      keep.append(
        policies.BestN(
          get_metric_fn=lambda metrics: metrics["bits_per_byte"],
          reverse=True,  # the last ones stay
          n=cfg.keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._checkpointer = ocp.training.Checkpointer(
      str(self._dir / "checkpoints"),
      context=_context(),
      preservation_policy=policies.AnyPreservationPolicy(keep),
      cleanup_tmp_directories=True,  # of processes that were killed
    )
    self._saving: int | None = None
    self._unsaved: int | None = None  # the last one, if it failed

  def prepare(self, state: step_lib.TrainState) -> None:
    """Compiles what a save runs on the devices, ahead of the first."""
    fingerprint.of(state)

  @property
  def steps(self) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

  def save(
    self,
    state: step_lib.TrainState,
    step: int,
    progress: Progress,
    model: dsa_jax.ModelConfig,
    bits_per_byte: float | None,
  ) -> None:
    """Copies the state, and writes it while training goes on.

    That a save failed is told, once it is known; the next one is tried all the
    same, and training has lost nothing but the place to come back to.

    Args:
      state: Of all processes together.
      step: The last one done.
      progress: After that step.
      model: What the parameters are those of, in this stage.
      bits_per_byte: Of held-out text, where it was measured after this step.
    """
    self.settle()
    if step in self.steps:
      return
    self._clean()
    marks = fingerprint.of(state)
    said = json.dumps(dataclasses.asdict(progress))
    metrics: Any = None
    if bits_per_byte is not None:
      metrics = {"bits_per_byte": bits_per_byte}
    self._saving = step
    try:
      self._checkpointer.save_checkpointables_async(
        step,
        {"state": state},
        force=True,
        metrics=metrics,
        custom_metadata={
          "progress": said,
          "progress_crc32": zlib.crc32(said.encode()),
          "fingerprint": [*marks],
          "model": model.to_dict(),
        },
      )
    except Exception as e:  # whatever a file system may say
      self._failed(e)

  def load(
    self, step: int, like: step_lib.TrainState, mesh: jax.sharding.Mesh
  ) -> tuple[step_lib.TrainState, Progress]:
    """A checkpoint's state, in the shapes and specs of `like`, on `mesh`.

    Raises:
      Broken: It cannot be read, or is not what was saved.
    """
    try:
      saved: Any = self._checkpointer.checkpointables_metadata(step)
      said = saved.custom_metadata["progress"]
      if zlib.crc32(said.encode()) != saved.custom_metadata["progress_crc32"]:
        raise ValueError("its metadata are not what was saved")
      loaded = self._checkpointer.load_checkpointables(
        step, {"state": step_lib.on_mesh(like, mesh)}
      )
      state = loaded["state"]
      marks = fingerprint.of(state)
      if marks != saved.custom_metadata["fingerprint"]:
        raise ValueError("its arrays are not what was saved")
      progress = Progress(**json.loads(said))
      why = None
    # A damaged file may end in any error of Orbax, TensorStore or JSON.
    except Exception as e:
      state = progress = None
      why = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    if not processes.all_agree(why is None):
      raise Broken(why or "another process cannot read it")
    assert state is not None and progress is not None
    return state, progress

  def set_aside(self, steps: list[int], why: str) -> None:
    """Moves checkpoints out of the way: their steps will be saved again."""
    if not steps:
      return
    if processes.is_first():
      for step in steps:
        target = self._dir / "set_aside" / f"{step}-{why}"
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(self._dir / "checkpoints" / str(step), target)
    processes.meet("set aside")
    self._checkpointer.reload()

  def settle(self) -> None:
    """Waits until what is being saved is written, and tells if it is not."""
    if self._saving is None:
      return
    try:
      self._checkpointer.wait()
      self._saving = self._unsaved = None
    except Exception as e:
      self._failed(e)

  def finish(self) -> None:
    """Waits until everything is written.

    Raises:
      run_folder.NotSaved: The last checkpoint is not.
    """
    self.settle()
    if self._unsaved is not None:
      raise run_folder.NotSaved(
        f"The checkpoint of step {self._unsaved} could not be written (see "
        f"above); the newest is {max(self.steps, default='none')}. Make room, "
        "and go on from it with the same command and --resume."
      )

  def close(self) -> None:
    self.settle()
    self._checkpointer.close()
    self._clean()

  def _clean(self) -> None:
    """Removes what failed saves left behind: it would fill the disk."""
    if not processes.is_first():
      return
    for _ in range(20):
      left = [*(self._dir / "checkpoints").glob(f"*{_TEMPORARY}")]
      if not left:
        break
      for path in left:
        shutil.rmtree(path, ignore_errors=True)
      # A thread of the save that failed may put one more file there.
      time.sleep(0.1)

  def _failed(self, why: Exception) -> None:
    self._unsaved, self._saving = self._saving, None
    reason = str(why).splitlines()[0] if str(why) else type(why).__name__
    free = metrics_lib.size(shutil.disk_usage(self._dir).free)
    processes.say(
      f"ERROR: the checkpoint of step {self._unsaved} was NOT written: {reason}"
      f" ({free} are free in {self._dir}). The newest is "
      f"{max(self.steps, default='none')}; training goes on, and the next save "
      "is tried as planned."
    )
    self._clean()


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
