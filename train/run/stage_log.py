"""How a stage's steps went: to the terminal and the metrics, a step late."""

from collections.abc import Sequence
import math
import time
from typing import Any, Final

import jax
import numpy as np

import dsa_jax
from train.data import corpus as corpus_lib
from train.host import processes
from train.learn import guards
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.learn import step as step_lib
from train.run import goodput
from train.run import metrics as metrics_lib

# What the progress line shows of a step, where it is known.
_SHOWN: Final = {
  "loss": "loss {:.4f}",
  "bits_per_byte": "{:.3f} bits/byte",
  "index": "KL {:.3f}",
  "recall": "recall {:.1%}",
  "lr": "lr {:.1e}",
  "tokens_per_second": "{:,.0f} tokens/s",
  "mfu": "MFU {:.1%}",
  "ms_per_step": "{:.0f} ms/step",
}


class StageLog:
  """Reads the metrics of a step, and says how training goes.

  Attributes:
    step: The last one that was read.
    in_a_row: How many steps were skipped, up to that one.
    trouble: Why the last skipped one was.
    tokens: Tokens seen so far, by source.
  """

  def __init__(
    self,
    stages: Sequence[stages_lib.StageConfig],
    number: int,
    model: dsa_jax.ModelConfig,
    optimizer: optimizer_lib.OptimizerConfig,
    guard: guards.GuardConfig,
    every: int,
    *,
    mesh: jax.sharding.Mesh,
    corpus: corpus_lib.Corpus,
    metrics: metrics_lib.Writer,
    clock: goodput.Clock,
    tokens: dict[str, int],
  ):
    """Logs stage `number` of `stages`.

    Args:
      stages: All stages of the run.
      number: Which of them is logged.
      model: The run's model.
      optimizer: Gives the learning rate.
      guard: Gives the alarms.
      every: Steps between progress lines.
      mesh: The devices, for the model FLOP/s utilisation.
      corpus: The sources and their bad records.
      metrics: Where metrics are written.
      clock: Accounts for skipped steps.
      tokens: Tokens seen so far, by source.
    """
    self._corpus, self._clock = corpus, clock
    self._bad = sum(corpus.bad_records.values())
    self._stages, self._stage = stages, stages[number]
    ends = stages_lib.ends(stages)
    self._end, self._total = ends[number], ends[-1]
    self._guard, self._every = guard, every
    self._begin = self._end - self._stage.steps
    self._metrics, self.tokens = metrics, dict(tokens)
    # The model's; the indexer's where that alone is trained.
    self._rate, *_ = optimizer_lib.rates(optimizer, self._stage).values()
    self._flops = self._stage.flops_per_token(model)
    peak = metrics_lib.peak_flops(mesh.devices.flat[0])
    self._peak = peak and peak * mesh.size
    self.begin_again()

  def begin_again(self) -> None:
    """Goes on from a checkpoint."""
    self.step, self.in_a_row, self.trouble = self._begin, 0, ""
    self._alarms = guards.Alarms(self._guard)
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves out the time that was not spent on training."""
    self._since, self._steps = time.perf_counter(), 0

  def __call__(self, step: int, metrics: step_lib.Metrics) -> None:
    stage = self._stage
    values = self._values(step, processes.fetch(metrics))
    self._steps += 1
    self._check(step, values)
    if step % self._every and step != self._end:
      self._metrics.write(step, "train", values)
      return
    seconds = (time.perf_counter() - self._since) / self._steps
    tokens = stage.tokens_per_step
    values["tokens_per_second"] = tokens / seconds
    values["ms_per_step"] = 1000 * seconds
    if self._peak:
      values["mfu"] = self._flops * tokens / seconds / self._peak
    if (peak := metrics_lib.memory_peak()) is not None:
      values["memory_peak"] = peak
    values["tokens_by_source"] = dict(self.tokens)
    self._metrics.write(step, "train", values)
    self._clock.note(step)
    self._check_data(step)
    self.restart_clock()
    left = self._tokens_left(step) / values["tokens_per_second"]
    parts = [
      f"step {step:>5}/{self._total} {stage.kind}",
      *(
        form.format(values[k])
        for k, form in _SHOWN.items()
        if values.get(k) is not None
      ),
      f"ETA {metrics_lib.duration(left)}",
    ]
    if values["skipped"]:
      parts.append(f"skipped {values['skipped']:.0f}")
    processes.say(" | ".join(parts))

  def _check(self, step: int, values: dict[str, Any]) -> None:
    """Says what is wrong with a step."""
    self.step, self.in_a_row = step, int(values["in_a_row"])
    if self.in_a_row:
      self._clock.skipped(step)
      watched = {"gradient norm": values["grad_norm"]}
      if "loss" in values:
        watched["loss"] = values["loss"]
      self.trouble = ", ".join(
        f"{name} " + ("not finite" if x is None else f"{x:.4g}")
        for name, x in watched.items()
      )
      self._metrics.write(
        step, "incident", {"what": "skipped", "why": self.trouble}
      )
      processes.say(
        f"WARNING: step {step} is skipped, the parameters stay as they were: "
        f"{self.trouble}; that is far above the steps before, or no number"
      )
    for alarm in self._alarms(values):
      self._metrics.write(step, "incident", {"what": "alarm", "why": alarm})
      processes.say(f"WARNING: step {step}: {alarm}")

  def _check_data(self, step: int) -> None:
    """Says what this process found to be bad since it last looked."""
    counts = self._corpus.bad_records
    if sum(counts.values()) > self._bad:
      self._bad = sum(counts.values())
      self._metrics.write(
        step, "incident", {"what": "bad records", "count": counts}
      )
      processes.say(
        f"WARNING: step {step}: bad records are left out, {counts}; see "
        f"{self._metrics.file.parent}/quarantine"
      )

  def _values(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """Collects a step's values, the indexer's where it was measured; None where
    a value is not finite."""
    layers = {
      name: metrics.pop(name).tolist()
      for name in ("index_per_layer", "recall_per_layer")
      if name in metrics
    }
    counts = metrics.pop("tokens").tolist()
    for source, count in zip(self._corpus.source_names, counts):
      self.tokens[source] = self.tokens.get(source, 0) + count
    values: dict[str, Any] = {"stage": self._stage.kind}
    values |= {name: float(x) for name, x in metrics.items()}
    num_bytes, targets = values.pop("bytes"), values.pop("targets")
    if "lm" in values:
      values["loss"] = loss = values.pop("lm")
      values["bits_per_byte"] = metrics_lib.bits_per_byte(
        loss * targets, num_bytes
      )
    # A skipped step does not count in the schedule.
    skipped = values["skipped"] - (values["in_a_row"] > 0)
    taken = step - 1 - self._begin - skipped
    values["lr"] = np.asarray(self._rate(taken)).item()
    if layers and step % self._every == 0:
      values["index"] = sum(layers["index_per_layer"])
      if math.isfinite(values["index"]):
        values["index_per_layer"] = layers["index_per_layer"]
      # NaN where no query of the batch had more than K keys to choose from.
      recall = layers["recall_per_layer"]
      if np.isfinite(recall).all():
        values["recall"] = sum(recall) / len(recall)
        values["recall_per_layer"] = recall
    return {
      name: None if isinstance(x, float) and not math.isfinite(x) else x
      for name, x in values.items()
    }

  def _tokens_left(self, step: int) -> int:
    """Tokens left in this stage and those after it."""
    left, end = 0, 0
    for stage in self._stages:
      end += stage.steps
      steps = min(max(end - step, 0), stage.steps)
      left += steps * stage.tokens_per_step
    return left
