"""The checkpoints of a run: of all that a step changes."""

from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import threading
import time
from typing import Any, Final

import jax
from orbax.checkpoint import v1 as ocp

import dsa_jax
from dsa_jax import ranges
from dsa_jax.hf import tensors as tensors_lib
from train.host import atomic_files
from train.host import processes
from train.learn import step as step_lib
from train.run import arrays as arrays_lib
from train.run import fingerprint
from train.run import metrics as metrics_lib
from train.run import record as record_lib
from train.run import run_folder

_TEMPORARY: Final = ".orbax-checkpoint-tmp"  # what Orbax has not finished


Broken = record_lib.Broken


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

  def kept(
    self, measured: dict[int, float | None], stage_ends: Sequence[int]
  ) -> set[int]:
    """Which checkpoints stay.

    Args:
      measured: Of each by its step, the bits per byte of held-out text, where
        they are known.
      stage_ends: Steps that always stay.
    """
    steps = sorted(measured)
    kept = {
      *steps[-self.keep :],
      *(step for step in steps if step in stage_ends),
    }
    if self.keep_every:
      kept |= {step for step in steps if step % self.keep_every == 0}
    best = sorted((x, -step) for step, x in measured.items() if x is not None)
    return kept | {-step for _, step in best[: self.keep_best]}


class Checkpoints:
  """The checkpoints of one run, saved in the background.

  RUN_DIR/config.json is the run's config; RUN_DIR/checkpoints/STEP holds the
  train state and the progress after that step, under fingerprints, see
  `Arrays`. What is not used any more lies in RUN_DIR/set_aside. Orbax writes;
  which checkpoints there are, and which stay, is read off the folder here: one
  odd file in it is no reason to read none.

  Attributes:
    steps: Steps of the finished checkpoints, ascending.
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
    run_folder.open_(run_dir, run_config, resume=resume)
    self._run_dir = pathlib.Path(run_dir).resolve()
    self._dir = self._run_dir / "checkpoints"
    self._cfg, self._stage_ends = cfg, stage_ends
    self._saving: int | None = None
    self._unsaved: int | None = None  # the last one, if it failed
    self._in_the_way: set[int] = set()  # what could not be set aside
    self._after_save: threading.Thread | None = None
    self._clean()
    self._tell_odd()
    self.steps = self._find()
    try:
      self._checkpointer = ocp.training.Checkpointer(
        str(self._dir),
        context=self._context(),
        step_name_format=_Unlisted(),
      )
    except Exception as e:  # whatever a file system may say
      raise run_folder.NotSaved(
        f"{self._dir} cannot be opened: {record_lib.reason(e)}"
      ) from e

  def prepare(self, state: step_lib.TrainState) -> None:
    """Compiles what a save runs on the devices, ahead of the first."""
    fingerprint.of(state)

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
    record = record_lib.Record(
      arrays=record_lib.saved_arrays(state),
      model=model.to_dict(),
      progress=json.dumps(dataclasses.asdict(progress)),
      bits_per_byte=bits_per_byte,
    )
    metrics: Any = None  # for Orbax's own tools
    if bits_per_byte is not None:
      metrics = {"bits_per_byte": bits_per_byte}
    self._saving = step
    try:
      self._checkpointer.reload()
      self._checkpointer.save_checkpointables_async(
        step,
        {"state": state},
        force=True,
        metrics=metrics,
        custom_metadata=record.sealed(),
      )
    except Exception as e:  # whatever a file system may say
      self._failed(e)
      return
    if processes.is_first():
      self._after_save = threading.Thread(target=self._complete, args=(step,))
      self._after_save.start()
    if not self.steps:
      self.settle()

  def load(
    self, step: int, like: step_lib.TrainState, mesh: jax.sharding.Mesh
  ) -> tuple[step_lib.TrainState, Progress]:
    """A checkpoint's state, in the shapes and specs of `like`, on `mesh`.

    Raises:
      Broken: It cannot be read, or is not what was saved.
    """
    arrays = progress = why = None
    try:
      arrays = arrays_lib.Arrays(self._dir / str(step))
      progress = Progress(**json.loads(arrays.record.progress or ""))
    except (OSError, ValueError, TypeError) as e:
      why = record_lib.reason(e)
    if not processes.all_agree(why is None):
      raise Broken(why or "another process cannot read it")
    assert arrays is not None and progress is not None
    state = arrays.load(step_lib.on_mesh(like, mesh))
    if (saved := int(processes.fetch(state.step))) != step:
      raise Broken(f"{self._dir / str(step)} is the checkpoint of step {saved}")
    return state, progress

  def set_aside(self, steps: list[int], why: str) -> None:
    """Moves checkpoints out of the way: their steps will be saved again.

    Those that cannot be moved are told, and read no more.
    """
    if not steps:
      return
    if processes.is_first():
      for step in steps:
        target = self._run_dir / "set_aside" / f"{step}-{why}"
        shutil.rmtree(target, ignore_errors=True)
        try:
          target.parent.mkdir(exist_ok=True)
          os.rename(self._dir / str(step), target)
        except OSError as e:
          self._in_the_way.add(step)
          processes.say(
            f"WARNING: {self._dir / str(step)} could not be moved to {target}"
            f" ({e.strerror}); it is left there, and not used."
          )
    self.steps = self._find()

  def settle(self) -> None:
    """Waits until what is being saved is written, and tells if it is not.

    Raises:
      run_folder.NotSaved: It is not, and there is no other checkpoint.
    """
    if self._saving is None:
      return
    if self._after_save is not None:
      self._after_save.join()
    try:
      self._checkpointer.wait()
    except Exception as e:
      self._failed(e)
    else:
      self._saving = self._unsaved = None
      self.steps = self._find()

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
    with contextlib.suppress(run_folder.NotSaved):  # `finish` has raised it
      self.settle()
    self._checkpointer.close()
    self._clean()

  def _clean(self) -> None:
    """Removes what failed saves left behind: it would fill the disk."""
    if not processes.is_first():
      return
    for _ in range(20):
      left = [*self._dir.glob(f"*{_TEMPORARY}*")]
      if not left:
        break
      for path in left:
        shutil.rmtree(path, ignore_errors=True)
      # A thread of the save that failed may put one more file there.
      time.sleep(0.1)

  def _failed(self, why: Exception) -> None:
    self._unsaved, self._saving = self._saving, None
    self._clean()
    self.steps = self._find()
    free = metrics_lib.size(shutil.disk_usage(self._run_dir).free)
    said = (
      f"the checkpoint of step {self._unsaved} was NOT written: "
      f"{record_lib.reason(why)} ({free} are free in {self._run_dir})."
    )
    if not self.steps:
      raise run_folder.NotSaved(
        f"{said} It would have been the run's first, and a run that cannot be "
        "saved does not go on. Make room, or give another --run-dir."
      ) from why
    processes.say(
      f"ERROR: {said} The newest is {self.steps[-1]}; training goes on, and the"
      " next save is tried as planned."
    )

  def _there(self) -> dict[int, pathlib.Path]:
    """The checkpoints of this run as this process finds them."""
    last = max(self._stage_ends)
    return {
      step: path
      for step, path in run_folder.checkpoints(self._run_dir).items()
      if 0 < step <= last and step not in self._in_the_way
    }

  def _find(self) -> list[int]:
    """Steps of the checkpoints that are there; the same in all processes."""
    own = {0: sorted(self._there())} if processes.is_first() else {}
    return processes.gather_json(own)[0]

  def _tell_odd(self) -> None:
    """Says what else lies among the checkpoints, and is left alone."""
    known = {str(step) for step in self._there()}
    odd = sorted(p.name for p in self._dir.glob("*") if p.name not in known)
    if odd:
      processes.say(
        f"WARNING: what is no checkpoint of this run in {self._dir} is left "
        f"alone: {', '.join(odd)}"
      )

  def _sync(self) -> None:
    """What Orbax has written is on the disk before it gets its name."""
    for path in self._dir.glob(f"{self._saving}{_TEMPORARY}*"):
      atomic_files.sync_all(path)

  def _complete(self, step: int) -> None:
    """Removes what need not stay, once a newer one is on the disk; a thread."""
    try:
      self._checkpointer.wait()
    except Exception:  # `settle` hears of it, too, and tells it
      return
    try:
      atomic_files.sync_all(self._dir / str(step))
      atomic_files.sync(self._dir)
      for path in self._outdated(step):
        # Half of one must not look like a checkpoint.
        path.rename(path.with_name(path.name + _TEMPORARY))
    except OSError as e:
      processes.say(
        f"WARNING: what need not stay of {self._dir} could not be removed "
        f"({e.strerror}); it is tried again after the next save."
      )
    self._clean()

  def _outdated(self, step: int) -> list[pathlib.Path]:
    """Which need not stay, now that there is that of `step`.

    What has a later number is none that this run has saved, and takes no place.
    """
    there = {s: path for s, path in self._there().items() if s <= step}
    measured: dict[int, float | None] = dict.fromkeys(there)
    if self._cfg.keep_best:
      for step in measured:
        with contextlib.suppress(Broken):
          measured[step] = record_lib.read(there[step]).bits_per_byte
    kept = self._cfg.kept(measured, self._stage_ends)
    return [there[step] for step in measured.keys() - kept]

  def _context(self) -> ocp.Context:
    """Chunks of one layer and expert: parts of an array can be read apart.

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
    # A bound method would be copied with the context, and its object as well.
    context.async_options.post_finalization_callback = lambda: self._sync()
    return context


class _Unlisted(ocp.path.step.NameFormat):
  """Orbax names a checkpoint after its step, and looks for no others."""

  def build_name(self, step):
    return str(step)

  def find_all(self, base_path):
    return iter(())

  def find_step(self, base_path, step):
    raise ValueError(f"{step} is not looked for.")
