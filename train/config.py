"""What a run is: model, data, stages, optimizer, mesh, checkpoints, log.

A run is a Python file in configs/ that defines `config() -> TrainConfig`. Any
field can be set on the command line. Everything that can be wrong in itself is
refused here, before anything compiles.
"""

import dataclasses
import importlib.util
import itertools
import pathlib
from typing import Literal

import dsa_jax
from train.data import corpus as corpus_lib
from train.host import processes
from train.learn import guards

type Kind = Literal["pretrain", "extend", "warmup", "sparse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of training; it begins with the parameters of the one before."""

  kind: Kind
  """pretrain: dense attention without YaRN; trains all but the indexer. extend:
  the same with YaRN, for longer sequences. warmup: dense attention; trains the
  indexer alone, by its KL to that attention. sparse: DSA; trains the model by
  its language loss, the indexer by its KL."""
  steps: int
  """Optimizer steps."""
  seq_len: int
  """T, tokens of a sequence."""
  batch_size: int
  """Sequences of a step, over all devices."""
  microbatches: int = 1
  """Parts that a step's batch is computed in, one after the other."""
  lr_scale: float = 1.0
  """Multiplies optimizer.peak_lr."""
  indexer_lr_scale: float = 1.0
  """Multiplies optimizer.indexer_lr."""
  mtp_weight: float = 0.3
  """Weight of the MTP loss."""
  balance_weight: float = 1e-4
  """Weight of the sequence-wise balance loss."""
  router_bias_rate: float = 1e-3
  """How far a step moves the routers' biases toward balance."""

  def __post_init__(self):
    for name in ("steps", "seq_len", "batch_size", "microbatches"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    if self.seq_len < 4:
      raise ValueError(f"{self.seq_len=} must be at least 4.")
    if self.batch_size % self.microbatches:
      raise ValueError(
        f"{self.batch_size=} must be a multiple of {self.microbatches=}."
      )
    for name in (
      "lr_scale",
      "indexer_lr_scale",
      "mtp_weight",
      "balance_weight",
      "router_bias_rate",
    ):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")

  @property
  def attention(self) -> Literal["dense", "sparse"]:
    return "sparse" if self.kind == "sparse" else "dense"

  @property
  def trains_model(self) -> bool:
    return self.kind != "warmup"

  @property
  def trains_indexer(self) -> bool:
    return self.kind in ("warmup", "sparse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with clipping, and a warm-up, constant, cosine schedule a stage."""

  peak_lr: float
  """Learning rate of the model between warm-up and decay."""
  indexer_lr: float = 1e-3
  """The same of the indexer."""
  warmup: float = 0.05
  """Fraction of a stage's steps in which the rate rises from 0."""
  decay: float = 0.5
  """Fraction of them, at the end, in which it falls."""
  final: float = 0.1
  """Where it falls to, as a fraction of the peak."""
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  """Of matrices; norms have none."""
  moments: Literal["float32", "bfloat16"] = "float32"
  """What both moments are kept in; DeepSeek-V3 took bfloat16."""
  clip_norm: float = 1.0
  """Largest norm of the model's gradient, and of the indexer's."""

  def __post_init__(self):
    for name in ("peak_lr", "indexer_lr", "epsilon", "clip_norm"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
    for name in ("warmup", "decay", "final"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name}={getattr(self, name)} must lie in 0..1.")
    if self.warmup + self.decay > 1:
      raise ValueError(f"{self.warmup=} and {self.decay=} exceed 1 together.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis of the mesh; their product is what is used."""

  data: int = 1
  """Copies of the model."""
  fsdp: int = 1
  """Devices that share each copy's weights."""
  expert: int = 1
  """Devices that share the experts, and exchange tokens."""
  context: int = 1
  """Devices that share a sequence."""
  tensor: int = 1
  """Devices that share heads, ffn and vocabulary."""

  def __post_init__(self):
    for axis, size in dataclasses.asdict(self).items():
      if size < 1:
        raise ValueError(f"mesh.{axis}={size} must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When to save. The end of each stage is always saved, and stays."""

  every: int = 1000
  """Steps between checkpoints."""
  keep: int = 3
  """How many of the newest stay, besides."""
  keep_every: int | None = None
  """Those of every so many-th step stay, too."""
  keep_best: int = 0
  """So many stay that lost least on held-out text, of those saved right after
  an evaluation."""

  def __post_init__(self):
    if self.every < 1 or self.keep < 1:
      raise ValueError(f"{self.every=} and {self.keep=} must be at least 1.")
    if self.keep_every is not None and self.keep_every < 1:
      raise ValueError(f"{self.keep_every=} must be at least 1.")
    if self.keep_best < 0:
      raise ValueError(f"{self.keep_best=} must be at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  """What to print and write, and when."""

  every: int = 10
  """Steps between progress lines, and between measurements of the indexer."""
  eval_every: int = 1000
  """Steps between evaluations on held-out text, and of retrieval if that is
  trained. At the end of a stage, in both ways of attending."""
  eval_batches: int = 8
  """Batches of an evaluation."""
  sample_every: int = 1000
  """Steps between samples of text; also at the end of the run."""
  sample_prompt: str = "def "
  """What a sample continues."""
  sample_tokens: int = 128
  """Tokens of a sample."""
  sample_temperature: float = 0.7
  """0 takes the likeliest token each time."""
  tensorboard: bool = False
  """Also write TensorBoard events, to RUN_DIR/tensorboard."""
  wandb: str | None = None
  """Also send them to this project at Weights & Biases."""

  def __post_init__(self):
    for name in (
      "every",
      "eval_every",
      "eval_batches",
      "sample_every",
      "sample_tokens",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    if not self.sample_prompt:
      raise ValueError("sample_prompt is empty; give at least one character.")
    if self.sample_temperature < 0:
      raise ValueError(f"{self.sample_temperature=} must be at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """A run."""

  run_dir: str
  """Where checkpoints, metrics and the config go; one run a folder."""
  model: dsa_jax.ModelConfig
  stages: tuple[StageConfig, ...]
  optimizer: OptimizerConfig
  data: corpus_lib.DataConfig = corpus_lib.DataConfig()
  mesh: MeshConfig = MeshConfig()
  distributed: processes.DistributedConfig = processes.DistributedConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  guard: guards.GuardConfig = guards.GuardConfig()
  log: LogConfig = LogConfig()
  init_from: str | None = None
  """Begin with the parameters of another run: its folder (the newest checkpoint
  there), or one of its checkpoints, RUN_DIR/checkpoints/STEP. "random" lets a
  stage that continues a model begin with random weights."""
  seed: int = 0
  """Of the initial weights, the order of the data, and the samples."""
  resume: bool = False
  """Go on from the newest whole checkpoint in run_dir; begin where there is
  none yet. So one command serves to start a run, and to start it again."""
  kernels: bool = True
  """Let ops run as kernels, where there are some for the device and the shapes;
  if not, as plain XLA: to compare with."""
  compile_only: str | None = None
  """Train nothing: compile the steps for TPUs that need not be here, such as
  v5p:8x8x8 (chips along each side), and say what they would take."""
  check: bool = False
  """Train nothing: try everything short of that, and show it."""
  profile: str | None = None
  """Trace these steps, such as 10,13 (the first and the last), for xprof or
  Perfetto, to RUN_DIR/profile."""
  stop_at: int | None = None
  """Save and stop after this step, as an interruption would."""

  def __post_init__(self):
    if not self.stages:
      raise ValueError("stages is empty; a run needs at least one.")
    if self.seed < 0:
      raise ValueError(f"{self.seed=} must be at least 0.")
    if self.stop_at is not None and self.stop_at < 1:
      raise ValueError(f"{self.stop_at=} must be at least 1.")
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

  def stage_model(self, stage: StageConfig) -> dsa_jax.ModelConfig:
    """The model as a stage runs it: pretraining knows no YaRN yet."""
    if stage.kind != "pretrain":
      return self.model
    yarn = dataclasses.replace(self.model.yarn, factor=1.0)
    return dataclasses.replace(self.model, yarn=yarn)

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
  def stage_ends(self) -> tuple[int, ...]:
    """The last step of each stage, counted over all."""
    return tuple(itertools.accumulate(stage.steps for stage in self.stages))

  @property
  def total_steps(self) -> int:
    return self.stage_ends[-1]


def load(path: str) -> TrainConfig:
  """What `config()` of a Python file returns.

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
