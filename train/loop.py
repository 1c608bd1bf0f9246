"""A run: opened and checked, then trained stage after stage."""

from collections.abc import Iterator
import contextlib
import dataclasses
import pathlib
import time
from typing import Final

import jax
import numpy as np

from dsa_jax import flops
from pallas_kernels import dispatch
from train import config as config_lib
from train import stage as stage_lib
from train.data import corpus as corpus_lib
from train.host import json_files
from train.host import memory
from train.host import outputs
from train.host import ownership
from train.host import processes
from train.host import signals
from train.host import watchdog as watchdog_lib
from train.learn import batches as batches_lib
from train.learn import stages as stages_lib
from train.learn import step as step_lib
from train.run import checkpoint as checkpoint_lib
from train.run import goodput
from train.run import metrics as metrics_lib
from train.run import origin as origin_lib
from train.run import provenance
from train.run import run_folder
from train.run import tracing as tracing_lib

_TOKEN_BYTES: Final = 20  # five arrays, see `train/data/corpus.py`
# What may end `Run.train`; each says all that a person needs.
ENDS: Final = (
  corpus_lib.DataError,
  json_files.Damaged,
  ownership.Owned,
  stage_lib.Diverged,
  OSError,  # Broken, NotSaved, and what else of a disk
)


class Run:
  """A run, opened and checked, ready to train.

  Attributes:
    position: Where it stands.
  """

  def __init__(self, cfg: config_lib.TrainConfig):
    """Checks everything that can be wrong, before anything compiles; changes
    nothing in the run's folder.

    Raises:
      ValueError: The data, the devices or the folder do not fit the config;
        see `Corpus`, `make_mesh`, `run_folder.check`.
    """
    self.cfg = cfg
    self._began = time.time()
    run_folder.check(cfg.run_dir, dataclasses.asdict(cfg), resume=cfg.resume)
    quarantine = pathlib.Path(cfg.run_dir) / "quarantine"
    self.corpus = corpus_lib.Corpus(cfg.data, None if cfg.check else quarantine)
    for stage in cfg.stages:
      self.corpus.check_sizes(stage.seq_len, stage.batch_size)
    vocab = self.corpus.tokenizer.vocab_size
    if cfg.model.vocab_size < vocab:
      raise ValueError(
        f"model.vocab_size={cfg.model.vocab_size} is too small for the "
        f"tokenizer {cfg.data.tokenizer}; give at least {vocab}."
      )
    metrics_lib.check_wandb(cfg.log.wandb)
    self.mesh = cfg.mesh.make()
    processes.check_mesh(self.mesh)
    self.origin = None
    if cfg.init_from is not None and cfg.init_from != "random":
      self.origin = origin_lib.Origin(cfg.init_from, cfg.model)
    with jax.set_mesh(self.mesh):
      _, self._init = step_lib.init(cfg.model, cfg.seed)
    self._check_memory()
    self.position = stage_lib.Position()

  def _check_memory(self) -> None:
    """Refuses what this host cannot hold, before it is asked for: a step's
    batch and two blocks of data; on a CPU, parameters and optimizer."""
    have, size = memory.total(), metrics_lib.size
    devices = self.mesh.devices.flat
    for i, stage in enumerate(self.cfg.stages):
      batch = 3 * _TOKEN_BYTES * stage.tokens_per_step // jax.process_count()
      if batch > have:
        raise ValueError(
          f"stages.{i}.batch_size={stage.batch_size} x stages.{i}.seq_len="
          f"{stage.seq_len} take {size(batch)} of memory to read, and this "
          f"host has {size(have)}; lower one of them."
        )
      if devices[0].platform == "cpu":
        with jax.set_mesh(self.mesh):
          states = jax.tree.leaves(self.shapes(stage))
        here = [x.process_index == processes.number() for x in devices]
        held = sum(_local_bytes(x) for x in states) * sum(here)
        if held > have:
          raise ValueError(
            f"stages.{i}: parameters and optimizer take {size(held)}, "
            f"and this host has {size(have)} of memory; make model.num_layers, "
            "or another size of the model, smaller."
          )

  @property
  def step(self) -> int:
    """The last step done, over all stages."""
    return self.position.step

  @contextlib.contextmanager
  def own(self) -> Iterator[ownership.Claim]:
    """Inside, no other program writes in the run's folder.

    Raises:
      Owned: Another does; nothing was changed.
      NotSaved: The folder cannot be written to, or another run has begun there
        meanwhile.
    """
    cfg = self.cfg
    try:
      claim = ownership.Claim(cfg.run_dir)
    except OSError as e:
      raise run_folder.NotSaved(
        f"run_dir={cfg.run_dir} cannot be written to ({e.strerror}: "
        f"{e.filename}): a run keeps its checkpoints and metrics there. Give "
        "another --run-dir."
      ) from e
    with contextlib.closing(claim):
      with _checking_again():  # it may have been another's a moment ago
        run_folder.check(
          cfg.run_dir, dataclasses.asdict(cfg), resume=cfg.resume
        )
      yield claim

  def train(self) -> None:
    """Trains to the end, or until stopped; both save.

    Raises:
      Owned: Another program trains there.
      Diverged: Too many steps had to be skipped.
      Broken: There are checkpoints to go on from, and none is whole.
      NotSaved: The folder cannot be written to, or the last checkpoint was not.
      DataError: The data end, or cannot be read any more.
    """
    cfg = self.cfg
    with contextlib.ExitStack() as stack:
      stack.enter_context(signals.asking(self._stop))
      claim = stack.enter_context(self.own())
      run_dir = pathlib.Path(cfg.run_dir)
      stack.enter_context(processes.log_to(run_dir / "log.txt"))
      with _checking_again():
        self.checkpoints = open_checkpoints(cfg)
      with outputs.Output(f"{run_dir}/versions").attempt():
        provenance.write(run_dir)
      watchdog = stack.enter_context(
        contextlib.closing(
          watchdog_lib.Watchdog(cfg.guard.stall_seconds, run_dir / "stalls")
        )
      )
      stack.enter_context(contextlib.closing(self.checkpoints))
      stack.enter_context(jax.set_mesh(self.mesh))
      stack.enter_context(dispatch.kernels(cfg.kernels))
      processes.say(self.summary())
      state = self._start()
      if cfg.stop_at is not None and self.step >= cfg.stop_at:
        self.position.stopping = True  # it has been there already
      self.clock = goodput.Clock(cfg.run_dir, self.step, began=self._began)
      stack.enter_context(contextlib.closing(self.clock))
      tracing = stack.enter_context(
        tracing_lib.Tracing(cfg.run_dir, cfg.profile_steps)
      )
      self.metrics = metrics_lib.Writer(
        cfg.run_dir,
        self.step + 1,
        again=self.position.progress.owes_evaluation,
        tensorboard=cfg.log.tensorboard,
        wandb=cfg.log.wandb,
      )
      stack.enter_context(contextlib.closing(self.metrics))
      services = stage_lib.Services(
        self.mesh,
        self.corpus,
        self._parameters(),
        self.checkpoints,
        self.metrics,
        self.clock,
        claim,
        watchdog,
        tracing,
      )
      for i, end in enumerate(cfg.stage_ends):
        owes = self.step == end and self.position.progress.owes_evaluation
        if not self.position.stopping and (self.step < end or owes):
          state = stage_lib.Stage(cfg, i, services, self.position).run(state)
      self.checkpoints.finish()
      self._farewell(state)

  def summary(self) -> str:
    """Describes the run and its cost."""
    cfg, model = self.cfg, self.cfg.model
    total = metrics_lib.count(flops.total_parameters(model))
    active = metrics_lib.count(flops.active_parameters(model))
    devices = jax.devices()[: self.mesh.size]
    axes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
    lines = [
      f"run      {cfg.run_dir}",
      f"model    {total} parameters, {active} active; {model.num_layers} layers"
      f" ({model.num_dense_layers} dense, {model.num_moe_layers} of"
      f" {model.num_experts} experts), {model.num_mtp_layers} MTP;"
      f" {model.dtype} over {model.param_dtype}",
      f"data     {self.corpus}",
      f"mesh     {self.mesh.size} x {devices[0].device_kind} ({axes})",
    ]
    for i, stage in enumerate(cfg.stages):
      cost = stage.flops_per_token(model)
      held = sum(_local_bytes(x) for x in jax.tree.leaves(self.shapes(stage)))
      tokens = stage.steps * stage.tokens_per_step
      keys = f", K {model.top_k}" if stage.attention == "sparse" else ""
      lines.append(
        f"stage {i}  {stage.kind}: {stage.steps} steps x {stage.batch_size} x"
        f" {stage.seq_len} = {metrics_lib.count(tokens)} tokens;"
        f" {stage.attention} attention{keys};"
        f" {metrics_lib.count(cost)}FLOP a token; parameters and optimizer"
        f" {metrics_lib.size(held)} a device"
      )
    return "\n".join(lines)

  def shapes(self, stage: stages_lib.StageConfig) -> step_lib.TrainState:
    """Shapes of everything that a stage changes and saves; needs the mesh."""
    return stage_lib.state_shapes(self.cfg, stage, self._parameters())

  def _parameters(self) -> step_lib.Parameters:
    return jax.eval_shape(self._init, jax.random.key(0))

  def _start(self) -> step_lib.TrainState:
    """The initial state, or that of the newest whole checkpoint."""
    cfg, parameters = self.cfg, self._parameters()
    steps = self.checkpoints.steps
    if steps:
      restored = stage_lib.restore(
        cfg, self.checkpoints, parameters, self.mesh, steps
      )
      if restored is None:
        raise checkpoint_lib.Broken(
          f"None of the checkpoints in {cfg.run_dir} ({steps}) is whole; "
          "nothing there was changed. Bring one back from a copy, or begin "
          "anew with another --run-dir."
        )
      state, found = restored
      batches_lib.compare(self.corpus, found.progress.data)
      self.position.step, self.position.progress = found.step, found.progress
      newer = [step for step in steps if step > self.step]
      self.checkpoints.set_aside(newer, "broken")
      processes.say(f"resumed  after step {self.step}")
      return state
    if self.origin is not None:
      params, bias = self.origin.restore(parameters, self.mesh)
      processes.say(f"begins   with the parameters of {self.origin}")
    else:
      # It runs once, but a CPU's compiler would spend as long on its many
      # generators of random numbers as on a training step.
      options = {"xla_backend_optimization_level": 0}
      init = jax.jit(
        self._init,
        compiler_options=options if dispatch.platform() == "cpu" else None,
      )
      params, bias = init(jax.random.key(cfg.seed))
    return step_lib.begin_stage(
      cfg.optimizer, cfg.stages[0], params, bias, step=0
    )

  def _farewell(self, state) -> None:
    """The last lines: what came of it, where it lies, and what to do next."""
    cfg, step = self.cfg, int(state.step)
    if step < cfg.total_steps:
      saved = "saved" if step in self.checkpoints.steps else "nothing to save"
      processes.say(
        f"stopped after step {step} of {cfg.total_steps}; {saved}. Go on with "
        "the same command and --resume."
      )
      return
    if processes.is_first():
      self.clock.note(step)
      processes.say(str(goodput.account(cfg.run_dir)))
    processes.say(
      f"done: {step} steps\n"
      f"  checkpoints  {cfg.run_dir}/checkpoints (newest: {step})\n"
      f"  metrics      {self.metrics.file}\n"
      f"  config       {cfg.run_dir}/config.json, versions/, log.txt\n"
      "next: `make test` proves the parts right; README.md shows how to import "
      "them; give --data.sources.0.path='my/*.txt' and another --run-dir to "
      "train on your own text."
    )

  def _stop(self) -> None:
    self.position.stopping = True


@contextlib.contextmanager
def _checking_again() -> Iterator[None]:
  """Inside, what no longer fits ends a run that has begun, as a disk does."""
  try:
    yield
  except ValueError as e:
    raise run_folder.NotSaved(str(e)) from e


def open_checkpoints(
  cfg: config_lib.TrainConfig,
) -> checkpoint_lib.Checkpoints:
  """Opens the checkpoints of the run that `cfg` describes."""
  return checkpoint_lib.Checkpoints(
    cfg.run_dir,
    cfg.checkpoint,
    dataclasses.asdict(cfg),
    stage_ends=cfg.stage_ends,
    resume=cfg.resume,
  )


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
  """Bytes of an array on one device."""
  shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
  return int(np.prod(shape)) * x.dtype.itemsize
