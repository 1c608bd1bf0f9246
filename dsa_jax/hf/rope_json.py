"""RoPE in a config.json <-> its base and YarnConfig.

It has two spellings, `rope_parameters` and the older `rope_scaling` with
`rope_theta` beside it. What they mean is what transformers 5.23 computes.
"""

import dataclasses
import math
from typing import Any, Literal

from dsa_jax import config as config_lib
from dsa_jax import ranges
from dsa_jax import rope
from dsa_jax.hf import section as section_lib

_DEFAULT_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class _Kinds:
  """What keys may be that are no fields of a config here."""

  rope_type: Literal["default", "yarn"]
  attention_factor: ranges.Positive


def read(
  section: section_lib.Section,
) -> tuple[float, config_lib.YarnConfig]:
  """Base and YaRN of a config.json.

  Raises:
    ValueError: It asks for another RoPE, or says two things; names the key.
  """
  theta = _theta(section)
  section.expect("partial_rotary_factor", 1.0)
  inner = [section.section(key) for key in ("rope_parameters", "rope_scaling")]
  said = [_one(x) for x in inner if x is not None]
  thetas = [x for x in (theta, *(theta for theta, _ in said)) if x is not None]
  if any(x != thetas[0] for x in thetas):
    raise section.error(
      f"rope_theta is {' and '.join(map(str, thetas))}; keep one."
    )
  yarns = [yarn for _, yarn in said]
  if any(x != yarns[0] for x in yarns):
    raise section.error(
      "rope_parameters and rope_scaling contradict each other; keep one."
    )
  return (
    thetas[0] if thetas else _DEFAULT_THETA,
    yarns[0] if yarns else config_lib.YarnConfig(),
  )


def write(theta: float, yarn: config_lib.YarnConfig) -> dict[str, Any]:
  """The keys of a config.json, in the older spelling."""
  if yarn == config_lib.YarnConfig():
    return {"rope_theta": theta, "rope_scaling": None}
  scaling = {
    "type": "yarn",
    "factor": yarn.factor,
    "original_max_position_embeddings": yarn.original_context,
    "beta_fast": yarn.beta_fast,
    "beta_slow": yarn.beta_slow,
    "mscale": yarn.mscale,
    "mscale_all_dim": yarn.mscale_all_dim,
  }
  if not (yarn.mscale and yarn.mscale_all_dim):
    # transformers reads one scale without the other as neither.
    scaling["attention_factor"] = _attention_factor(
      yarn.factor, yarn.mscale, yarn.mscale_all_dim
    )
  return {"rope_theta": theta, "rope_scaling": scaling}


def _one(
  section: section_lib.Section,
) -> tuple[float | None, config_lib.YarnConfig]:
  """Base, if it is there, and YaRN of one spelling."""
  for key in section.objects():
    section.refuse(key, "must be a value: all layers have one RoPE")
  new = section.get("rope_type", _Kinds, default=None)
  old = section.get("type", _Kinds, "rope_type", default=None)
  if None not in (new, old) and new != old:
    raise section.error(f"rope_type={new!r}, but type={old!r}; keep one.")
  theta = _theta(section)
  section.expect("partial_rotary_factor", 1.0)
  if (new or old or "default") == "default":
    return theta, config_lib.YarnConfig()
  section.expect("truncate", True)
  return theta, _yarn(section)


def _theta(section: section_lib.Section) -> float | None:
  theta = section.get("rope_theta", config_lib.ModelConfig, default=None)
  return None if theta is None else float(theta)


def _yarn(section: section_lib.Section) -> config_lib.YarnConfig:
  kinds = config_lib.YarnConfig
  factor = float(section.get("factor", kinds))
  fast = float(section.get("beta_fast", kinds, default=32))
  slow = float(section.get("beta_slow", kinds, default=1))
  context = section.get(
    "original_max_position_embeddings", kinds, "original_context"
  )
  mscale, all_dim = _mscales(section, factor)
  try:
    return config_lib.YarnConfig(
      factor=factor,
      beta_fast=fast,
      beta_slow=slow,
      original_context=context,
      mscale=mscale,
      mscale_all_dim=all_dim,
    )
  except ValueError as e:
    raise section.error(str(e)) from e


def _mscales(
  section: section_lib.Section, factor: float
) -> tuple[float, float]:
  """YaRN's two scales.

  `attention_factor`, if it is there, is the scale of cos and sin itself, of
  which mscale is the part that is free.
  """
  kinds = config_lib.YarnConfig
  mscale = section.get("mscale", kinds, default=None)
  all_dim = section.get("mscale_all_dim", kinds, default=None)
  wanted = section.get("attention_factor", _Kinds, default=None)
  if wanted is None and not (mscale and all_dim):
    if mscale not in (None, 1) or all_dim:
      raise section.error(
        f"mscale={mscale} and mscale_all_dim={all_dim} mean one thing to"
        " transformers and another to DeepSeek; give both, above 0, or neither."
      )
  first, second = float(1 if mscale is None else mscale), float(all_dim or 0)
  if wanted in (None, _attention_factor(factor, first, second)):
    return first, second
  if factor == 1:
    section.refuse("attention_factor", "must be 1 where factor is 1")
  below = rope.yarn_mscale(factor, second)
  first = (wanted * below - 1) / (0.1 * math.log(factor))
  if ranges.violation(kinds, "mscale", first):
    section.refuse("attention_factor", f"would need mscale={first}")
  return first, second


def _attention_factor(factor: float, mscale: float, all_dim: float) -> float:
  """The scale of cos and sin."""
  return rope.yarn_mscale(factor, mscale) / rope.yarn_mscale(factor, all_dim)
