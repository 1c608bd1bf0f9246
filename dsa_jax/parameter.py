"""How a weight is made: normal, in the config's dtype, born sharded."""

from flax import nnx
import jax
import jax.numpy as jnp

from dsa_jax import config as config_lib


def weight(
  rngs: nnx.Rngs,
  cfg: config_lib.ModelConfig,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  dtype: config_lib.DType | None = None,
) -> nnx.Param:
  """A parameter of normal values with `cfg.init_std`.

  Args:
    rngs: Gives the key.
    cfg: The model's config.
    shape: Its dimensions.
    axes: The logical axis of each, for `cfg.rules`; None where it is whole.
    dtype: In place of `cfg.param_dtype`.
  """
  normal = jax.random.normal(
    rngs.params(),
    shape,
    jnp.dtype(dtype or cfg.param_dtype),
    out_sharding=cfg.rules(*axes),
  )
  return nnx.Param(normal * cfg.init_std)
