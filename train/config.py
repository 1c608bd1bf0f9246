"""The config of a run: model, data, stages, optimizer, mesh, checkpoints, log.

A run is a Python file in configs/ that defines `config() -> TrainConfig`. Any
field can be set on the command line. Everything that can be wrong in itself is
refused here, before anything compiles.
"""

import dataclasses
import importlib.util
import pathlib
from typing import Annotated

import dsa_jax
from dsa_jax import ranges
from train.aot import compile as compile_lib
from train.data import corpus as corpus_lib
from train.host import mesh as mesh_lib
from train.host import processes
from train.learn import guards
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.run import checkpoint as checkpoint_lib
from train.run import metrics as metrics_lib


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
    self.profile_steps  # noqa: B018  (raises)
    self._check_stages()
    self._check_mesh()

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
          f"stages.{i} ({stage.kind}): model.top_k={model.top_k} exceeds "
          f"seq_len={stage.seq_len}: there would be nothing to choose. Lower "
          "model.top_k or raise seq_len."
        )
      if stage.kind == "extend" and yarn.factor == 1:
        raise ValueError(
          f"stages.{i} (extend) turns YaRN on, but {yarn.factor=} leaves it "
          "off: set model.yarn.factor above 1, or make it a pretrain stage."
        )
      if stage.kind == "extend" and stage.seq_len > context:
        raise ValueError(
          f"stages.{i} (extend): seq_len={stage.seq_len} exceeds the {context} "
          f"tokens of {yarn.factor=} x {yarn.original_context=}; raise "
          "model.yarn.factor."
        )

  def _check_mesh(self):
    mesh, model = self.mesh, self.model
    rows = mesh.data * mesh.fsdp * mesh.expert
    for i, stage in enumerate(self.stages):
      part = stage.batch_size // stage.microbatches
      if part % rows:
        raise ValueError(
          f"stages.{i}: {part} sequences a microbatch (batch_size over "
          f"microbatches) do not divide among the {rows} devices of "
          "mesh.data x fsdp x expert."
        )
      if part % self.data.shards:
        raise ValueError(
          f"stages.{i}: {part} sequences a microbatch do not divide among "
          f"data.shards={self.data.shards}."
        )
      chunks = 2 * mesh.context  # zigzag: two a device
      if mesh.context > 1 and stage.seq_len % chunks:
        raise ValueError(
          f"stages.{i}: seq_len={stage.seq_len} is not a multiple of {chunks}, "
          f"two chunks for each of mesh.context={mesh.context} devices."
        )
    for name, axis in (
      ("num_heads", "tensor"),
      ("dense_ffn_dim", "tensor"),
      ("expert_ffn_dim", "tensor"),
      ("vocab_size", "tensor"),
      ("num_experts", "expert"),
    ):
      value, size = getattr(model, name), getattr(mesh, axis)
      if value % size:
        raise ValueError(
          f"model.{name}={value} does not divide by mesh.{axis}={size}."
        )
    for name in ("embed_dim", "q_rank", "kv_rank"):
      if getattr(model, name) % (mesh.fsdp * mesh.context):
        raise ValueError(
          f"model.{name}={getattr(model, name)} does not divide by the "
          f"{mesh.fsdp=} x {mesh.context=} devices that share the weights."
        )

  @property
  def profile_steps(self) -> tuple[int, int] | None:
    """The first and the last step to trace."""
    if self.profile is None:
      return None
    first, _, last = self.profile.partition(",")
    if not (first.isdecimal() and last.isdecimal()) or not (
      1 <= int(first) <= int(last)
    ):
      raise ValueError(
        f"profile={self.profile!r} must be two steps, the first and the last, "
        "such as 10,13."
      )
    return int(first), int(last)

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
  """Returns what `config()` of a Python file returns.

  Raises:
    ValueError: There is no such file, or no such function in it.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    known = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
    hint = f" There are: {', '.join(known)}." if known else ""
    raise ValueError(f"--config={path}: there is no such file.{hint}")
  spec = importlib.util.spec_from_file_location(f"configs.{file.stem}", file)
  if spec is None or spec.loader is None:
    raise ValueError(f"--config={path} is not a Python file.")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "config"):
    raise ValueError(f"--config={path} must define `config() -> TrainConfig`.")
  return module.config()
