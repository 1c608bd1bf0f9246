"""Rows times the matrix of their group, for the experts' MLPs.

Letters: R rows, sorted by group, E groups, D and F widths, G blocks of rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tiles

_BLOCK = {"cpu": 64, "gpu": 512}  # rows of one product


def grouped_matmul(
  x: Float[Array, "R D"], w: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
  """`y[r] = x[r] @ w[group of r]`; the groups' `sizes` sum to R.

  `jax.lax.ragged_dot` where it multiplies each row once, on TPUs. Elsewhere XLA
  multiplies every row by every group's matrix and masks: there, blocks of equal
  rows (on a CPU 19 times faster with 8 groups of 1024 rows, D 128, F 64).
  """
  block = _BLOCK.get(jax.default_backend())
  if block is None:
    return jax.lax.ragged_dot(x, w, sizes)
  return blocked_matmul(x, w, sizes, block)


def blocked_matmul(
  x: Float[Array, "R D"],
  w: Float[Array, "E D F"],
  sizes: Int[Array, " E"],
  block: int,
) -> Float[Array, "R F"]:
  """The same, each group cut into blocks of rows, the last one partial.

  Each block has a copy of its group's matrix; as many are multiplied at once as
  a tile's budget holds.
  """
  (R, D), (E, _, F) = x.shape, w.shape
  block = min(block, R)
  blocks_E = -(-sizes // block)
  first_block_E = jnp.cumsum(blocks_E) - blocks_E
  first_row_E = jnp.cumsum(sizes) - sizes

  def group_of(place, first):  # empty groups begin where the next one does
    return jnp.searchsorted(first, place, side="right") - 1

  # At most one partial block a group; what is too many here is empty.
  most = R // block + E
  fitting = tiles.tile_size(4 * most, D * F * x.dtype.itemsize, largest=most)
  rounds = -(-most // fitting)
  at_once = -(-most // rounds)
  place_G = jnp.arange(rounds * at_once)
  group_G = group_of(place_G, first_block_E)
  begin_G = first_row_E[group_G] + (place_G - first_block_E[group_G]) * block
  row_Gb = begin_G[:, None] + jnp.arange(block)[None]
  # Past its group's end a block has no rows: zeros are read, none is written.
  # No row is named twice, so that gradients need no atomic addition.
  beyond_Gb = R + jnp.arange(row_Gb.size).reshape(row_Gb.shape)
  end_G1 = (first_row_E + sizes)[group_G][:, None]
  row_Gb = jnp.where(row_Gb < end_G1, row_Gb, beyond_Gb)
  w = w.astype(jnp.float32)  # its gradient is summed over blocks

  @jax.checkpoint  # the copies are made again, not kept
  def multiply(blocks):
    row_gb, group_g = blocks
    x_gbD = x.at[row_gb].get(mode="fill", fill_value=0, unique_indices=True)
    return jnp.einsum("gbD,gDF->gbF", x_gbD, w[group_g].astype(x.dtype))

  y_GbF = jax.lax.map(
    multiply,
    (row_Gb.reshape(-1, at_once, block), group_G.reshape(-1, at_once)),
  )
  row_R = jnp.arange(R)
  group_R = group_of(row_R, first_row_E)
  place_R = first_block_E[group_R] * block + row_R - first_row_E[group_R]
  y_PF = y_GbF.reshape(-1, F)  # P: places
  return y_PF.at[place_R].get(mode="promise_in_bounds", unique_indices=True)
