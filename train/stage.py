"""One stage of a run: data, step, log, evaluate, sample, save."""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import time

import jax
import numpy as np

import dsa_jax
from pallas_kernels import dispatch
from train import config as config_lib
from train import evaluation
from train.data import corpus as corpus_lib
from train.host import ownership
from train.host import processes
from train.host import watchdog as watchdog_lib
from train.learn import batches as batches_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.learn import step as step_lib
from train.run import checkpoint as checkpoint_lib
from train.run import goodput
from train.run import metrics as metrics_lib
from train.run import stage_log
from train.run import tracing as tracing_lib


class Diverged(RuntimeError):
  """Too many steps in a row were skipped; earlier checkpoints stay."""


@dataclasses.dataclass
class Position:
  """Where a run stands; its stages move it on."""

  step: int = 0
  """The last step done, over all stages."""
  progress: checkpoint_lib.Progress = dataclasses.field(
    default_factory=checkpoint_lib.Progress
  )
  """The part of a checkpoint besides the train state."""
  stopping: bool = False
  """Someone asked the run to stop: it saves after the step in flight."""


@dataclasses.dataclass(frozen=True)
class Services:
  """Resources that a run has opened for its stages."""

  mesh: jax.sharding.Mesh
  corpus: corpus_lib.Corpus
  parameters: step_lib.Parameters
  """Shapes of the parameters and of the router biases."""
  checkpoints: checkpoint_lib.Checkpoints
  metrics: metrics_lib.Writer
  clock: goodput.Clock
  claim: ownership.Claim
  watchdog: watchdog_lib.Watchdog
  tracing: tracing_lib.Tracing


@dataclasses.dataclass(frozen=True)
class _Due:
  """Actions due after a step."""

  stops: bool
  saves: bool
  measures: bool


def state_shapes(
  cfg: config_lib.TrainConfig,
  stage: stages_lib.StageConfig,
  parameters: step_lib.Parameters,
) -> step_lib.TrainState:
  """Shapes of everything that a stage changes and saves; needs the mesh."""
  begin = functools.partial(step_lib.begin_stage, cfg.optimizer, stage)
  return jax.eval_shape(begin, *parameters)


def restore(
  cfg: config_lib.TrainConfig,
  checkpoints: checkpoint_lib.Checkpoints,
  parameters: step_lib.Parameters,
  mesh: jax.sharding.Mesh,
  steps: list[int],
) -> tuple[step_lib.TrainState, Position] | None:
  """Loads the newest of these checkpoints that is whole; None if none is."""
  for step in sorted(steps, reverse=True):
    # The stage that saved it knows what its optimizer holds.
    saved = next(s for s, end in zip(cfg.stages, cfg.stage_ends) if step <= end)
    shapes = state_shapes(cfg, saved, parameters)
    try:
      state, progress = checkpoints.load(step, shapes, mesh)
    except checkpoint_lib.Broken as e:
      processes.say(f"ERROR: the checkpoint of step {step} is broken: {e}")
    else:
      return state, Position(step, progress)
  return None


class Stage:
  """Trains one stage, from where the run stands to the stage's end."""

  def __init__(
    self,
    cfg: config_lib.TrainConfig,
    number: int,
    services: Services,
    position: Position,
  ):
    """Opens the data of stage `number`; compiles nothing yet."""
    self._cfg, self._stage = cfg, cfg.stages[number]
    self._services, self._position = services, position
    self._end = cfg.stage_ends[number]
    self._begin = self._end - self._stage.steps
    self._model_config = self._stage.adapt(cfg.model)
    self._model, _ = step_lib.init(self._model_config, cfg.seed)
    self._batches = batches_lib.Batches(
      services.corpus,
      self._stage,
      cfg.model.rules,
      cfg.seed + number,
      cfg.data.shards,
    )
    self._log = stage_log.StageLog(
      cfg.stages,
      number,
      cfg.model,
      cfg.optimizer,
      cfg.guard,
      cfg.log.every,
      mesh=services.mesh,
      corpus=services.corpus,
      metrics=services.metrics,
      clock=services.clock,
      tokens=position.progress.tokens,
    )
    self._evaluate = evaluation.Evaluation(
      self._stage,
      cfg.model,
      self._model,
      services.corpus,
      services.metrics,
      cfg.log.eval_batches,
    )
    # The metrics of the last step, while they are not read.
    self._pending: tuple[int, step_lib.Metrics] | None = None

  def run(self, state: step_lib.TrainState) -> step_lib.TrainState:
    """Trains to the stage's end, or until the run is asked to stop.

    Raises:
      Diverged: Too many steps had to be skipped.
      DataError: The data end, or cannot be read any more; what was trained is
        saved first.
    """
    position, progress = self._position, self._position.progress
    with contextlib.closing(self._batches):
      if position.step > self._begin:
        self._batches.set_state(progress.data)
      else:
        state = self._fresh(state)
      if progress.owes_evaluation:
        self._measure(state)
        progress.owes_evaluation = False
      if position.step == self._end:
        return state
      batch = self._read()
      train_step = self._compile(state, batch)
      if position.stopping:  # meanwhile; all that was trained is saved
        return state
      self._log.restart_clock()
      while batch is not None:
        state, batch = self._advance(train_step, state, batch)
    return state

  def _fresh(self, state: step_lib.TrainState) -> step_lib.TrainState:
    """The same parameters, with an optimizer that knows nothing yet."""
    return step_lib.begin_stage(
      self._cfg.optimizer,
      self._stage,
      *state.parameters,
      step=self._position.step,
    )

  def _read(self) -> step_lib.Batch:
    with self._services.clock.spend("data"):
      return next(self._batches)

  def _compile(
    self, state: step_lib.TrainState, batch: step_lib.Batch
  ) -> step_lib.TrainStep:
    cfg, services, start = self._cfg, self._services, time.perf_counter()
    train_step = step_lib.make_train_step(
      self._model,
      self._stage,
      optimizer_lib.make_optimizer(cfg.optimizer, self._stage),
      cfg.guard,
      cfg.log.every,
      len(services.corpus.source_names),
    )
    with services.clock.spend("compile"), services.watchdog.paused():
      with dispatch.record() as ops:
        lowered = train_step.lower(state, batch)
      compiled = lowered.compile()
      processes.meet("compiled")
      services.checkpoints.prepare(state)
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else 0
    chosen = ", ".join(
      f"{op} by {' and '.join(names)}" for op, names in sorted(ops.items())
    )
    processes.say(
      f"{self._stage.kind}: compiled in {time.perf_counter() - start:.0f} s,"
      f" {metrics_lib.size(temporary)} of temporaries a device; {chosen}"
    )
    return compiled

  def _advance(
    self,
    train_step: step_lib.TrainStep,
    state: step_lib.TrainState,
    batch: step_lib.Batch,
  ) -> tuple[step_lib.TrainState, step_lib.Batch | None]:
    """Takes a step and does what is due after it.

    The data of the next step are read, and the metrics of the last one logged,
    while the device works on this one.

    Returns:
      The state and the next batch; None where the stage ends here.
    """
    position, services = self._position, self._services
    services.claim.confirm()
    services.tracing.before(position.step + 1)
    state, metrics = train_step(state, batch)
    position.step = step = position.step + 1
    services.watchdog.alive(f"step {step}")
    due = self._due(step)
    # What a checkpoint has behind it is on the disk before it.
    at_once = due.saves or due.measures or services.tracing.ends(step)
    self._log_pending()
    self._pending = step, metrics
    if at_once:
      self._log_pending()
    services.tracing.after(step)
    if self._log.in_a_row >= self._cfg.guard.patience and not due.stops:
      with services.clock.spend("restore"):
        state, self._pending = self._roll_back(), None
      return state, self._read()
    bits_per_byte = None
    if due.measures and not due.stops:  # who asks to stop may not wait
      with self._keeping(state, owes_evaluation=True):
        bits_per_byte = self._measure(state)
    if due.saves:
      position.progress.owes_evaluation = due.measures and due.stops
      self._save(state, bits_per_byte)
    if due.saves or due.measures:
      self._log.restart_clock()
    if due.stops:
      position.stopping = True
    if due.stops or step == self._end:
      return state, None
    with self._keeping(state):
      return state, self._read()

  def _due(self, step: int) -> _Due:
    cfg, ends = self._cfg, step == self._end
    stops = processes.asked_to_stop(self._position.stopping, step)
    stops = stops or step == cfg.stop_at
    return _Due(
      stops=stops,
      saves=stops or ends or step % cfg.checkpoint.every == 0,
      measures=(ends or step % cfg.log.eval_every == 0 or self._samples(step)),
    )

  def _samples(self, step: int) -> bool:
    """Returns whether text is sampled after a step."""
    cfg = self._cfg
    every = step % cfg.log.sample_every == 0 and step < self._end
    return every or step == cfg.total_steps

  def _log_pending(self) -> None:
    if self._pending:
      self._log(*self._pending)
      self._pending = None

  def _measure(self, state: step_lib.TrainState) -> float | None:
    """Evaluates and samples as due; returns bits per byte if evaluated."""
    step, services, bits_per_byte = self._position.step, self._services, None
    last = step == self._end
    if last or step % self._cfg.log.eval_every == 0:
      with services.clock.spend("evaluation"), services.watchdog.paused():
        bits_per_byte = self._evaluate(step, state.parameters, last=last)
    if self._samples(step):
      with services.clock.spend("sample"), services.watchdog.paused():
        self._sample(state)
    return bits_per_byte

  def _save(
    self, state: step_lib.TrainState, bits_per_byte: float | None = None
  ) -> None:
    step, progress = self._position.step, self._position.progress
    services = self._services
    services.claim.confirm()
    services.metrics.sync()  # a checkpoint never has more behind it than they
    with services.clock.spend("checkpoint"):
      progress.data = self._batches.get_state()
      progress.tokens = dict(self._log.tokens)
      services.checkpoints.save(
        state, step, progress, self._model_config, bits_per_byte
      )
    services.clock.saved(step)
    if processes.is_first():
      spent = goodput.account(self._cfg.run_dir)
      services.metrics.write(
        step, "goodput", {"share": spent.goodput, "seconds": spent.seconds}
      )

  @contextlib.contextmanager
  def _keeping(
    self, state: step_lib.TrainState, *, owes_evaluation: bool = False
  ) -> Iterator[None]:
    """Saves what was trained where the data fail inside."""
    try:
      yield
    except corpus_lib.DataError:
      self._log_pending()
      if jax.process_count() == 1:  # the others have gone on
        self._position.progress.owes_evaluation = owes_evaluation
        self._save(state)
      raise

  def _roll_back(self) -> step_lib.TrainState:
    """Returns the state before the steps that were skipped in a row.

    The data are not gone back to: the next batch is one that was not seen.
    """
    cfg, position, services = self._cfg, self._position, self._services
    guard, reached, progress = cfg.guard, position.step, position.progress
    first = self._log.step - self._log.in_a_row + 1
    services.checkpoints.settle()
    steps = services.checkpoints.steps
    trouble = (
      f"steps {first} to {self._log.step} had to be skipped, one after the "
      f"other ({self._log.trouble})"
    )
    part, rate = "indexer", cfg.optimizer.indexer_lr
    if self._stage.trains_model:
      part, rate = "peak", cfg.optimizer.peak_lr
    kept = f"the checkpoint of step {max(steps)}" if steps else "the beginning"
    remedy = (
      f"Go on from {kept} with --resume and a lower rate, such as "
      f"--optimizer.{part}-lr={rate / 2:g}."
    )
    if progress.rollbacks >= guard.rollbacks:
      raise Diverged(
        f"{trouble}, after {progress.rollbacks} rollbacks. {remedy}"
      )
    restored = restore(
      cfg,
      services.checkpoints,
      services.parameters,
      services.mesh,
      [step for step in steps if max(self._begin, 1) <= step < first],
    )
    if restored is None:
      raise Diverged(
        f"{trouble}, and there is no checkpoint of this stage before them to "
        f"go back to. {remedy}"
      )
    # What was seen is seen: only the parameters go back.
    state, found = restored
    position.step, progress.rollbacks = found.step, progress.rollbacks + 1
    later = [step for step in steps if step > position.step]
    services.checkpoints.set_aside(later, f"rollback-{progress.rollbacks}")
    if position.step == self._begin:
      state = self._fresh(state)
    self._tell_rollback(reached, trouble)
    self._log.begin_again()
    return state

  def _tell_rollback(self, reached: int, trouble: str) -> None:
    position, services = self._position, self._services
    services.clock.went_back(reached, position.step)
    services.metrics.go_back(position.step + 1)
    services.metrics.write(
      position.step,
      "incident",
      {
        "what": "rollback",
        "from": reached,
        "why": trouble,
        "steps_of_data_left_out": reached - position.step,
      },
    )
    processes.say(
      f"ROLLBACK {position.progress.rollbacks} of {self._cfg.guard.rollbacks}: "
      f"{trouble}. Goes on from the checkpoint of step {position.step}, with "
      f"the data after those of step {reached}."
    )

  def _sample(self, state: step_lib.TrainState) -> None:
    """Prints a continuation of the prompt, by the stage's kind of attention."""
    log, step = self._cfg.log, self._position.step
    tokenizer = self._services.corpus.tokenizer
    prompt = tokenizer.encode(log.sample_prompt)
    # A row for each device that has some; the first one is shown.
    rows = np.tile(prompt, (self._cfg.model.rules.shards("batch"), 1))
    tokens = dsa_jax.generate(
      self._model.merge(*state.parameters),
      rows,
      log.sample_tokens,
      log.sample_temperature,
      jax.random.fold_in(jax.random.key(self._cfg.seed), step),
      attention=self._stage.attention,
    )
    text = tokenizer.decode(np.asarray(tokens)[0])
    self._services.metrics.write(step, "sample", {"text": text})
    framed = "\n".join(f"  | {line}" for line in text.split("\n"))
    processes.say(f"sample after step {step}:\n{framed}")
