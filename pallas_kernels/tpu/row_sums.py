"""Sums of the gradients of rows, in HBM: read, added to, and written back.

The gradients that all queries of a block send to a row are summed before they
are added to the row's sum. The sums of a tile's rows are read while the
products are computed, and written back before the next tile reads its own. One
core does so for all of its blocks in turn: without atomics, in a fixed order.
Each core has its own sums.
"""

import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import row_copies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scratch:
  """Scratch memory of `Sums`."""

  added: Any
  """What the current tile adds to its rows, [bK, D], D in whole registers."""
  rows: Any
  """The rows' sums, as copied."""
  semaphores: Any
  """Semaphores of reading and of writing them."""


def scratch(D: int, bK: int) -> Scratch:
  """Scratch of the sums of rows of D numbers."""
  width = lanes.whole(D)
  pieces = width // lanes.LANES
  return Scratch(
    added=pltpu.VMEM((bK, width), jnp.float32),
    rows=pltpu.VMEM((pieces, bK, 1, lanes.LANES), jnp.float32),
    semaphores=pltpu.SemaphoreType.DMA((2,)),
  )


def zeros(
  rows: Shaped[Array, "pieces 1 128"], cores: int
) -> Float[Array, "cores pieces 1 128"]:
  """Sums to begin with.

  A row and its sum have the same place: `rows` is the result of
  `row_copies.pack`, with a pitch of as many pieces as a row has in fp32.
  """
  return jnp.zeros((cores, *rows.shape), jnp.float32)


def total(
  sums: Float[Array, "cores pieces 1 128"], B: int, S: int, D: int
) -> Float[Array, "B S D"]:
  """Adds the cores' sums, and takes the keys' rows of them."""
  return sums.sum(0).reshape(B, -1, lanes.whole(D))[:, :S, :D]


@dataclasses.dataclass(frozen=True)
class Sums:
  """Sums of the rows of a stream, inside a kernel."""

  stream: row_copies.Stream
  hbm: Any
  """Sums of all cores."""
  core: Any
  scratch: Scratch

  def settle(self, tile: Any) -> None:
    """Waits for the previous tile, which may have changed the same rows."""
    pl.when(tile > 0)(lambda: self._wait(write=True))

  def start(self, tile: Any, part: Any = 0, n_parts: int = 1) -> None:
    """Starts part of reading the tile's sums, and as much of the stream's."""
    pieces, copy = self.stream.lists.pieces.at[tile], self._copy(write=False)
    row_copies.start(copy, pieces, 4, part, n_parts)
    self.stream.start(tile, part, n_parts)

  def add(self, tile: Any) -> None:
    """Adds what is added, and starts writing the tile's sums."""
    self._wait(write=False)
    parts = row_copies.planes(self.scratch.rows, self.stream.interpret)
    for i in range(parts.shape[0]):
      part = slice(i * lanes.LANES, (i + 1) * lanes.LANES)
      parts[i] += self.scratch.added[:, part]
    pieces, copy = self.stream.lists.pieces.at[tile], self._copy(write=True)
    row_copies.start_all(copy, pieces, 4)

  def close(self) -> None:
    """Ends the block; called after its last tile."""
    self._wait(write=True)

  def _wait(self, write):
    semaphore = self.scratch.semaphores.at[int(write)]
    row_copies.wait(self.scratch.rows, semaphore)

  def _copy(self, write):
    rows, semaphores = self.scratch.rows, self.scratch.semaphores

    def copy(piece, place):
      row = self.hbm.at[self.core, pl.ds(piece, rows.shape[0])]
      part = rows.at[:, place]
      source, target = (part, row) if write else (row, part)
      return pltpu.make_async_copy(source, target, semaphores.at[int(write)])

    return copy
