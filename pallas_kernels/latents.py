"""Latents in 8 bits, by the numbers of FlashMLA's cache.

Of a row `[c; kr]`, each 128 numbers of the latent c are divided by a power of
two that brings the largest of them to at most 448, and rounded to e4m3; the
rotated key kr stays in bfloat16. At DeepSeek-V3.2's widths a row of 1,152 bytes
in bfloat16 becomes one of 512 + 4 x 4 + 2 x 64 = 656.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import e4m3
from pallas_kernels import operands

GROUP: Final = 128  # values that share a scale
# Exponent of the least scale, 2^ceil(log2(1e-4)).
_LEAST: Final = -13


def quantize(
  kv: Float[Array, "*S CR"], latent_rank: int
) -> operands.QuantizedLatents:
  """Rounds the latents of rows to 8 bits.

  Args:
    kv: Latents and rotated keys `[c; kr]`.
    latent_rank: C.

  Raises:
    ValueError: C is no multiple of 128.
  """
  if latent_rank % GROUP:
    raise ValueError(
      f"{latent_rank=}: latents in 8 bits have a scale for each {GROUP} "
      "numbers; take a multiple."
    )
  c, kr = kv[..., :latent_rank], kv[..., latent_rank:]
  values, scale = e4m3.quantize(_groups(c), _LEAST)
  return operands.QuantizedLatents(
    values.reshape(c.shape), scale, kr.astype(jnp.bfloat16)
  )


def dequantize(
  kv: Float[Array, "*S CR"] | operands.QuantizedLatents, dtype: DTypeLike
) -> Float[Array, "*S CR"]:
  """Rows in `dtype`, exact in bfloat16 and float32; others as they are."""
  if isinstance(kv, jax.Array):
    return kv
  c = e4m3.dequantize(_groups(kv.values), kv.scale, dtype)
  return jnp.concatenate(
    [c.reshape(kv.values.shape), kv.rope.astype(dtype)], -1
  )


def _groups(c: Float[Array, "*S C"]) -> Float[Array, "*S G 128"]:
  return c.reshape(*c.shape[:-1], -1, GROUP)
