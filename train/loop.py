"""The loop: data, step, log, evaluate, sample, save; stage after stage."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import numpy as np

import dsa_jax
from dsa_jax import flops
from dsa_jax import sharding
from pallas_kernels import dispatch
from train import checkpoint as checkpoint_lib
from train import config as config_lib
from train import data as data_lib
from train import evaluation
from train import feed
from train import metrics as metrics_lib
from train import optimizer as optimizer_lib
from train import processes
from train import step as step_lib


class Diverged(RuntimeError):
  """The loss is not finite; the checkpoints before it stay."""


class Run:
  """A run, opened and checked, ready to train."""

  def __init__(self, cfg: config_lib.TrainConfig):
    """Checks everything that can be wrong, before anything compiles.

    Raises:
      ValueError: The data, the devices or the folder do not fit the config;
        see `Corpus`, `make_mesh`, `Checkpoints`.
    """
    self.cfg = cfg
    self.corpus = data_lib.Corpus(
      cfg.data, pathlib.Path(cfg.run_dir) / "quarantine"
    )
    for stage in cfg.stages:
      self.corpus.check_sizes(stage.seq_len, stage.batch_size)
    vocab = self.corpus.tokenizer.vocab_size
    if cfg.model.vocab_size < vocab:
      raise ValueError(
        f"model.vocab_size={cfg.model.vocab_size} is too small for the "
        f"tokenizer {cfg.data.tokenizer}; give at least {vocab}."
      )
    self.mesh = sharding.make_mesh(**dataclasses.asdict(cfg.mesh))
    processes.check_mesh(self.mesh)
    self.origin = None
    if cfg.init_from not in (None, "random"):
      self.origin = checkpoint_lib.Origin(cfg)
    self.checkpoints = checkpoint_lib.Checkpoints(cfg)
    self._stop = False

  def train(self) -> None:
    """Trains to the end, or until stopped; both save.

    Raises:
      Diverged: The loss is not finite.
    """
    cfg = self.cfg
    self.checkpoints.begin(cfg)
    done = self.checkpoints.latest
    self.metrics = metrics_lib.Writer(
      cfg.run_dir, done + 1, tensorboard=cfg.log.tensorboard
    )
    with (
      contextlib.closing(self.metrics),
      contextlib.closing(self.checkpoints),
      jax.set_mesh(self.mesh),
      dispatch.kernels(cfg.kernels),
      _signals(self._ask_to_stop),
    ):
      _, self._init = step_lib.init(cfg.model, cfg.seed)
      processes.say(self.summary())
      state = self._start(done)
      for i, end in enumerate(cfg.stage_ends):
        begin = end - cfg.stages[i].steps
        if done < end and not self._stop:
          state = self._stage(i, begin, max(done, begin), state)
      self.checkpoints.wait()
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
      cost = self._flops_per_token(stage)
      state = jax.eval_shape(
        functools.partial(self._fresh, stage), *self._like()
      )
      held = sum(_local_bytes(x) for x in jax.tree.leaves(state))
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

  def _flops_per_token(self, stage: config_lib.StageConfig) -> float:
    return flops.training_flops_per_token(
      self.cfg.model,
      stage.seq_len,
      stage.attention,
      trains_model=stage.trains_model,
      trains_indexer=stage.trains_indexer,
    )

  def _like(self) -> Any:
    return jax.eval_shape(self._init, jax.random.key(0))

  def _fresh(self, stage, params, bias, step=0) -> step_lib.TrainState:
    return step_lib.begin_stage(self.cfg.optimizer, stage, params, bias, step)

  def _start(self, done: int) -> step_lib.TrainState:
    """The initial state, or that of the newest checkpoint."""
    cfg = self.cfg
    if not done and self.origin is not None:
      params, bias = self.origin.restore(self._like(), self.mesh)
      processes.say(f"begins   with the parameters of {self.origin}")
      return self._fresh(cfg.stages[0], params, bias)
    if not done:
      params, bias = self._init(jax.random.key(cfg.seed))
      return self._fresh(cfg.stages[0], params, bias)
    # The stage that saved it knows what its optimizer holds.
    saved = next(s for s, end in zip(cfg.stages, cfg.stage_ends) if done <= end)
    make = functools.partial(self._fresh, saved)
    like = jax.eval_shape(make, *self._like())
    state = self.checkpoints.restore_state(like, self.mesh)
    processes.say(f"resumed  after step {done}")
    return state

  def _stage(
    self, i: int, begin: int, done: int, state: step_lib.TrainState
  ) -> step_lib.TrainState:
    """Trains stage `i`, of which steps `begin` to `done` are done."""
    cfg, stage = self.cfg, self.cfg.stages[i]
    end = begin + stage.steps
    batches = feed.Feed(
      self.corpus, stage, cfg.model.rules, cfg.seed + i, cfg.data.shards
    )
    if done > begin:
      batches.set_state(self.checkpoints.data_state())
    else:
      fresh = functools.partial(self._fresh, stage, step=done)
      state = jax.jit(fresh)(state.params, state.router_bias)
    optimizer = optimizer_lib.make_optimizer(cfg.optimizer, stage)
    model, _ = step_lib.init(cfg.stage_model(stage), cfg.seed)
    train_step = step_lib.make_train_step(
      model, stage, optimizer, cfg.log.every
    )
    batch = next(batches)
    train_step = self._compile(train_step, state, batch, stage)
    log = _StageLog(self, stage, begin, end)
    evaluate = evaluation.Evaluation(
      cfg, stage, model, self.corpus, self.metrics
    )

    step, pending = done, None
    while step < end:
      state, metrics = train_step(state, batch)
      step += 1
      # The data of step + 1 is fetched, and the numbers of step - 1 are read,
      # while the device works on this step.
      saves = step == end or step % cfg.checkpoint.every == 0
      stops = processes.asked_to_stop(self._stop, step) or step == cfg.stop_at
      if saves or stops:  # before the iterator moves on
        self.checkpoints.save(
          state, step, batches.get_state(), cfg.stage_model(stage)
        )
      if pending:
        log(*pending)
      pending = step, metrics
      samples = step % cfg.log.sample_every == 0 and step < end
      evaluates = step == end or step % cfg.log.eval_every == 0
      if saves or stops or samples or evaluates:
        log(*pending)
        pending = None
      if evaluates:
        evaluate(step, state, last=step == end)
      if samples:
        self._sample(step, state, stage)
      if saves or stops or samples or evaluates:
        log.restart_clock()
      if stops:
        self._stop = True
        break
      if step < end:
        batch = next(batches)
    batches.close()
    return state

  def _compile(self, train_step, state, batch, stage):
    start = time.perf_counter()
    with dispatch.record() as ops:
      lowered = train_step.lower(state, batch)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else 0
    chosen = ", ".join(f"{op} by {name}" for op, name in sorted(ops.items()))
    processes.say(
      f"{stage.kind}: compiled in {time.perf_counter() - start:.0f} s,"
      f" {metrics_lib.size(temporary)} of temporaries a device; {chosen}"
    )
    return compiled

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
      feed.put_rows(rows, cfg.rules),
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
    self._sample(step, state, cfg.stages[-1])
    processes.say(
      f"done: {step} steps\n"
      f"  checkpoints  {cfg.run_dir}/checkpoints (newest: {step})\n"
      f"  metrics      {self.metrics.file}\n"
      f"  config       {cfg.run_dir}/config.json\n"
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


class _StageLog:
  """Reads the metrics of a step, and says how training goes."""

  def __init__(self, run: Run, stage: config_lib.StageConfig, begin, end):
    self._run, self._stage, self._begin, self._end = run, stage, begin, end
    # The model's; the indexer's where that alone is trained.
    self._rate, *_ = optimizer_lib.rates(run.cfg.optimizer, stage).values()
    self._flops = run._flops_per_token(stage)
    kind = run.mesh.devices.flat[0]
    peak = metrics_lib.peak_flops(kind)
    self._peak = peak and peak * run.mesh.size
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves out the time that was not spent on training."""
    self._since, self._steps = time.perf_counter(), 0

  def __call__(self, step: int, metrics: step_lib.Metrics) -> None:
    cfg, stage = self._run.cfg, self._stage
    metrics = processes.fetch(metrics)
    self._steps += 1
    norm, loss = float(metrics["grad_norm"]), float(metrics.get("lm", 0.0))
    if not np.isfinite(loss) or not np.isfinite(norm):
      raise Diverged(
        f"step {step}: loss {loss}, gradient norm {norm}. Lower "
        f"--optimizer.{'peak' if stage.trains_model else 'indexer'}-lr; the "
        "checkpoints before this step are kept."
      )
    values = {"stage": stage.kind, **self._values(step, metrics)}
    if step % cfg.log.every and step != self._end:
      self._run.metrics.write(step, "train", values)
      return
    seconds = (time.perf_counter() - self._since) / self._steps
    tokens = stage.batch_size * stage.seq_len
    values["tokens_per_second"] = tokens / seconds
    values["ms_per_step"] = 1000 * seconds
    if self._peak:
      values["mfu"] = self._flops * tokens / seconds / self._peak
    self._run.metrics.write(step, "train", values)
    self.restart_clock()
    left = self._tokens_left(step) / values["tokens_per_second"]
    shown = {
      "loss": "loss {:.4f}",
      "bits_per_byte": "{:.3f} bits/byte",
      "index": "KL {:.3f}",
      "recall": "recall {:.1%}",
      "lr": "lr {:.1e}",
      "tokens_per_second": "{:,.0f} tokens/s",
      "mfu": "MFU {:.1%}",
      "ms_per_step": "{:.0f} ms/step",
    }
    parts = [
      f"step {step:>5}/{cfg.total_steps} {stage.kind}",
      *(form.format(values[k]) for k, form in shown.items() if k in values),
      f"ETA {metrics_lib.duration(left)}",
    ]
    processes.say(" | ".join(parts))

  def _values(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """What is known of every step, and of the indexer where it was measured."""
    layers = {
      name: metrics.pop(name).tolist()
      for name in ("index_per_layer", "recall_per_layer")
      if name in metrics
    }
    values = {name: float(x) for name, x in metrics.items()}
    num_bytes, targets = values.pop("bytes"), values.pop("targets")
    if "lm" in values:
      values["loss"] = loss = values.pop("lm")
      values["bits_per_byte"] = metrics_lib.bits_per_byte(
        loss * targets, num_bytes
      )
    values["lr"] = np.asarray(self._rate(step - 1 - self._begin)).item()
    if layers and step % self._run.cfg.log.every == 0:
      values["index"] = sum(layers["index_per_layer"])
      values["index_per_layer"] = layers["index_per_layer"]
      # NaN where no query of the batch had more than K keys to choose from.
      recall = layers["recall_per_layer"]
      if np.isfinite(recall).all():
        values["recall"] = sum(recall) / len(recall)
        values["recall_per_layer"] = recall
    return values

  def _tokens_left(self, step: int) -> int:
    """Of this stage and those after it."""
    left, end = 0, 0
    for stage in self._run.cfg.stages:
      end += stage.steps
      steps = min(max(end - step, 0), stage.steps)
      left += steps * stage.batch_size * stage.seq_len
    return left


class _signals:
  """SIGINT and SIGTERM call `handler` inside the context."""

  def __init__(self, handler: Callable[[int, Any], None]):
    self._handler = handler

  def __enter__(self):
    kinds = (signal.SIGINT, signal.SIGTERM)
    self._before = {kind: signal.signal(kind, self._handler) for kind in kinds}

  def __exit__(self, *exc_info):
    for kind, handler in self._before.items():
      signal.signal(kind, handler)


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
  """What a device holds of an array."""
  shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
  return int(np.prod(shape)) * x.dtype.itemsize
