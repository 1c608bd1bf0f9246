"""Rows to the devices that own them, and back: expert parallelism's transport.

Every device of an axis holds rows sorted by the device that they are for. A
device has room for all rows of every other one, so that none is ever dropped:
row p of source s arrives in slot [s, p]. Only real rows travel where XLA has a
ragged all-to-all (TPUs and GPUs); elsewhere whole slots do.

Both functions are linear, and each is the gradient of the other.

Letters: R rows, D width, G devices of the axis.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch as dispatch_lib

type Axis = str | tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnames=("axis",))
def dispatch(
  rows: Float[Array, "R D"], sizes: Int[Array, "G G"], axis: Axis
) -> Float[Array, "G R D"]:
  """Slots of what all devices sent here; what is in no slot is finite.

  Args:
    rows: Sorted by the device that they are for.
    sizes: How many rows each device (first) has for each (second), everywhere
      the same.
    axis: The mesh axes, inside a shard_map.
  """
  R, D = rows.shape
  me, to, first = _places(sizes, axis)
  if dispatch_lib.platform() == "cpu":
    p = jnp.arange(R, dtype=jnp.int32)[None]
    slots = rows.at[jnp.where(p < to[:, None], first[me][:, None] + p, R)].get(
      mode="fill", fill_value=0
    )
    return jax.lax.all_to_all(slots, axis, 0, 0)
  slots = jax.lax.ragged_all_to_all(
    rows,
    jnp.zeros((sizes.shape[0] * R, D), rows.dtype),
    first[me],
    to,
    jnp.full_like(to, me * R),
    sizes[:, me],
    axis_name=axis,
  )
  return slots.reshape(-1, R, D)


@functools.partial(jax.custom_vjp, nondiff_argnames=("axis",))
def combine(
  slots: Float[Array, "G R D"], sizes: Int[Array, "G G"], axis: Axis
) -> Float[Array, "R D"]:
  """The rows that `dispatch` sent, from the slots where they went; else 0."""
  G, R, D = slots.shape
  me, to, first = _places(sizes, axis)
  if dispatch_lib.platform() == "cpu":
    slots = jax.lax.all_to_all(slots, axis, 0, 0)
    p = jnp.arange(R, dtype=jnp.int32)
    owner = jnp.searchsorted(first[me] + to, p, side="right")
    owner = jnp.minimum(owner, G - 1)
    rows = slots.at[owner, p - first[me][owner]].get(mode="clip")
    return jnp.where((p < to.sum())[:, None], rows, 0)
  return jax.lax.ragged_all_to_all(
    slots.reshape(G * R, D),
    jnp.zeros((R, D), slots.dtype),
    jnp.arange(G, dtype=jnp.int32) * R,
    sizes[:, me],
    first[:, me],
    to,
    axis_name=axis,
  )


def _places(sizes, axis):
  """This device; its rows for each; where each device's for each begin."""
  me = jax.lax.axis_index(axis)
  return me, sizes[me], jnp.cumsum(sizes, 1) - sizes


def _forward(op):
  return lambda x, sizes, axis: (op(x, sizes, axis), sizes)


def _backward(inverse):
  return lambda axis, sizes, d_y: (inverse(d_y, sizes, axis), None)


dispatch.defvjp(_forward(dispatch), _backward(combine))
combine.defvjp(_forward(combine), _backward(dispatch))
