"""One block of rows after another, in plain XLA.

A block's products are of the same shape whatever the groups' sizes, so that a
row's result does not depend on the other rows.

Letters: R rows, sorted by group, E groups, X groups that there are matrices of,
D and F widths, G blocks of b rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import contraction
from pallas_kernels.ops.grouped_mlp import blocks as blocks_lib


def grouped_mlp(
  x: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  gate: Float[Array, "X D F"],
  up: Float[Array, "X D F"],
  down: Float[Array, "X F D"],
  first: Int[Array, ""],
) -> Float[Array, "R D"]:
  """See `api.grouped_mlp`. On a GPU, a matrix is copied before it is read."""
  R = len(x)
  b = min(blocks_lib.even_size(R, len(sizes)), R)
  blocks = blocks_lib.Blocks.of(R, sizes, b)
  x_PD = jnp.pad(x, [(0, b), (0, 0)])  # a block may end beyond the last row

  def product(x_bD, w_XDF, group):
    w_DF = jax.lax.dynamic_index_in_dim(w_XDF, group, keepdims=False)
    return contraction.einsum("bD,DF->bF", x_bD, w_DF, dtype=x.dtype)

  def block(i, y_PD):
    group, row = first + blocks.group_G[i], blocks.row_G[i]
    x_bD = jax.lax.dynamic_slice_in_dim(x_PD, row, b)
    h_bF = jax.nn.silu(product(x_bD, gate, group)) * product(x_bD, up, group)
    # What it writes beyond its group's rows, later blocks write again.
    return jax.lax.dynamic_update_slice_in_dim(
      y_PD, product(h_bF, down, group), row, 0
    )

  y_PD = jax.lax.fori_loop(0, blocks.count, block, jnp.zeros_like(x_PD))
  return jnp.where((jnp.arange(R) < sizes.sum())[:, None], y_PD[:R], 0)
