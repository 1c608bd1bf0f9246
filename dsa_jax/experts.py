"""The routed experts' MLPs on each device's tokens and experts.

Letters: B batch, T tokens, D model width, F ffn width, E experts (here those of
this device), J experts a token, R = B T J rows, G devices that share experts.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax import exchange
from dsa_jax import parameter
import pallas_kernels

type Axis = str | tuple[str, ...] | None

# What the rows of all tokens that are exchanged at once may take, if every one
# came to the same device.
_BYTES = 1 << 30

# Permutations, without atomic additions in their gradient.
_PERMUTE = dict(mode="promise_in_bounds", unique_indices=True)


def routed_experts(
  x: Float[Array, "B T D"],
  experts: Int[Array, "B T J"],
  weights: Float[Array, "B T J"],
  gate: parameter.Rounded,
  up: parameter.Rounded,
  down: parameter.Rounded,
  *,
  experts_axis: Axis,
  ffn_axis: Axis,
) -> Float[Array, "B T D"]:
  """The weighted sum of each token's experts, fp32; runs inside a shard_map.

  No token is dropped, however they are spread: a device has room for all rows
  of those that share the experts with it, a part of their tokens at a time.

  Args:
    x: This device's tokens.
    experts: Numbers of each one's experts, of all devices.
    weights: Theirs in the sum.
    gate: Matrices of this device's experts, [E, D, F].
    up: Likewise.
    down: Likewise, [E, F, D].
    experts_axis: The mesh axes that share the experts; None: all are here.
    ffn_axis: The mesh axes that share F.
  """

  def run(*tokens):
    mlp = functools.partial(_mlp, *(w.read() for w in (gate, up, down)))
    return _rows(mlp, len(gate.values), experts_axis, *tokens)

  return _in_parts(run, x, experts, weights, experts_axis, ffn_axis)


def few_tokens(
  x: Float[Array, "B T D"],
  experts: Int[Array, "B T J"],
  weights: Float[Array, "B T J"],
  gate: Float[Array, "L E D F"],
  up: Float[Array, "L E D F"],
  down: Float[Array, "L E F D"],
  layer: Int[Array, ""],
  *,
  experts_axis: Axis,
  ffn_axis: Axis,
) -> Float[Array, "B T D"]:
  """The same sum, with the matrices of one layer of a stack, read in place.

  A token whose experts are beyond the last has none: what it gets means
  nothing. There is no gradient.
  """
  E, first = gate.shape[1], layer * gate.shape[1]
  gate, up, down = (w.reshape(-1, *w.shape[2:]) for w in (gate, up, down))

  def mlp(x_RD, sizes_E):
    return pallas_kernels.grouped_mlp(x_RD, sizes_E, gate, up, down, first)

  def run(*tokens):
    return _rows(mlp, E, experts_axis, *tokens)

  return _in_parts(run, x, experts, weights, experts_axis, ffn_axis)


def _in_parts(run, x, experts, weights, experts_axis, ffn_axis):
  """Runs as many tokens at a time as fit, and adds what devices have of F."""
  (B, T, J), D = experts.shape, x.shape[2]
  tokens = (x.reshape(B * T, D), experts.reshape(-1, J), weights.reshape(-1, J))
  devices = jax.lax.axis_size(experts_axis) if experts_axis else 1
  parts = _parts(B * T, devices * J * D * x.dtype.itemsize)
  if parts == 1:
    y = run(*tokens)
  else:
    # A part is computed again in the backward pass: what it keeps would be room
    # for all rows of all devices, for each part.
    y = jax.lax.map(
      lambda part: jax.checkpoint(run)(*part),
      [z.reshape(parts, -1, z.shape[-1]) for z in tokens],
    )
  y = y.reshape(B, T, D)
  return jax.lax.psum(y, ffn_axis) if ffn_axis else y


def _parts(tokens: int, bytes_per_token: int) -> int:
  """The fewest equal parts of the tokens that fit."""
  fits = (n for n in range(1, tokens + 1) if tokens % n == 0)
  return next(n for n in fits if tokens // n * bytes_per_token <= _BYTES)


def _rows(mlp, E, axis, x_ND, experts_NJ, weights_NJ):
  """Sorts the rows by expert, multiplies, and puts them back; N tokens."""
  N, J = experts_NJ.shape
  G = jax.lax.axis_size(axis) if axis else 1
  expert_R = experts_NJ.reshape(-1)
  order_R = jnp.argsort(expert_R, stable=True)
  # In fp32 until each expert has its copy, so that their gradients' sum is.
  copies_RD = jnp.repeat(x_ND.astype(jnp.float32), J, 0).astype(x_ND.dtype)
  rows_RD = copies_RD.at[order_R].get(**_PERMUTE)
  sizes = jnp.bincount(expert_R, length=G * E)
  if axis is None:
    y_RD = mlp(rows_RD, sizes)
  else:
    # How many rows device s has for expert e of device d: [s, d, e].
    counts_GGE = jax.lax.all_gather(sizes, axis).reshape(G, G, E)
    sent_GG = counts_GGE.sum(2, dtype=jnp.int32)
    slots_GRD = exchange.dispatch(rows_RD, sent_GG, axis)
    mine_GE = counts_GGE[:, jax.lax.axis_index(axis)]
    order_S = jnp.argsort(_expert_of_slots(mine_GE, N * J), stable=True)
    sorted_SD = slots_GRD.reshape(G * N * J, -1).at[order_S].get(**_PERMUTE)
    y_SD = mlp(sorted_SD, mine_GE.sum(0))
    y_SD = y_SD.at[jnp.argsort(order_S)].get(**_PERMUTE)
    y_RD = exchange.combine(y_SD.reshape(slots_GRD.shape), sent_GG, axis)
  y_NJD = y_RD.at[jnp.argsort(order_R)].get(**_PERMUTE).reshape(N, J, -1)
  # A sum, not a product, which would round the weights.
  return (y_NJD.astype(jnp.float32) * weights_NJ[..., None]).sum(1)


def _expert_of_slots(mine_GE, R):
  """[G R]: which expert the row of each slot is for; E where there is none."""
  end_GE = jnp.cumsum(mine_GE, 1)
  search = functools.partial(jnp.searchsorted, side="right")
  p_R = jnp.arange(R, dtype=end_GE.dtype)
  return jax.vmap(search, (0, None))(end_GE, p_R).reshape(-1)


def _mlp(gate_EDF, up_EDF, down_EFD, x_RD, sizes_E):
  matmul = pallas_kernels.grouped_matmul
  h_RF = jax.nn.silu(matmul(x_RD, gate_EDF, sizes_E))
  h_RF = h_RF * matmul(x_RD, up_EDF, sizes_E)
  return matmul(h_RF, down_EFD, sizes_E)
