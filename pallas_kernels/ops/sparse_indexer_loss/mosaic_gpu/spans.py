"""Numbers of a query's selected keys, as a warpgroup holds many at once."""

from collections.abc import Callable
import dataclasses
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.hopper import rows as rows_lib

MULTIPLE: Final = 256  # K is one of this: each of two warpgroups has spans
_SIZES: Final = (1024, 512, 256, 128)


@dataclasses.dataclass(frozen=True)
class Spans:
  """Cuts keys into spans of `size`."""

  size: int

  @classmethod
  def of(cls, K: int) -> "Spans":
    """The longest that divide K, a multiple of 128."""
    return cls(next(x for x in _SIZES if not K % x))

  @property
  def layout(self) -> Any:
    """Of the numbers of a span."""
    return plgpu.Layout.WG_STRIDED((self.size,), 1)

  def number(self, keys: Int[Array, ""]) -> Int[Array, ""]:
    """Spans that hold so many keys."""
    return lax.div(keys + (self.size - 1), self.size)

  def fold(
    self,
    number: Int[Array, ""] | int,
    body: Callable[[pl.Slice, Any], Any],
    carried: Any,
  ) -> Any:
    """Computes `carried = body(keys, carried)` span by span."""

    def step(i, carried):
      return body(pl.ds(i * self.size, self.size), carried)

    return lax.fori_loop(0, number, step, carried)

  def load(self, ref: Any, keys: pl.Slice) -> jax.Array:
    return plgpu.load(ref.at[keys], layout=self.layout)

  def find_rows(
    self,
    indices: Any,
    rows: Any,
    keys: pl.Slice,
    num_rows: int,
    first: Int[Array, ""],
  ) -> Int[Array, " size"]:
    """Stores the row numbers of a span's indices, see `rows.numbers`."""
    found = rows_lib.numbers(self.load(indices, keys), num_rows, first)
    rows[keys] = found
    return found
