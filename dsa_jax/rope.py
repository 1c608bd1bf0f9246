"""Rotary position, with YaRN.

Letters: B batch, T tokens, R width that is rotated, in R/2 pairs. A pair is two
neighbours (`interleaved`, MLA) or one dimension of each half (the indexer).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from dsa_jax import config as config_lib


def yarn_mscale(factor: float, mscale: float) -> float:
  """YaRN's attention temperature: 1 without stretching."""
  return 0.1 * mscale * math.log(factor) + 1.0


def _frequencies(cfg: config_lib.ModelConfig) -> np.ndarray:
  """Radians a token for each of the R/2 pairs (YaRN: arXiv 2309.00071, 3.2)."""
  R, yarn = cfg.rope_head_dim, cfg.yarn
  frequency = cfg.rope_theta ** -(np.arange(0, R, 2, dtype=np.float64) / R)
  if yarn.factor == 1:
    return frequency

  def pair_with_turns(turns):  # over the original context
    wavelength = yarn.original_context / (turns * 2 * math.pi)
    return R * math.log(wavelength) / (2 * math.log(cfg.rope_theta))

  low = max(math.floor(pair_with_turns(yarn.beta_fast)), 0)
  high = min(math.ceil(pair_with_turns(yarn.beta_slow)), R - 1)
  # Where both ends lie outside the pairs, high may be below low: the ramp then
  # falls, as in DeepSeek's code and in transformers.
  ramp = (np.arange(R // 2) - low) / (high - low or 0.001)
  slowed = np.clip(ramp, 0, 1)
  return frequency / yarn.factor * slowed + frequency * (1 - slowed)


def angles(
  positions: Int[Array, "B T"], cfg: config_lib.ModelConfig
) -> tuple[Float[Array, "B T R2"], Float[Array, "B T R2"]]:
  """Cosine and sine of each pair's angle, fp32, R/2 wide."""
  yarn = cfg.yarn
  scale = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(
    yarn.factor, yarn.mscale_all_dim
  )
  frequency = jnp.asarray(_frequencies(cfg), jnp.float32)[None, None]
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(
  x: Float[Array, "B T *heads R"],
  cos: Float[Array, "B T R2"],
  sin: Float[Array, "B T R2"],
  *,
  interleaved: bool,
) -> Float[Array, "B T *heads R"]:
  """Rotates each pair of the last axis by its token's angle, in fp32."""
  if x.ndim == 4:
    cos, sin = cos[:, :, None], sin[:, :, None]
  x32 = x.astype(jnp.float32)
  if interleaved:
    a, b = x32[..., ::2], x32[..., 1::2]
  else:
    a, b = jnp.split(x32, 2, -1)
  a, b = a * cos - b * sin, b * cos + a * sin
  if interleaved:
    y = jnp.stack([a, b], -1).reshape(x.shape)
  else:
    y = jnp.concatenate([a, b], -1)
  return y.astype(x.dtype)
