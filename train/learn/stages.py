"""Stages of training: what each attends to, trains, and costs."""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Annotated, Final, Literal

import dsa_jax
from dsa_jax import flops
from dsa_jax import ranges

_MOST_TOKENS: Final = 2**30  # of a step; they are counted in int32

type Kind = Literal["pretrain", "extend", "warmup", "sparse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of training; it begins with the parameters of the one before."""

  kind: Kind
  """pretrain: dense attention without YaRN; trains all but the indexer. extend:
  the same with YaRN, for longer sequences. warmup: dense attention; trains the
  indexer alone, by its KL to that attention. sparse: DSA; trains the model by
  its language loss, the indexer by its KL."""
  steps: ranges.Count
  """Optimizer steps."""
  seq_len: Annotated[int, ranges.Interval(4, 2**24)]
  """T, tokens of a sequence."""
  batch_size: Annotated[int, ranges.Interval(1, 2**20)]
  """Sequences of a step, over all devices."""
  microbatches: ranges.Count = 1
  """Parts that a step's batch is computed in, one after the other."""
  lr_scale: ranges.Weight = 1.0
  """Multiplies optimizer.peak_lr."""
  indexer_lr_scale: ranges.Weight = 1.0
  """Multiplies optimizer.indexer_lr."""
  mtp_weight: ranges.Weight = 0.3
  """Weight of the MTP loss."""
  balance_weight: ranges.Weight = 1e-4
  """Weight of the sequence-wise balance loss."""
  router_bias_rate: ranges.Weight = 1e-3
  """How far a step moves the routers' biases toward balance."""

  def __post_init__(self):
    ranges.check(self)
    if self.batch_size % self.microbatches:
      raise ValueError(
        f"{self.batch_size=} must be a multiple of {self.microbatches=}."
      )
    if self.tokens_per_step > _MOST_TOKENS:
      raise ValueError(
        f"{self.batch_size=} x {self.seq_len=} are "
        f"{self.tokens_per_step} tokens a step, more than {_MOST_TOKENS}: "
        "lower one of them."
      )

  @property
  def attention(self) -> Literal["dense", "sparse"]:
    return "sparse" if self.kind == "sparse" else "dense"

  @property
  def trains_model(self) -> bool:
    return self.kind != "warmup"

  @property
  def trains_indexer(self) -> bool:
    return self.kind in ("warmup", "sparse")

  @property
  def tokens_per_step(self) -> int:
    return self.batch_size * self.seq_len

  def adapt(self, model: dsa_jax.ModelConfig) -> dsa_jax.ModelConfig:
    """Returns the model as this stage runs it: pretraining has no YaRN yet."""
    if self.kind != "pretrain":
      return model
    yarn = dataclasses.replace(model.yarn, factor=1.0)
    return dataclasses.replace(model, yarn=yarn)

  def flops_per_token(self, model: dsa_jax.ModelConfig) -> float:
    """Returns the FLOPs of training on one token."""
    return flops.training_flops_per_token(
      model,
      self.seq_len,
      self.attention,
      trains_model=self.trains_model,
      trains_indexer=self.trains_indexer,
    )


def ends(stages: Sequence[StageConfig]) -> tuple[int, ...]:
  """Returns the last step of each stage, counted over all."""
  return tuple(itertools.accumulate(stage.steps for stage in stages))
