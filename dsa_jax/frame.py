"""The frame of a forward pass: positions and visible keys of its tokens.

Letters: B batch, T tokens (queries), S keys, R rotated width, P pages of a
sequence.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from dsa_jax import config as config_lib
from dsa_jax import rope
from dsa_jax import sharding
from dsa_jax import zigzag

type Attention = Literal["dense", "sparse"]

# What a caller may give for tokens, positions and segments.
Ids = Int[Array | np.ndarray, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paging:
  """Where the keys of sequences lie in the cache, see `cache.Pool`."""

  pages: Int[Array, "B P"]
  """The pages of each row's sequence, in order; those beyond its end are not
  read."""
  page: Int[Array, "B T"]
  """The page that each token's key goes to; -1 for none."""
  place: Int[Array, "B T"]
  """Its place there."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
  """Positions, visible keys, and how to attend.

  Tokens are in the order of `zigzag.scatter`, keys in their natural order.
  """

  cos: Float[Array, "B T R2"]
  sin: Float[Array, "B T R2"]
  start: Int[Array, "B T"]
  """The first key that each token sees."""
  end: Int[Array, "B T"]
  """One past the last key that it sees."""
  measure: Bool[Array, ""]
  """Whether to measure the index loss and recall; it may be seldom."""
  paging: Paging | None = None
  """Where the keys are, if they are cached."""
  attention: Attention = dataclasses.field(
    default="sparse", metadata={"static": True}
  )
  """All visible keys, or the indexer's K."""
  index_loss: bool = dataclasses.field(default=False, metadata={"static": True})
  """Teach the indexer what the attention does, and measure how it fares."""

  @property
  def valid(self) -> Bool[Array, "B T"]:
    """Tokens that see at least one key: all but padding."""
    return self.start < self.end


def make_frame(
  cfg: config_lib.ModelConfig,
  shape: tuple[int, ...],
  positions: Ids | None = None,
  segment_ids: Ids | None = None,
  *,
  attention: Attention = "sparse",
  index_loss: bool = False,
  measure: Bool[Array, ""] | bool = True,
) -> Frame:
  """The frame of causal attention within each document of a row.

  Args:
    cfg: The model's config.
    shape: B and T.
    positions: For RoPE; by default the place in the row.
    segment_ids: The document of each token; one document is one run of equal
      numbers, and 0 is padding, which sees nothing. By default one document.
    attention: "sparse" reads K chosen keys a query, "dense" all of them.
    index_loss: Compare the indexer with the attention: over the K keys if that
      is sparse, over all visible ones if it is dense.
    measure: Whether to compute the value of the index loss, and recall. Its
      gradient does not need it.

  Raises:
    ValueError: `attention` is unknown.
  """
  if attention not in ("dense", "sparse"):
    raise ValueError(f'{attention=} must be "dense" or "sparse".')
  place = jnp.arange(shape[1], dtype=jnp.int32)[None]
  natural = cfg.rules("batch", None)
  place = jnp.broadcast_to(place, shape, out_sharding=natural)
  start, end = jnp.zeros_like(place), place + 1
  if segment_ids is not None:
    segment_ids = sharding.put(segment_ids, natural)
    previous = jnp.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]
    begins = (segment_ids != previous) | (place == 0)
    start = jax.lax.cummax(jnp.where(begins, place, 0), 1)
    real = segment_ids > 0
    start, end = jnp.where(real, start, 0), jnp.where(real, end, 0)
  positions = place if positions is None else sharding.put(positions, natural)
  start, end, positions = (
    zigzag.scatter(x, cfg.rules) for x in (start, end, positions)
  )
  cos, sin = rope.angles(positions, cfg)
  return Frame(
    cos=cos,
    sin=sin,
    start=start,
    end=end,
    measure=jnp.asarray(measure),
    attention=attention,
    index_loss=index_loss,
  )


def make_cached_frame(
  cfg: config_lib.ModelConfig,
  pages: Int[Array | np.ndarray, "B P"],
  page_size: int,
  offset: Int[Array | np.ndarray, " B"],
  count: Int[Array | np.ndarray, " B"],
  length: int,
  *,
  attention: Attention = "sparse",
) -> Frame:
  """The frame of tokens that follow what is cached of their sequences.

  Nothing here depends on where pages lie: a key is known by its place in the
  sequence.

  Args:
    cfg: The model's config; its rules must not share a sequence among devices.
    pages: The pages of each row's sequence, see `Paging`.
    page_size: Tokens of a page.
    offset: Tokens of each row's sequence that are cached.
    count: Tokens that follow in this pass, at most `length`; the rest of a row
      sees nothing and is not kept.
    length: T.
    attention: "sparse" reads K chosen keys a query, "dense" all of them.
  """
  pages, offset, count = (
    sharding.put(x, cfg.rules("batch", *(None,) * (x.ndim - 1)))
    for x in (pages, offset, count)
  )
  step_1T = jnp.arange(length, dtype=jnp.int32)[None]
  real_BT = step_1T < count[:, None]
  key_BT = jnp.where(real_BT, offset[:, None] + step_1T, 0)
  page_BT = jnp.take_along_axis(pages, key_BT // page_size, 1, mode="clip")
  cos, sin = rope.angles(key_BT, cfg)
  return Frame(
    cos=cos,
    sin=sin,
    start=jnp.zeros_like(key_BT),
    end=jnp.where(real_BT, key_BT + 1, 0),
    paging=Paging(pages, jnp.where(real_BT, page_BT, -1), key_BT % page_size),
    measure=jnp.asarray(False),
    attention=attention,
  )
