"""Public entry point: selects an implementation."""

from typing import Final, Literal

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.ops.grouped_mlp import chunked_xla
from pallas_kernels.ops.grouped_mlp import reference
from pallas_kernels.ops.grouped_mlp.mosaic_gpu import op as mosaic_gpu

type Implementation = Literal["mosaic_gpu", "chunked_xla", "reference"]

IMPLEMENTATIONS: Final = {
  "mosaic_gpu": mosaic_gpu.grouped_mlp,
  "chunked_xla": chunked_xla.grouped_mlp,
  "reference": reference.grouped_mlp,
}


def grouped_mlp(
  x: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  gate: Float[Array, "X D F"],
  up: Float[Array, "X D F"],
  down: Float[Array, "X F D"],
  first: Int[Array, ""],
  *,
  implementation: Implementation | None = None,
) -> Float[Array, "R D"]:
  """Runs each row through its group's MLP: `(silu(x gate) * (x up)) down`.

  As three `grouped_matmul` of the matrices from `first` to `first + E`, but for
  few rows, where reading the matrices is all the time there is: it neither
  copies nor slices them, and of a group without rows it reads none. The result
  of a row is the same whatever the other rows are. Not differentiable.

  Letters: R rows, E groups, X groups that there are matrices of, D and F
  widths.

  Args:
    x: Rows, sorted by group.
    sizes: The number of rows in each group. Rows beyond their sum are in none;
      their results are 0.
    gate: Matrices of these groups and of others, such as all layers' experts.
    up: Likewise.
    down: Likewise.
    first: The place of group 0 among them.
    implementation: A name; `None` takes the fastest, see `dispatch.call`.

  Returns:
    The results in x's dtype, to which each product is rounded.
  """
  args = x, sizes, gate, up, down, first
  return dispatch.call("grouped_mlp", IMPLEMENTATIONS, implementation, *args)
