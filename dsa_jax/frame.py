"""The frame of a forward pass: positions and visible keys of its tokens.

Letters: B batch, T tokens (queries), S keys, R rotated width.
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
  offset: Int[Array, ""]
  """Where these tokens stand in the cache, if there is one."""
  measure: Bool[Array, ""]
  """Whether to measure the index loss and recall; it may be seldom."""
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

  def extend(
    self, cached: Float[Array, "B S X"] | None, new: Float[Array, "B T X"]
  ) -> Float[Array, "B S X"]:
    """The keys that these tokens may see: their own, after those cached."""
    if cached is None:
      return new
    return jax.lax.dynamic_update_slice_in_dim(cached, new, self.offset, 1)


def make_frame(
  cfg: config_lib.ModelConfig,
  shape: tuple[int, ...],
  positions: Ids | None = None,
  segment_ids: Ids | None = None,
  *,
  attention: Attention = "sparse",
  index_loss: bool = False,
  measure: Bool[Array, ""] | bool = True,
  offset: Int[Array, ""] | None = None,
  first: Int[Array, " B"] | None = None,
) -> Frame:
  """The frame of causal attention within each document of a row.

  Args:
    cfg: The model's config.
    shape: B and T.
    positions: For RoPE; by default the place in the row (or in the cache).
    segment_ids: The document of each token; one document is one run of equal
      numbers, and 0 is padding, which sees nothing. By default one document.
    attention: "sparse" reads K chosen keys a query, "dense" all of them.
    index_loss: Compare the indexer with the attention: over the K keys if that
      is sparse, over all visible ones if it is dense.
    measure: Whether to compute the value of the index loss, and recall. Its
      gradient does not need it.
    offset: Tokens that the cache already holds.
    first: Where each row of the cache begins.

  Raises:
    ValueError: `attention` is unknown, or segments with a cache.
  """
  if attention not in ("dense", "sparse"):
    raise ValueError(f'{attention=} must be "dense" or "sparse".')
  if offset is not None and segment_ids is not None:
    raise ValueError(
      "segment_ids: a cache holds one document a row; pass none."
    )
  place = jnp.arange(shape[1], dtype=jnp.int32)[None]
  natural = cfg.rules("batch", None)
  place = jnp.broadcast_to(place, shape, out_sharding=natural)
  if offset is not None:
    place = place + offset
  start, end = jnp.zeros_like(place), place + 1
  if first is not None:
    start = start + first[:, None]
    positions = place - start
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
    offset=jnp.int32(0) if offset is None else offset,
    measure=jnp.asarray(measure),
    attention=attention,
    index_loss=index_loss,
  )
