"""Operands that ops share: an index, latents, an attention that has run."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Index:
  """Factors of index scores: `I[t, s] = sum_m w[t, m] relu(q[t, m] . k[s])`.

  (DeepSeek-V3.2, eq. 1.)
  """

  q: Float[Array, "B T M I"]
  """Index queries, rotated."""
  k: Float[Array, "BX S I"]
  """Index keys, rotated, shared by all heads. BX is B; outside a shard_map, B
  for each device that shares a sequence. For an op that is given `pages`: a
  pool of pages, [pages, page, I]."""
  w: Float[Array, "B T M"]
  """Head weights of each query, with all scales folded in."""
  k_scale: Float[Array, "BX S"] | None = None
  """Scales of keys that are in 8 bits: k is float8_e4m3fn then, and both are
  from `fp8.quantize`. For `indexer_topk` alone, which may have them in `pages`,
  [pages, page]: losses take keys as they were."""

  def require_unquantized(self, op: str) -> None:
    """Raises a ValueError if keys are in 8 bits."""
    if self.k_scale is not None:
      raise ValueError(
        f"{op}: index.k_scale is given, but keys in 8 bits have no gradient; "
        "give k as it was, without k_scale."
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attended:
  """An attention that has run: `exp(scale q . kv - lse)` are its weights."""

  q: Float[Array, "B T N X"]
  """Queries, as the attention got them."""
  kv: Float[Array, "BX S *heads X"]
  """Keys, likewise: latent rows that all heads share, or each head's own."""
  lse: Float[Array, "B T N"]
  """Logsumexp of the scaled logits, as the attention returned it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedLatents:
  """Rows `[c; kr]` of latents in 8 bits, from `latents.quantize`.

  FlashMLA's cache has the same numbers, but those of a row side by side in one
  record; three arrays have each a dtype. A row is as many sectors of 32 bytes
  either way: 21, at DeepSeek's widths.
  """

  values: Float[Array, "*S C"]
  """Latents divided by their scales, float8_e4m3fn."""
  scale: Float[Array, "*S G"]
  """Of each 128 values, float32, a power of two."""
  rope: Float[Array, "*S R"]
  """Rotated keys, bfloat16, as they were."""

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the rows, [..., S, C+R]."""
    C, R = self.values.shape[-1], self.rope.shape[-1]
    return *self.values.shape[:-1], C + R
