"""Evaluation of a model: held-out text, retrieval, and the keys it selects."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsa_jax
from dsa_jax import frame as frame_lib
from dsa_jax import recall
from train.data import corpus as corpus_lib
from train.data import retrieval as retrieval_lib
from train.host import atomic_files
from train.host import outputs
from train.host import processes
from train.learn import batches as batches_lib
from train.learn import stages as stages_lib
from train.learn import step as step_lib
from train.run import metrics as metrics_lib

# Lengths that retrieval is asked at, as fractions of the stage's sequences.
_LENGTHS = (1 / 8, 1 / 4, 1 / 2, 1)


class Evaluation:
  """Evaluates a stage's model as it trains, and in both ways at its end.

  Writes "eval" and "retrieval" lines to the metrics, and the keys that each
  layer selects on a held-out row to RUN_DIR/selections/STEP.npz.
  """

  def __init__(
    self,
    stage: stages_lib.StageConfig,
    cfg: dsa_jax.ModelConfig,
    model: step_lib.Model,
    corpus: corpus_lib.Corpus,
    metrics: metrics_lib.Writer,
    batches: int,
  ):
    """Evaluates a stage on so many held-out batches of its `corpus`."""
    self._cfg, self._stage, self._model = cfg, stage, model
    self._batches = batches
    self._corpus, self._metrics = corpus, metrics
    self._rows = stage.batch_size // stage.microbatches
    self._text_steps = {
      way: step_lib.make_eval_step(model, way) for way in ("dense", "sparse")
    }
    self._answer_steps = {
      way: make_answer_step(model, way) for way in ("dense", "sparse")
    }

  def __call__(
    self, step: int, parameters: step_lib.Parameters, *, last: bool
  ) -> float:
    """Held-out bits per byte, in the stage's own way of attending."""
    # Nothing is chosen from K keys or fewer.
    can_choose = self._stage.seq_len > self._cfg.top_k
    way = "sparse" if self._stage.trains_indexer else "dense"
    ways = ["dense", "sparse"] if last and can_choose else [way]
    bits_per_byte = self._text(step, parameters, ways)[way]
    if self._corpus.trains_retrieval:
      for each in ways:
        self._retrieval(step, parameters, each)
    if last and can_choose:
      self._selections(step, parameters)
    return bits_per_byte

  def _put(self, x: np.ndarray) -> jax.Array:
    return batches_lib.put_rows(x, self._cfg.rules)

  def _heldout(self, batches: int):
    return self._corpus.heldout_batches(
      seq_len=self._stage.seq_len,
      batch_size=self._rows,
      max_batches=batches,
    )

  def _text(self, step, parameters, ways) -> dict[str, Any]:
    """Bits per byte by way; in sparse attention, recall too."""
    values: dict[str, Any] = {"stage": self._stage.kind}
    for way in ways:
      sums = [
        self._text_steps[way](parameters, jax.tree.map(self._put, batch))
        for batch in self._heldout(self._batches)
      ]
      total = jax.tree.map(lambda *xs: np.sum(xs, 0), *processes.fetch(sums))
      values[way] = metrics_lib.bits_per_byte(
        float(total["nats"]), float(total["bytes"])
      )
      if total.get("queries"):
        per_layer = total["recall"] / total["queries"]
        values["recall"] = float(per_layer.mean())
        values["recall_per_layer"] = per_layer.tolist()
    self._metrics.write(step, "eval", values)
    line = ", ".join(f"{way} {values[way]:.4f}" for way in ways)
    if "recall" in values:
      line += f"; recall {values['recall']:.1%}"
    processes.say(f"held-out bits/byte after step {step}: {line}")
    return values

  def _retrieval(self, step, parameters, way) -> None:
    """Share of right answers, by length of the text and depth of the pair."""
    T = self._stage.seq_len
    least = self._corpus.least_probe_tokens
    lengths = [round(T * f) for f in _LENGTHS if round(T * f) >= least]
    if not lengths:
      processes.say(f"retrieval is not evaluated: {T=} is below {least}")
      return
    accuracy = []
    for length in lengths:
      right = [
        self._answer_steps[way](
          parameters, jax.tree.map(self._put, vars(probes))
        )
        for probes in self._corpus.retrieval_probes(
          seq_len=T, batch_size=self._rows, length=length
        )
      ]
      accuracy.append(np.mean(np.concatenate(processes.fetch(right)), 0))
    self._metrics.write(
      step,
      "retrieval",
      {
        "stage": self._stage.kind,
        "attention": way,
        "lengths": lengths,
        "depths": retrieval_lib.DEPTHS.tolist(),
        "accuracy": np.stack(accuracy).tolist(),
      },
    )
    line = ", ".join(
      f"{length}: {row.mean():.1%}" for length, row in zip(lengths, accuracy)
    )
    processes.say(f"retrieval after step {step}, {way}: {line}")

  def _selections(self, step, parameters) -> None:
    """The keys chosen for a sample of the queries of one held-out row."""

    batch = next(iter(self._heldout(1)))
    indices, place = processes.fetch(
      make_select_step(self._model)(parameters, jax.tree.map(self._put, batch))
    )
    queries = np.asarray(recall.sample(jnp.arange(self._stage.seq_len)[None]))
    if not processes.is_first():
      return
    file = self._metrics.file.parent / "selections" / f"{step}.npz"
    # zipfile says ValueError where it cannot end a file it could not write.
    with outputs.Output(str(file)).attempt(ValueError):
      file.parent.mkdir(exist_ok=True)
      with atomic_files.partial(file).open("wb") as out:
        np.savez_compressed(
          out,
          queries=queries[0],
          indices=indices[:, :, 0],
          starts=queries[0] - place[0],  # of its document
          length=self._stage.seq_len,
        )
      atomic_files.replace(file)


@functools.lru_cache  # stages of one model share what is compiled
def make_answer_step(
  model: step_lib.Model, attention: frame_lib.Attention
) -> Callable[[step_lib.Parameters, dict[str, jax.Array]], jax.Array]:
  """Which questions of a batch of probes are answered right: bool [B, D].

  An answer is right if each of its tokens is the likeliest, given the others:
  what an engine would answer, told by one forward pass.
  """

  @jax.jit
  def answer_step(parameters, probes):
    at_BDA, answers_BDA = probes["at"], probes["answers"]
    B, D, A = at_BDA.shape
    logits_BPV = model.merge(*parameters).predict(
      probes["tokens"],
      jnp.maximum(at_BDA, 0).reshape(B, D * A),
      probes["positions"],
      probes["segment_ids"],
      attention=attention,
    )
    guess_BDA = jnp.argmax(logits_BPV, -1).reshape(B, D, A)
    return ((guess_BDA == answers_BDA) | (at_BDA < 0)).all(-1)

  return answer_step


@functools.lru_cache
def make_select_step(
  model: step_lib.Model,
) -> Callable[
  [step_lib.Parameters, step_lib.Batch], tuple[jax.Array, jax.Array]
]:
  """Returns a step that samples queries: their selected keys and positions."""

  @jax.jit
  def select_step(parameters, batch):
    output = model.merge(*parameters).forward(
      batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    assert output.selected is not None  # attention is sparse
    selected_LQBK = recall.sample(output.selected.swapaxes(1, 2))
    return selected_LQBK, recall.sample(batch["positions"])

  return select_step
