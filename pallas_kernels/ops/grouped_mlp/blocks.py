"""Rows cut into blocks, of one group each.

Letters: R rows, sorted by group, E groups, G blocks of b rows.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

_FEWEST = 8  # rows of a block


@dataclasses.dataclass(frozen=True)
class Blocks:
  """The groups' blocks in order; there may be fewer than G."""

  size: int
  """Rows of a block; the last of a group has fewer of its group's."""
  count: Int[Array, ""]
  group_G: Int[Array, " G"]
  row_G: Int[Array, " G"]
  """Its first."""
  _first_row_E: Int[Array, " E"]
  _first_block_E: Int[Array, " E"]

  @classmethod
  def of(cls, R: int, sizes: Int[Array, " E"], size: int) -> "Blocks":
    blocks_E = -(-sizes // size)
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    first_row_E = jnp.cumsum(sizes) - sizes
    # At most one partial block a group.
    block_G = jnp.arange(min(R, R // size + len(sizes)))
    group_G = _group_of(block_G, first_block_E)
    return cls(
      size=size,
      count=blocks_E.sum(),
      group_G=group_G,
      row_G=first_row_E[group_G] + size * (block_G - first_block_E[group_G]),
      _first_row_E=first_row_E,
      _first_block_E=first_block_E,
    )

  def rows(self) -> Int[Array, "G b"]:
    """Those of each block; past its group's end they are other groups', or
    none."""
    return self.row_G[:, None] + jnp.arange(self.size)[None]

  def places(self, R: int) -> Int[Array, " R"]:
    """Where each row is among those of all blocks; of a row of no group it
    means nothing."""
    row_R = jnp.arange(R)
    group_R = _group_of(row_R, self._first_row_E)
    in_group_R = row_R - self._first_row_E[group_R]
    return self._first_block_E[group_R] * self.size + in_group_R


def _group_of(place, first_E):
  """The last group that begins at or before each place."""
  # Empty groups begin where the next one does.
  found = jnp.searchsorted(first_E, place, "right", method="compare_all")
  return found - 1


def even_size(R: int, E: int) -> int:
  """Rows of a block: a power of two, about twice what a group has."""
  even = 1 << (2 * R // E).bit_length() - 1 if 2 * R >= E else 1
  return max(even, _FEWEST)
