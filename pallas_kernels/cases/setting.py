"""Setting of a case: sizes, kinds of data, and the seed."""

import dataclasses
import enum
from typing import Literal

import jax

from pallas_kernels import shapes

type Order = Literal["random", "ascending"]
type Visible = Literal["causal", "all"]
type ScoreDType = Literal["float8_e4m3fn"]


class Draw(enum.IntEnum):
  """Data that has random numbers of its own."""

  CHOSEN = 0
  INDEX = 1
  ATTENTION = 2
  COTANGENTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What a case is made for; each case reads what concerns it."""

  shape: shapes.Shape
  order: Order = "random"
  """Order of a query's randomly selected keys."""
  visible: Visible = "causal"
  """Keys that a query sees: up to its own, or all."""
  score_dtype: ScoreDType | None = None
  """Dtype of the indexer's products, if not the inputs' own."""
  measure: bool = True
  """Whether losses are computed, or only their gradients."""
  seed: int = 0

  def key(self, draw: Draw) -> jax.Array:
    """Key of the random numbers of this data."""
    return jax.random.fold_in(jax.random.key(self.seed), draw)
