"""Operands that several ops share: an index, and an attention that has run."""

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
  """Scales of keys that are kept in 8 bits, as `fp8.quantize` made them; k is
  float8_e4m3fn then."""


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
