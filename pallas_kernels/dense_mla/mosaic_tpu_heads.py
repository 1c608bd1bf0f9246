"""Keys of all heads side by side, of which a TPU's kernel reads whole lanes.

In memory a row fills whole registers of 128 lanes: keys by head, 192 wide,
would take the memory of 256. Side by side they take their own. A head's keys
then begin at a multiple of 64, and from the last multiple of 128 before them
to the first after them may lie 64 numbers of a neighbour: there, its queries
have zeros. To multiply with these takes no time, since the matrix units fill
up widths as well.
"""

from typing import Any, Final

import jax.numpy as jnp
from jaxtyping import Array, Float

LANES: Final = 128


def side_by_side(k: Float[Array, "B S N X"]) -> Float[Array, "B S lanes"]:
  """Keys, and zeros to fill the last register; X is a multiple of 64."""
  B, S, N, X = k.shape
  return jnp.pad(k.reshape(B, S, N * X), [(0, 0), (0, 0), (0, -N * X % LANES)])


def place(n: Any, X: int) -> Any:
  """The lane from which head n of width X is read."""
  return n * X // LANES * LANES


def width(X: int, heads: int = 1) -> int:
  """How many lanes are read for so many heads; their first is a multiple."""
  return -(-heads * X // LANES) * LANES


def queries(q: Float[Array, "B N T X"]) -> Float[Array, "B N T width"]:
  """Queries, and zeros where the neighbours of their heads' keys are."""
  B, N, T, X = q.shape
  if X % LANES == 0:
    return q
  q = jnp.pad(q, [(0, 0), (0, N % 2), (0, 0), (0, 0)])
  left, right = jnp.moveaxis(q.reshape(B, -1, 2, T, X), 2, 0)
  room = [(0, 0)] * 3
  pair = [jnp.pad(left, [*room, (0, 64)]), jnp.pad(right, [*room, (64, 0)])]
  return jnp.stack(pair, 2).reshape(B, -1, T, width(X))[:, :N]
