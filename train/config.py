"""The config of a run: model, data, stages, optimizer, mesh, checkpoints, log.

A run is a Python file in configs/ that defines `config() -> TrainConfig`. Any
field can be set on the command line. Everything that can be wrong in itself is
refused here, before anything compiles.
"""

import dataclasses
import math
import pathlib
import re
import sys
import traceback
import types
from typing import Annotated, Final

import dsa_jax
from dsa_jax import ranges
from dsa_jax import sharding
from train.aot import compile as compile_lib
from train.data import corpus as corpus_lib
from train.host import mesh as mesh_lib
from train.host import processes
from train.learn import guards
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.run import checkpoint as checkpoint_lib
from train.run import metrics as metrics_lib

# A model's sizes, by the rule that says which devices share them.
_CUT: Final = {
  "embed": ("embed_dim",),
  "rank": ("q_rank", "kv_rank"),
  "heads": ("num_heads",),
  "ffn": ("dense_ffn_dim", "expert_ffn_dim"),
  "vocab": ("vocab_size",),
  "experts": ("num_experts",),
  "index_heads": ("index_heads",),
}

_TOLD: Final = 1000  # characters that are shown of an error of a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """A run."""

  run_dir: ranges.Text
  """Where checkpoints, metrics and the config go; one run a folder."""
  model: dsa_jax.ModelConfig
  stages: Annotated[
    tuple[stages_lib.StageConfig, ...], ranges.Length(1, 100, "entries")
  ]
  optimizer: optimizer_lib.OptimizerConfig
  data: corpus_lib.DataConfig = corpus_lib.DataConfig()
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig()
  distributed: processes.DistributedConfig = processes.DistributedConfig()
  checkpoint: checkpoint_lib.CheckpointConfig = (
    checkpoint_lib.CheckpointConfig()
  )
  guard: guards.GuardConfig = guards.GuardConfig()
  log: metrics_lib.LogConfig = metrics_lib.LogConfig()
  init_from: ranges.Text | None = None
  """Begin with the parameters of another run: its folder (the newest checkpoint
  there), or one of its checkpoints, RUN_DIR/checkpoints/STEP. "random" lets a
  stage that continues a model begin with random weights."""
  seed: ranges.Seed = 0
  """Seeds the initial weights, the order of the data, and the samples."""
  resume: bool = False
  """Go on from the newest whole checkpoint in run_dir; begin where there is
  none yet. So one command serves to start a run, and to start it again."""
  kernels: bool = True
  """Let ops run as kernels, where there are some for the device and the shapes;
  if not, as plain XLA: to compare with."""
  compile_only: ranges.Text | None = None
  """Train nothing: compile the steps for TPUs that need not be here, such as
  v5p:8x8x8 (chips along each side), and say what they would take."""
  check: bool = False
  """Train nothing: try everything short of that, and show it."""
  profile: ranges.Text | None = None
  """Trace these steps, such as 10,13 (the first and the last), for xprof or
  Perfetto, to RUN_DIR/profile."""
  stop_at: ranges.Count | None = None
  """Save and stop after this step, as an interruption would."""

  def __post_init__(self):
    ranges.check(self)
    self._check_steps()
    self._check_stages()
    self._check_rules()
    self._check_mesh()

  def _check_steps(self):
    total, last = self.total_steps, 2**31 - 1  # counted in int32
    if total > last:
      raise ValueError(f"The stages have {total} steps, more than {last}.")
    if self.stop_at is not None and self.stop_at > total:
      raise ValueError(
        f"{self.stop_at=} is beyond the last step, {total}; leave it out to "
        "train to the end."
      )
    if self.profile_steps is not None and self.profile_steps[1] > total:
      raise ValueError(
        f"{self.profile=} is beyond the last step, {total}; give steps up to "
        "that."
      )

  def _check_stages(self):
    model, yarn, first = self.model, self.model.yarn, self.stages[0]
    if first.kind != "pretrain" and self.init_from is None:
      raise ValueError(
        f"stages.0 is {first.kind}, which continues a trained model, but there "
        "is none: give --init-from=RUN_DIR of the run that trained it, put a "
        "pretrain stage before it, or, to begin with random weights all the "
        "same, give --init-from=random."
      )
    context = round(yarn.factor * yarn.original_context)
    for i, stage in enumerate(self.stages):
      if stage.trains_indexer and model.top_k > stage.seq_len:
        raise ValueError(
          f"stages.{i} ({stage.kind}): {model.top_k=} exceeds "
          f"stages.{i}.seq_len={stage.seq_len}: there would be nothing to "
          "choose. Lower the one or raise the other."
        )
      if stage.kind == "extend" and yarn.factor == 1:
        raise ValueError(
          f"stages.{i} (extend) turns YaRN on, but {model.yarn.factor=} leaves "
          "it off: give one above 1, or make it a pretrain stage."
        )
      if stage.kind == "extend" and stage.seq_len > context:
        raise ValueError(
          f"stages.{i}.seq_len={stage.seq_len} (extend) exceeds the {context} "
          f"tokens of {model.yarn.factor=} x {model.yarn.original_context=}; "
          "raise model.yarn.factor."
        )

  def _check_mesh(self):
    data, model = self.data, self.model
    rows, sharing = self._shares("batch")
    chunks = 2 * self._shares("seq")[0]  # zigzag: two a device
    for i, stage in enumerate(self.stages):
      part = stage.batch_size // stage.microbatches
      if part % rows:
        raise ValueError(
          f"stages.{i}.batch_size={stage.batch_size} over "
          f"stages.{i}.microbatches={stage.microbatches} leaves {part} "
          f"sequences, which do not divide among the {rows} devices of "
          f"{sharing}."
        )
      if part % data.shards:
        raise ValueError(
          f"stages.{i}.batch_size={stage.batch_size} over "
          f"stages.{i}.microbatches={stage.microbatches} leaves {part} "
          f"sequences, which do not divide among {data.shards=}."
        )
      if chunks > 2 and stage.seq_len % chunks:
        raise ValueError(
          f"stages.{i}.seq_len={stage.seq_len} is not a multiple of {chunks}, "
          f"two chunks for each of the devices of {self._shares('seq')[1]}."
        )
    for axis, names in _CUT.items():
      parts, sharing = self._shares(axis)
      for name in names:
        if getattr(model, name) % parts:
          raise ValueError(
            f"model.{name}={getattr(model, name)} does not divide among the "
            f"{parts} devices of {sharing}, as model.rules.{axis} has it."
          )

  def _shares(self, axis: str) -> tuple[int, str]:
    """How many devices share what a rule cuts, and how they are told."""
    axes = sharding.names(getattr(self.model.rules, axis))
    sizes = {f"mesh.{name}": getattr(self.mesh, name) for name in axes}
    told = " x ".join(f"{name}={size}" for name, size in sizes.items())
    return math.prod(sizes.values()), told

  def _check_rules(self):
    for name, axes in dataclasses.asdict(self.model.rules).items():
      for axis in [axes] if isinstance(axes, str) else axes or ():
        if axis not in sharding.MESH_AXES:
          raise ValueError(
            f"model.rules.{name}={axes!r} names no axis of the mesh; there are "
            f"{', '.join(sharding.MESH_AXES)}."
          )

  @property
  def profile_steps(self) -> tuple[int, int] | None:
    """The first and the last step to trace."""
    if self.profile is None:
      return None
    steps = re.fullmatch("([0-9]{1,10}),([0-9]{1,10})", self.profile)
    first, last = map(int, steps.groups()) if steps else (0, 0)
    if not 1 <= first <= last:
      raise ValueError(
        f"profile={ranges.shown(self.profile)} must be two steps, the first "
        "and the last, such as 10,13."
      )
    return first, last

  @property
  def step_plan(self) -> compile_lib.Plan:
    """Settings that the steps of all stages share."""
    return compile_lib.Plan(
      model=self.model,
      optimizer=self.optimizer,
      guard=self.guard,
      measure_every=self.log.every,
      num_sources=len(self.data.sources),
    )

  @property
  def stage_ends(self) -> tuple[int, ...]:
    """The last step of each stage, counted over all."""
    return stages_lib.ends(self.stages)

  @property
  def total_steps(self) -> int:
    return self.stage_ends[-1]


def load(path: str) -> TrainConfig:
  """Runs a Python file, and returns what its `config()` returns.

  Raises:
    ValueError: There is no such file, it or its `config()` fails, or what that
      returns is no config; the text says in which line.
  """
  file = pathlib.Path(path)
  try:
    if not file.is_file():  # a pipe would be waited for
      raise ValueError(_absent(file))
    source = file.read_bytes()
  except OSError as e:
    reason = e.strerror or str(e)
    raise ValueError(f"--config={path} cannot be read: {reason}.") from e
  if file.suffix != ".py":
    raise ValueError(f"--config={path} is not a Python file, *.py.")
  module = types.ModuleType(re.sub(r"\W", "_", f"config {file}"))
  module.__file__, module.__package__ = str(file), ""
  sys.modules[module.__name__] = module  # its classes look for theirs
  try:
    # Not imported: then what was compiled of an older file could be taken.
    exec(compile(source, str(file), "exec"), vars(module))
    if "config" not in vars(module):
      raise ValueError("it must define `config() -> TrainConfig`")
    made = module.config()
  except BaseException as e:  # the file may do anything
    raise ValueError(
      f"--config={path}{_place(e, str(file))}: {_told(e)}"
    ) from e
  if not isinstance(made, TrainConfig):
    raise ValueError(
      f"--config={path}: config() must return a TrainConfig, and returns "
      f"{ranges.shown(made)}."
    )
  return made


def _absent(file: pathlib.Path) -> str:
  if file.exists():
    return f"--config={file} is no file but a folder or a device; give a *.py."
  known = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
  hint = f" There are: {', '.join(known)}." if known else ""
  return f"--config={file}: there is no such file.{hint}"


def _place(error: BaseException, file: str) -> str:
  """The last line of `file` that an error comes from: ", line 12"."""
  if isinstance(error, SyntaxError) and error.filename == file:
    return f", line {error.lineno}"
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == file]
  return f", line {lines[-1]}" if lines else ""


def _told(error: BaseException) -> str:
  """An error in one line; of those that a config raises, only the text."""
  if isinstance(error, SyntaxError):
    return f"SyntaxError: {error.msg}"
  text = " ".join(str(error).split())
  if len(text) > _TOLD:
    text = f"{text[:_TOLD]}..."
  return (
    text if type(error) is ValueError else f"{type(error).__name__}: {text}"
  )
