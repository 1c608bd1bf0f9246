"""Layout of keys with all heads side by side, read in whole lanes on a TPU.

In memory a row fills whole registers of 128 lanes: keys by head, 192 wide,
would take the memory of 256. Side by side there is no padding. A head's keys
then begin at a multiple of 64, so that the window from the last multiple of 128
before them to the first after them may hold 64 numbers of a neighbouring head:
there, its queries have zeros. Multiplying with these zeros is free, since the
matrix units pad widths to the same size.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tpu import lanes


def side_by_side(k: Float[Array, "B S N X"]) -> Float[Array, "B S lanes"]:
  """Concatenates heads, padded to whole registers; X is a multiple of 64."""
  B, S, N, X = k.shape
  return lanes.pad(k.reshape(B, S, N * X), 1, lanes.LANES)


def place(n: Any, X: int) -> Any:
  """First lane of the window of head n, of width X."""
  return n * X // lanes.LANES * lanes.LANES


def width(X: int, heads: int = 1) -> int:
  """Lanes of the window of `heads` heads that start at a register."""
  return lanes.whole(heads * X)


def queries(q: Float[Array, "B N T X"]) -> Float[Array, "B N T width"]:
  """Pads queries with zeros where the window has a neighbouring head's keys."""
  B, N, T, X = q.shape
  if X % lanes.LANES == 0:
    return q
  q = jnp.pad(q, [(0, 0), (0, N % 2), (0, 0), (0, 0)])
  left, right = jnp.moveaxis(q.reshape(B, -1, 2, T, X), 2, 0)
  room = [(0, 0)] * 3
  pair = [jnp.pad(left, [*room, (0, 64)]), jnp.pad(right, [*room, (64, 0)])]
  return jnp.stack(pair, 2).reshape(B, -1, T, width(X))[:, :N]
