"""AdamW for the model and the indexer, each with its own rate and clipping."""

import dataclasses
from typing import Annotated, Final, Literal

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from dsa_jax import ranges
from train.learn import stages as stages_lib

type Rate = Annotated[float, ranges.Interval(0, 1000, open="low")]
type Memory = Annotated[float, ranges.Interval(0, 1, open="high")]

_UNDECAYED: Final = ("scale_D", "bias_D")  # of norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with clipping, and a warm-up, constant, cosine schedule a stage."""

  peak_lr: Rate
  """Learning rate of the model between warm-up and decay."""
  indexer_lr: Rate = 1e-3
  """The same of the indexer."""
  warmup: ranges.Fraction = 0.05
  """Fraction of a stage's steps in which the rate rises from 0."""
  decay: ranges.Fraction = 0.5
  """Fraction of them, at the end, in which it falls."""
  final: ranges.Fraction = 0.1
  """Where it falls to, as a fraction of the peak."""
  beta1: Memory = 0.9
  """Share of the gradient's mean that a step keeps."""
  beta2: Memory = 0.95
  """The same of the mean of its square."""
  epsilon: Annotated[float, ranges.Interval(0, 1, open="low")] = 1e-8
  """Added to the root of that mean."""
  weight_decay: Annotated[float, ranges.Interval(0, 100)] = 0.1
  """Decay of matrices; norms are not decayed."""
  moments: Literal["float32", "bfloat16"] = "float32"
  """Storage type of both moments; DeepSeek-V3 used bfloat16."""
  clip_norm: ranges.Positive = 1.0
  """Largest norm of the model's gradient, and of the indexer's."""

  def __post_init__(self):
    ranges.check(self)
    if self.warmup + self.decay > 1:
      raise ValueError(f"{self.warmup=} and {self.decay=} exceed 1 together.")


def make_optimizer(
  cfg: OptimizerConfig, stage: stages_lib.StageConfig
) -> optax.GradientTransformation:
  """The optimizer of what a stage trains: see `split`."""
  return optax.partition(
    {part: _adamw(cfg, rate) for part, rate in rates(cfg, stage).items()}, label
  )


def rates(
  cfg: OptimizerConfig, stage: stages_lib.StageConfig
) -> dict[str, optax.Schedule]:
  """The learning rate of each part that a stage trains, the model's first, by
  steps since the stage began."""
  peaks = {}
  if stage.trains_model:
    peaks["model"] = cfg.peak_lr * stage.lr_scale
  if stage.trains_indexer:
    peaks["indexer"] = cfg.indexer_lr * stage.indexer_lr_scale
  return {part: schedule(cfg, x, stage.steps) for part, x in peaks.items()}


def split(
  params: nnx.State, stage: stages_lib.StageConfig
) -> tuple[nnx.State, nnx.State]:
  """The parameters that a stage trains, and the others; None in their place."""
  trained = {"model": stage.trains_model, "indexer": stage.trains_indexer}
  labels = label(params)
  return (
    jax.tree.map(lambda x, part: x if trained[part] else None, params, labels),
    jax.tree.map(lambda x, part: None if trained[part] else x, params, labels),
  )


def merge(trained: nnx.State, frozen: nnx.State) -> nnx.State:
  """Undoes `split`."""
  return jax.tree.map(
    lambda x, y: y if x is None else x,
    trained,
    frozen,
    is_leaf=lambda x: x is None,
  )


def schedule(cfg: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
  """A linear warm-up that ends at the peak, a plateau, a cosine to the end."""
  warmup, decay = round(cfg.warmup * steps), round(cfg.decay * steps)
  return optax.join_schedules(
    [
      # The first step has a rate already; a warm-up of 0 steps is the peak.
      optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1)),
      optax.constant_schedule(peak),
      optax.cosine_decay_schedule(peak, max(decay, 1), cfg.final),
    ],
    [warmup, steps - decay],
  )


def label(params: nnx.State) -> nnx.State:
  """ "indexer" or "model" for each parameter."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "indexer" if "indexer" in _names(path) else "model", params
  )


def norms(grads: nnx.State) -> dict[str, jax.Array]:
  """The gradient's norm, and that of each part of the model in it:
  "grad_norm", "grad_norm_attention", ..."""
  squares: dict[str, jax.Array] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(grads):
    part = _part(_names(path))
    square = jnp.square(x.astype(jnp.float32)).sum()
    squares[part] = squares[part] + square if part in squares else square
  return {"grad_norm": jnp.sqrt(sum(squares.values()))} | {
    f"grad_norm_{part}": jnp.sqrt(square) for part, square in squares.items()
  }


def _part(names: list[str]) -> str:
  """Labels each parameter with its part; MTP's layer is like the others."""
  for part in ("indexer", "router", "shared", "embed", "head", "attention"):
    if part in names:
      return part
  if "ffn" in names:
    return "experts" if names[-1].endswith(("EFD", "EDF")) else "ffn"
  return "norms" if names[-1] in _UNDECAYED else "mtp"


def _adamw(cfg, rate) -> optax.GradientTransformation:
  adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.epsilon)
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm),
    _kept_in(cfg.moments, adam),
    optax.add_decayed_weights(cfg.weight_decay, _decayed),
    optax.scale_by_learning_rate(rate),
  )


def _kept_in(
  dtype: str, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`inner`, which computes in fp32, with what it remembers kept in `dtype`."""

  def cast(state, dtype):
    def cast_one(x):
      return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast_one, state)

  def update(updates, state, params=None):
    state = cast(state, jnp.float32)
    updates, state = inner.update(updates, state, params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(
    lambda params: cast(inner.init(params), dtype), update
  )


def _decayed(params: optax.Params) -> optax.Params:
  """All but norms."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _names(path)[-1] not in _UNDECAYED, params
  )


def _names(path) -> list[str]:
  return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
