"""Public entry point: picks an implementation."""

from typing import Final, Literal

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.ops.grouped_matmul import chunked_xla
from pallas_kernels.ops.grouped_matmul import ragged_dot
from pallas_kernels.ops.grouped_matmul import reference

type Implementation = Literal["ragged_dot", "chunked_xla", "reference"]

IMPLEMENTATIONS: Final = {
  "ragged_dot": ragged_dot.grouped_matmul,
  "chunked_xla": chunked_xla.grouped_matmul,
  "reference": reference.grouped_matmul,
}

# All of them are plain XLA: the fastest on a platform is known beforehand.
_FASTEST: Final[dict[str, Implementation]] = {
  "cpu": "chunked_xla",
  "gpu": "chunked_xla",
  "tpu": "ragged_dot",
}


def grouped_matmul(
  x: Float[Array, "R D"],
  w: Float[Array, "E D F"],
  sizes: Int[Array, " E"],
  *,
  implementation: Implementation | None = None,
) -> Float[Array, "R F"]:
  """Multiplies each row by its group's matrix: `y[r] = x[r] w[group of r]`.

  For the experts' MLPs. Differentiable in `x` and `w`.

  Letters: R rows, E groups, D and F widths.

  Args:
    x: Rows, sorted by group.
    w: A matrix for each group.
    sizes: The number of rows in each group. Rows beyond their sum are in none:
      they cost nothing, and their results are finite and have no gradient.
    implementation: `None` takes the fastest on this backend. A name takes that
      one.

  Returns:
    The products in x's dtype.
  """
  if implementation is None:
    implementation = _FASTEST.get(dispatch.platform(), dispatch.PORTABLE)
  return dispatch.call(
    "grouped_matmul", IMPLEMENTATIONS, implementation, x, w, sizes
  )
