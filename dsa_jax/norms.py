"""RMSNorm and LayerNorm, computed in fp32.

Letters: D, here, is whatever width is normalised.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax import config as config_lib


def _weight(weight: nnx.Param, ndim: int) -> jax.Array:
  return weight[...].astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


class RMSNorm(nnx.Module):
  """`x / rms(x) * scale`, without a mean or bias."""

  def __init__(
    self, dim: int, cfg: config_lib.ModelConfig, eps: float | None = None
  ):
    self.eps = cfg.norm_eps if eps is None else eps
    self.scale_D = nnx.Param(jnp.ones((dim,), cfg.param_dtype))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, -1, keepdims=True)
    y = x32 * jax.lax.rsqrt(mean_square + self.eps)
    return (y * _weight(self.scale_D, x.ndim)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """`(x - mean) / std * scale + bias`; eps 1e-6, as in the indexer."""

  def __init__(self, dim: int, cfg: config_lib.ModelConfig):
    self.scale_D = nnx.Param(jnp.ones((dim,), cfg.param_dtype))
    self.bias_D = nnx.Param(jnp.zeros((dim,), cfg.param_dtype))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, -1, keepdims=True)
    variance = jnp.mean(x32 * x32, -1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + 1e-6) * _weight(self.scale_D, x.ndim)
    return (y + _weight(self.bias_D, x.ndim)).astype(x.dtype)
