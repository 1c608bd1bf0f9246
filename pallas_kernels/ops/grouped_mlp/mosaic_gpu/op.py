"""The groups' MLPs on Hopper, in two kernels that read each matrix in place.

Letters: R rows, sorted by group, E groups, X groups that there are matrices of,
D and F widths, G blocks of b rows, P = G b.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ops.grouped_mlp import blocks as blocks_lib
from pallas_kernels.ops.grouped_mlp.mosaic_gpu import kernel


def grouped_mlp(
  x: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  gate: Float[Array, "X D F"],
  up: Float[Array, "X D F"],
  down: Float[Array, "X F D"],
  first: Int[Array, ""],
) -> Float[Array, "R D"]:
  """See `api.grouped_mlp`. Holds each group's rows padded to whole blocks."""
  check(x, gate, up, down)
  R, D = x.shape
  size = min(blocks_lib.even_size(R, len(sizes)), max(kernel.ROWS))
  blocks = blocks_lib.Blocks.of(R, sizes.astype(jnp.int32), size)
  group_G = first.astype(jnp.int32) + blocks.group_G
  count = blocks.count[None]
  # Once: else they are computed again for each number of a row.
  row_P, place_R, in_group_R = jax.lax.optimization_barrier(
    (blocks.rows().reshape(-1), blocks.places(R), jnp.arange(R) < sizes.sum())
  )
  # Each block writes rows of its own: what it computes of other groups' rows is
  # not looked at.
  x_PD = x.at[row_P].get(mode="clip")
  h_PF = kernel.product(x_PD, (gate, up), group_G, count)
  y_PD = kernel.product(h_PF, (down,), group_G, count)
  y_RD = y_PD.at[place_R].get(mode="clip")
  return jnp.where(in_group_R[:, None], y_RD, 0)


def check(
  x: Float[Array, "R D"],
  gate: Float[Array, "X D F"],
  up: Float[Array, "X D F"],
  down: Float[Array, "X F D"],
) -> None:
  """Raises NotImplementedError for what the kernel cannot do."""
  for name, a in (("x", x), ("gate", gate), ("up", up), ("down", down)):
    if a.dtype != jnp.bfloat16:
      raise NotImplementedError(f"{name}.dtype={a.dtype} is not bfloat16.")
  if not len(x):
    raise NotImplementedError("There are no rows.")
  for name, width in zip("DF", gate.shape[1:], strict=True):
    if width % kernel.COLUMNS:
      raise NotImplementedError(
        f"{name}={width} is no multiple of {kernel.COLUMNS}."
      )
