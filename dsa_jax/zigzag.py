"""Sequences over the devices of a context axis, in zigzag order.

A causal query costs the more, the later it stands. For n devices a sequence is
therefore cut into 2 n chunks, and device i holds the i-th and the i-th last:
every device has as much to do. The order stays inside the model: tokens come
in, and results go out, in their natural order.

Keys are gathered, queries never move. What a token adds to the keys of a layer
is C+R+I values; every device of the axis keeps a copy of a sequence's, as rows
of its own (the logical axis "keys" is context x batch), so that the gradients
of the copies are added once, by one reduce-scatter, when they go back.

Letters: B batch, T tokens, S keys, X any width.
"""

import functools

import jax
import jax.numpy as jnp

from dsa_jax import sharding


def multiple(rules: sharding.ShardingRules) -> int:
  """Returns the number that T must be a multiple of."""
  shards = rules.shards("seq")
  return 2 * shards if shards > 1 else 1


def scatter(x: jax.Array, rules: sharding.ShardingRules) -> jax.Array:
  """[B, T, ...] in natural order -> the same over the context, in zigzag."""
  axes = rules.mesh_axes("seq")
  if axes is None:
    return x
  rest = (None,) * (x.ndim - 2)
  chunks = 2 * rules.shards("seq")

  def own(x):
    size = x.shape[1] // chunks
    first = jax.lax.axis_index(axes)
    starts = first * size, (chunks - 1 - first) * size
    pieces = [jax.lax.dynamic_slice_in_dim(x, i, size, 1) for i in starts]
    return jnp.concatenate(pieces, 1)

  natural, zigzag = rules("batch", None, *rest), rules("batch", "seq", *rest)
  return sharding.local(own, (natural,), zigzag)(x)


def gather(
  x: jax.Array, rules: sharding.ShardingRules, axis: int = 1
) -> jax.Array:
  """Undoes `scatter`; T is the dimension `axis`, and those after B are whole
  but for it."""
  axes = rules.mesh_axes("seq")
  if axes is None:
    return x
  spec = list(jax.typeof(x).sharding.spec)
  natural = [*spec[:axis], None, *spec[axis + 1 :]]
  collect = sharding.local(
    lambda x: _in_order(x, axes, axis), (jax.P(*spec),), jax.P(*natural)
  )
  return collect(x)


def gather_keys(x: jax.Array, rules: sharding.ShardingRules) -> jax.Array:
  """[B, T, X] over the context -> [keys, S, X]: a copy for each device of it,
  in natural order."""
  axes = rules.mesh_axes("seq")
  if axes is None:
    return x
  copy = sharding.local(
    lambda x: _in_order(x, axes, 1),
    (rules("batch", "seq", None),),
    rules("keys", None, None),
  )
  return copy(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(x, axes, axis):
  return jax.lax.all_gather(x, axes, axis=axis)


def _scatter_sum(axes, axis, _, d_y):
  """Adds what all devices have for a chunk in fp32, whatever it comes in."""
  d_x = jax.lax.psum_scatter(
    d_y.astype(jnp.float32), axes, scatter_dimension=axis
  )
  return (d_x.astype(d_y.dtype),)


_all_gather.defvjp(
  lambda x, axes, axis: (_all_gather(x, axes, axis), None), _scatter_sum
)


def _in_order(x, axes, axis):
  """The chunks of all devices, in natural order; inside a shard_map."""
  x = _all_gather(x, axes, axis)
  shards, size = x.shape[axis], x.shape[axis + 1] // 2
  before, after = x.shape[:axis], x.shape[axis + 2 :]
  x = x.reshape(*before, shards, 2, size, *after)
  first = jax.lax.index_in_dim(x, 0, axis + 1, keepdims=False)
  second = jax.lax.index_in_dim(x, 1, axis + 1, keepdims=False)
  x = jnp.concatenate([first, jnp.flip(second, axis)], axis)
  return x.reshape(*before, 2 * shards * size, *after)
