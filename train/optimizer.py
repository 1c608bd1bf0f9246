"""AdamW for the model and the indexer, each with its own rate and clipping."""

from typing import Any

import jax
import optax

from train import config as config_lib


def make_optimizer(
  cfg: config_lib.OptimizerConfig, stage: config_lib.StageConfig
) -> optax.GradientTransformation:
  """The optimizer of one stage; what the stage does not train has no state."""
  indexer = optax.set_to_zero()
  if stage.trains_indexer:
    indexer = _adamw(cfg, schedule(cfg, cfg.indexer_lr, stage.steps))
  model = _adamw(cfg, model_schedule(cfg, stage))
  return optax.partition({"model": model, "indexer": indexer}, label)


def model_schedule(
  cfg: config_lib.OptimizerConfig, stage: config_lib.StageConfig
) -> optax.Schedule:
  """The model's learning rate, by steps since the stage began."""
  return schedule(cfg, cfg.peak_lr * stage.lr_scale, stage.steps)


def schedule(
  cfg: config_lib.OptimizerConfig, peak: float, steps: int
) -> optax.Schedule:
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


def label(params: Any) -> Any:
  """ "indexer" or "model" for each parameter."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "indexer" if "indexer" in _names(path) else "model", params
  )


def _adamw(cfg, rate) -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm),
    optax.adamw(
      rate,
      cfg.beta1,
      cfg.beta2,
      cfg.epsilon,
      weight_decay=cfg.weight_decay,
      mask=_decayed,
    ),
  )


def _decayed(params: Any) -> Any:
  """All but norms: their scales and biases alone end in `_D`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _names(path)[-1] not in ("scale_D", "bias_D"), params
  )


def _names(path) -> list[str]:
  return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
