"""The loop: data, step, log, evaluate, sample, save; stage after stage."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

import dsa_jax
from dsa_jax import flops
from dsa_jax import sharding
from pallas_kernels import dispatch
from train import config as config_lib
from train import evaluation
from train.data import corpus as corpus_lib
from train.host import processes
from train.host import watchdog
from train.learn import batches as batches_lib
from train.learn import optimizer as optimizer_lib
from train.learn import step as step_lib
from train.run import checkpoint as checkpoint_lib
from train.run import goodput
from train.run import metrics as metrics_lib
from train.run import provenance
from train.run import stage_log


class Diverged(RuntimeError):
  """Step after step must be skipped; the checkpoints before them stay."""


class Run:
  """A run, opened and checked, ready to train.

  Attributes:
    step: The last one done, over all stages.
    progress: What is known besides the train state.
  """

  def __init__(self, cfg: config_lib.TrainConfig):
    """Checks everything that can be wrong, before anything compiles; changes
    nothing in the run's folder.

    Raises:
      ValueError: The data, the devices or the folder do not fit the config;
        see `Corpus`, `make_mesh`, `checkpoint.check`.
    """
    self.cfg = cfg
    self._began = time.time()
    checkpoint_lib.check(cfg)
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
    self.mesh = sharding.make_mesh(**dataclasses.asdict(cfg.mesh))
    processes.check_mesh(self.mesh)
    self.origin = None
    if cfg.init_from not in (None, "random"):
      self.origin = checkpoint_lib.Origin(cfg)
    with jax.set_mesh(self.mesh):
      _, self._init = step_lib.init(cfg.model, cfg.seed)
    self.step, self.progress = 0, checkpoint_lib.Progress()
    self._stop, self._tracing = False, False

  def train(self) -> None:
    """Trains to the end, or until stopped; both save.

    Raises:
      Diverged: Too many steps had to be skipped.
      Broken: There are checkpoints to go on from, and none is whole.
      NotSaved: The folder cannot be written to, or the last checkpoint was not.
      DataError: The data end, or cannot be read any more.
    """
    cfg = self.cfg
    self.checkpoints = checkpoint_lib.Checkpoints(cfg)
    with contextlib.ExitStack() as stack:
      run_dir = pathlib.Path(cfg.run_dir)
      stack.enter_context(processes.log_to(run_dir / "log.txt"))
      provenance.write(run_dir)
      self.watchdog = watchdog.Watchdog(
        cfg.guard.stall_seconds, run_dir / "stalls"
      )
      stack.enter_context(contextlib.closing(self.watchdog))
      stack.enter_context(contextlib.closing(self.checkpoints))
      stack.enter_context(jax.set_mesh(self.mesh))
      stack.enter_context(dispatch.kernels(cfg.kernels))
      stack.enter_context(processes.signals(self._ask_to_stop))
      processes.say(self.summary())
      state = self._start()
      self.clock = goodput.Clock(cfg.run_dir, self.step, began=self._began)
      stack.enter_context(contextlib.closing(self.clock))
      stack.callback(self._trace_until)
      self.metrics = metrics_lib.Writer(
        cfg.run_dir,
        self.step + 1,
        again=self.progress.owes_evaluation,
        tensorboard=cfg.log.tensorboard,
        wandb=cfg.log.wandb,
      )
      stack.enter_context(contextlib.closing(self.metrics))
      for i, end in enumerate(cfg.stage_ends):
        owes = self.step == end and self.progress.owes_evaluation
        if not self._stop and (self.step < end or owes):
          state = self._stage(i, state)
      self.checkpoints.finish()
      self._farewell(state)

  def summary(self) -> str:
    """What is about to run, and what it costs."""
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
      cost = stage_log.flops_per_token(model, stage)
      held = sum(_local_bytes(x) for x in jax.tree.leaves(self.shapes(stage)))
      tokens = stage.steps * stage.batch_size * stage.seq_len
      keys = f", K {model.top_k}" if stage.attention == "sparse" else ""
      lines.append(
        f"stage {i}  {stage.kind}: {stage.steps} steps x {stage.batch_size} x"
        f" {stage.seq_len} = {metrics_lib.count(tokens)} tokens;"
        f" {stage.attention} attention{keys};"
        f" {metrics_lib.count(cost)}FLOP a token; parameters and optimizer"
        f" {metrics_lib.size(held)} a device"
      )
    return "\n".join(lines)

  def shapes(self, stage: config_lib.StageConfig) -> step_lib.TrainState:
    """Of all that a stage changes and saves; needs the mesh."""
    return jax.eval_shape(functools.partial(self._fresh, stage), *self._like())

  def _like(self) -> Any:
    return jax.eval_shape(self._init, jax.random.key(0))

  def _fresh(self, stage, params, bias, step=0) -> step_lib.TrainState:
    return step_lib.begin_stage(self.cfg.optimizer, stage, params, bias, step)

  def _start(self) -> step_lib.TrainState:
    """The initial state, or that of the newest whole checkpoint."""
    cfg = self.cfg
    steps = self.checkpoints.steps
    if steps:
      state = self._restore(steps)
      if state is None:
        raise checkpoint_lib.Broken(
          f"None of the checkpoints in {cfg.run_dir} ({steps}) is whole; "
          "nothing there was changed. Bring one back from a copy, or begin "
          "anew with another --run-dir."
        )
      newer = [step for step in steps if step > self.step]
      self.checkpoints.set_aside(newer, "broken")
      processes.say(f"resumed  after step {self.step}")
      return state
    if self.origin is not None:
      params, bias = self.origin.restore(self._like(), self.mesh)
      processes.say(f"begins   with the parameters of {self.origin}")
    else:
      params, bias = self._init(jax.random.key(cfg.seed))
    return self._fresh(cfg.stages[0], params, bias)

  def _restore(self, steps: list[int]) -> step_lib.TrainState | None:
    """The state of the newest of these checkpoints that is whole, if any is;
    `step` and `progress` are then those of it."""
    cfg = self.cfg
    for step in sorted(steps, reverse=True):
      # The stage that saved it knows what its optimizer holds.
      saved = next(
        s for s, end in zip(cfg.stages, cfg.stage_ends) if step <= end
      )
      try:
        state, self.progress = self.checkpoints.load(
          step, self.shapes(saved), self.mesh
        )
      except checkpoint_lib.Broken as e:
        processes.say(f"ERROR: the checkpoint of step {step} is broken: {e}")
      else:
        self.step = step
        return state
    return None

  def _stage(self, i: int, state: step_lib.TrainState) -> step_lib.TrainState:
    """Trains stage `i`, from where it stands."""
    cfg, stage = self.cfg, self.cfg.stages[i]
    end = cfg.stage_ends[i]
    begin = end - stage.steps
    batches = batches_lib.Batches(
      self.corpus, stage, cfg.model.rules, cfg.seed + i, cfg.data.shards
    )
    if self.step > begin:
      batches.set_state(self.progress.data)
    else:
      state = self._begin_stage(stage, state)
    optimizer = optimizer_lib.make_optimizer(cfg.optimizer, stage)
    model, _ = step_lib.init(cfg.stage_model(stage), cfg.seed)
    log = stage_log.StageLog(
      cfg,
      i,
      self.mesh,
      self.corpus,
      self.metrics,
      self.clock,
      self.progress.tokens,
    )
    evaluate = evaluation.Evaluation(
      cfg, stage, model, self.corpus, self.metrics
    )

    def samples(step):
      every = step % cfg.log.sample_every == 0 and step < end
      return every or step == cfg.total_steps

    def measure(state, step):
      """Evaluates and samples, if it is time; held-out bits per byte, if so."""
      bits_per_byte = None
      if step == end or step % cfg.log.eval_every == 0:
        with self.clock.spend("evaluation"), self.watchdog.paused():
          bits_per_byte = evaluate(step, state, last=step == end)
      if samples(step):
        with self.clock.spend("sample"), self.watchdog.paused():
          self._sample(step, state, stage)
      return bits_per_byte

    def save(state, step, bits_per_byte=None):
      with self.clock.spend("checkpoint"):
        self.progress.data = batches.get_state()
        model = cfg.stage_model(stage)
        self.checkpoints.save(state, step, self.progress, model, bits_per_byte)
      self.clock.saved(step)
      if processes.is_first():
        spent = goodput.account(cfg.run_dir)
        self.metrics.write(
          step, "goodput", {"share": spent.goodput, "seconds": spent.seconds}
        )

    @contextlib.contextmanager
    def keeping(state, step, owes_evaluation=False):
      """Where the data fail, what was trained is saved."""
      try:
        yield
      except corpus_lib.DataError:
        if pending:
          log(*pending)
        if jax.process_count() == 1:  # the others have gone on
          self.progress.owes_evaluation = owes_evaluation
          save(state, step)
        raise

    def read():
      with self.clock.spend("data"):
        return next(batches)

    pending = None  # the metrics of a step that are not read
    if self.progress.owes_evaluation:
      measure(state, self.step)
      self.progress.owes_evaluation = False
    if self.step == end:
      batches.close()
      return state
    train_step = step_lib.make_train_step(
      model,
      stage,
      optimizer,
      cfg.guard,
      cfg.log.every,
      len(self.corpus.source_names),
    )
    batch = read()
    train_step = self._compile(train_step, state, batch, stage)
    log.restart_clock()
    while self.step < end:
      self._trace_from(self.step + 1)
      state, metrics = train_step(state, batch)
      self.step = step = self.step + 1
      self.watchdog.alive(f"step {step}")
      # The data of step + 1 is fetched, and the numbers of step - 1 are read,
      # while the device works on this step.
      stops = processes.asked_to_stop(self._stop, step) or step == cfg.stop_at
      saves = stops or step == end or step % cfg.checkpoint.every == 0
      measures = step == end or (
        step % cfg.log.eval_every == 0 or samples(step)
      )
      if pending:
        log(*pending)
      pending = step, metrics
      # What a checkpoint has behind it is on the disk before it.
      if saves or measures or self._traces_last(step):
        log(*pending)
        pending = None
      self._trace_until(step)
      if log.in_a_row >= cfg.guard.patience and not stops:
        with self.clock.spend("restore"):
          state, pending = self._roll_back(stage, begin, log), None
        batch = read()
        continue
      bits_per_byte = None
      if measures and not stops:  # who asks to stop may not wait
        with keeping(state, step, owes_evaluation=True):
          bits_per_byte = measure(state, step)
      if saves:
        self.progress.owes_evaluation = measures and stops
        save(state, step, bits_per_byte)
      if saves or measures:
        log.restart_clock()
      if stops:
        self._stop = True
        break
      if step < end:
        with keeping(state, step):
          batch = read()
    batches.close()
    return state

  def _begin_stage(self, stage, state) -> step_lib.TrainState:
    fresh = functools.partial(self._fresh, stage, step=self.step)
    return jax.jit(fresh)(state.params, state.router_bias)

  def _roll_back(
    self, stage: config_lib.StageConfig, begin: int, log: stage_log.StageLog
  ) -> step_lib.TrainState:
    """The state before the steps that were skipped in a row.

    The data are not gone back to: the next batch is one that was not seen.
    """
    guard, reached, progress = self.cfg.guard, self.step, self.progress
    first = log.step - log.in_a_row + 1
    self.checkpoints.settle()
    steps = self.checkpoints.steps
    tried = [step for step in steps if max(begin, 1) <= step < first]
    trouble = (
      f"steps {first} to {log.step} had to be skipped, one after the other"
      f" ({log.trouble})"
    )
    remedy = (
      f"Lower --optimizer.{'peak' if stage.trains_model else 'indexer'}-lr; "
      "the checkpoints before these steps are kept."
    )
    if progress.rollbacks >= guard.rollbacks:
      raise Diverged(
        f"{trouble}, after {progress.rollbacks} rollbacks. {remedy}"
      )
    state = self._restore(tried)
    if state is None:
      raise Diverged(
        f"{trouble}, and there is no checkpoint of this stage before them to "
        f"go back to. {remedy}"
      )
    # What was seen is seen: only the parameters go back.
    self.progress = dataclasses.replace(
      progress, rollbacks=progress.rollbacks + 1
    )
    later = [step for step in steps if step > self.step]
    self.checkpoints.set_aside(later, f"rollback-{self.progress.rollbacks}")
    if self.step == begin:
      state = self._begin_stage(stage, state)
    self.clock.went_back(reached, self.step)
    self.metrics.go_back(self.step + 1)
    self.metrics.write(
      self.step,
      "incident",
      {
        "what": "rollback",
        "from": reached,
        "why": trouble,
        "steps_of_data_left_out": reached - self.step,
      },
    )
    processes.say(
      f"ROLLBACK {self.progress.rollbacks} of {guard.rollbacks}: {trouble}. "
      f"Goes on from the checkpoint of step {self.step}, with the data after "
      f"those of step {reached}."
    )
    log.begin_again()
    return state

  def _compile(self, train_step, state, batch, stage):
    start = time.perf_counter()
    with self.clock.spend("compile"), self.watchdog.paused():
      with dispatch.record() as ops:
        lowered = train_step.lower(state, batch)
      compiled = lowered.compile()
      processes.meet("compiled")
      self.checkpoints.prepare(state)
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else 0
    chosen = ", ".join(
      f"{op} by {' and '.join(names)}" for op, names in sorted(ops.items())
    )
    processes.say(
      f"{stage.kind}: compiled in {time.perf_counter() - start:.0f} s,"
      f" {metrics_lib.size(temporary)} of temporaries a device; {chosen}"
    )
    return compiled

  def _trace_from(self, step: int) -> None:
    """Begins to trace, if `step` is the first to."""
    steps = self.cfg.profile_steps
    if steps and step == steps[0]:
      jax.profiler.start_trace(f"{self.cfg.run_dir}/profile")
      self._tracing = True

  def _traces_last(self, step: int) -> bool:
    steps = self.cfg.profile_steps
    return self._tracing and steps is not None and step >= steps[1]

  def _trace_until(self, step: int = sys.maxsize) -> None:
    """Ends the trace, if `step` is its last, or nothing comes after."""
    if self._traces_last(step):
      jax.profiler.stop_trace()
      self._tracing = False
      processes.say(
        f"traced   steps {self.cfg.profile}, to {self.cfg.run_dir}/profile: "
        "for xprof (tensorboard --logdir), or the trace in it for Perfetto"
      )

  def _sample(self, step, state, stage) -> None:
    """Prints a continuation of the prompt, by the stage's way of attending."""
    log, tokenizer = self.cfg.log, self.corpus.tokenizer
    # One token at a time is not shared among the devices of a sequence.
    cfg = self.cfg.stage_model(stage)
    whole = dataclasses.replace(cfg.rules, seq=None)
    cfg = dataclasses.replace(cfg, rules=whole)
    model, _ = step_lib.init(cfg, self.cfg.seed)
    prompt = tokenizer.encode(log.sample_prompt)
    # A row for each device that has some, all alike.
    rows = np.tile(prompt, (self.cfg.model.rules.shards("batch"), 1))
    tokens = dsa_jax.generate(
      model.merge(state.params, state.router_bias),
      batches_lib.put_rows(rows, cfg.rules),
      log.sample_tokens,
      log.sample_temperature,
      jax.random.fold_in(jax.random.key(self.cfg.seed), step),
      attention=stage.attention,
    )
    text = tokenizer.decode(processes.fetch(tokens)[0])
    self.metrics.write(step, "sample", {"text": text})
    framed = "\n".join(f"  | {line}" for line in text.splitlines())
    processes.say(f"sample after step {step}:\n{framed}")

  def _farewell(self, state) -> None:
    """The last lines: what came of it, where it lies, and what to do next."""
    cfg, step = self.cfg, int(state.step)
    if step < cfg.total_steps:
      processes.say(
        f"stopped after step {step} of {cfg.total_steps}; saved. Go on with "
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

  def _ask_to_stop(self, signum: int, frame: Any) -> None:
    del frame
    if self._stop:
      sys.exit(128 + signum)
    print("stopping after this step (again: at once)", file=sys.stderr)
    self._stop = True


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
  """What a device holds of an array."""
  shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
  return int(np.prod(shape)) * x.dtype.itemsize
