"""Parameters: how one is made, and how activations meet it.

Activations may be bfloat16; the gradient of a parameter, a sum over all tokens,
is not. In bfloat16 a sum stands still once it is 256 times what is added.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsa_jax import config as config_lib
from dsa_jax import sharding
from pallas_kernels import contraction


def weight(
  rngs: nnx.Rngs,
  cfg: config_lib.ModelConfig,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  dtype: config_lib.DType | None = None,
) -> nnx.Param:
  """A parameter of normal values with `cfg.init_std`, born sharded.

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


def einsum(
  subscripts: str,
  x: Float[Array, "..."],
  w: Float[Array, "..."],
  *,
  dtype: DTypeLike | None = None,
  out_sharding: jax.P | None = None,
) -> Float[Array, "..."]:
  """`x` times a parameter, which is rounded to the dtype of `x`.

  All sums are in fp32, also those over devices: the parameter's gradient, over
  tokens, is rounded to its own dtype alone.

  Args:
    subscripts: As of `jnp.einsum`; each letter occurs twice.
    x: Activations.
    w: The parameter.
    dtype: Of the result; by default that of `x`.
    out_sharding: As of `jnp.einsum`.
  """
  return _einsum(
    subscripts, x.dtype if dtype is None else dtype, out_sharding, x, w
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(subscripts, dtype, out_sharding, x, w):
  return _product(subscripts, x, w.astype(x.dtype), dtype, out_sharding)


def _forward(subscripts, dtype, out_sharding, x, w):
  return _einsum(subscripts, dtype, out_sharding, x, w), (x, w)


def _backward(subscripts, dtype, out_sharding, residuals, d_y):
  del dtype, out_sharding
  x, w = residuals
  inputs, y = subscripts.split("->")
  of_x, of_w = inputs.split(",")
  d_y = d_y.astype(x.dtype)
  d_x = _product(
    *(f"{y},{of_w}->{of_x}", d_y, w.astype(x.dtype)),
    *(x.dtype, sharding.spec(x)),
  )
  d_w = contraction.einsum(
    f"{of_x},{y}->{of_w}", x, d_y, out_sharding=sharding.spec(w)
  )
  return d_x, d_w.astype(w.dtype)


_einsum.defvjp(_forward, _backward)


def _product(subscripts, x, w, dtype, out_sharding):
  """An einsum rounded to `dtype` once, after devices have added their parts."""
  of_x, y = subscripts.split(",")[0], subscripts.split("->")[1]
  cut = zip(of_x, jax.typeof(x).sharding.spec)
  in_parts = any(axes is not None and letter not in y for letter, axes in cut)
  product = contraction.einsum(
    subscripts,
    *(x, w),
    dtype=jnp.float32 if in_parts else dtype,
    out_sharding=out_sharding,
  )
  return product.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
  """A parameter as several devices or rounds of a loop read it, rounded.

  What it takes to sum their gradients in fp32: each calls `read` for itself.
  """

  values: Float[Array, "..."]
  """Have no gradient."""
  param: Float[Array, "..."]
  """Gets the gradient. It is never read, so that it costs nothing forward."""

  def read(self) -> Float[Array, "..."]:
    """The values, whose gradient is that of the parameter."""
    return _read(self.values, self.param)


def rounded(w: Float[Array, "..."], dtype: DTypeLike) -> Rounded:
  """A parameter, rounded to `dtype`."""
  values = jax.lax.stop_gradient(w.astype(dtype))
  return Rounded(values, w.astype(jnp.float32))


@jax.custom_vjp
def _read(values, param):
  del param
  return values


_read.defvjp(
  lambda values, param: (values, None),
  lambda _, d_values: (None, d_values.astype(jnp.float32)),
)
