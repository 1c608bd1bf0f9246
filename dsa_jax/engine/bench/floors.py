"""The least work that a pass of the model takes, and so the least time.

A pass runs T tokens of each of B sequences of which `offset` tokens are cached.
Weights count once, in the activations' dtype, and what is cached once, as it is
stored; activations, norms and what is written do not count. Of experts, the
expected number counts that tokens choose if all are as likely: fewer are read
where they are not.

Letters: B sequences, T tokens of each, S keys of a sequence, and those of
config.py.
"""

import dataclasses

import numpy as np

from dsa_jax import cache as cache_lib
from dsa_jax import config as config_lib
from dsa_jax import flops as flops_lib
from pallas_kernels.bench import peak as peak_lib
from pallas_kernels.bench import timing


@dataclasses.dataclass(frozen=True)
class Work:
  """FLOPs, and bytes to read."""

  flops: int | float = 0
  bytes: int | float = 0

  def __add__(self, other: "Work") -> "Work":
    return Work(self.flops + other.flops, self.bytes + other.bytes)

  def seconds(self, peaks: peak_lib.Peaks) -> float:
    """The time of what takes longer, at the rates that were measured."""
    return max(self._each(peaks))

  def bound(self, peaks: peak_lib.Peaks) -> str:
    """What takes longer: "flops" or "bytes"."""
    flops, read = self._each(peaks)
    return "flops" if flops > read else "bytes"

  def _each(self, peaks):
    rates = peaks.flops.rate, peaks.bytes.rate
    assert all(rates)  # nothing has disproved them
    return self.flops / rates[0], self.bytes / rates[1]


@dataclasses.dataclass(frozen=True)
class Stored:
  """Bytes that the cache holds of a token, in each layer."""

  latent: int
  """With its rotated key."""
  key: int
  """Of the indexer."""


def stored(
  cfg: config_lib.ModelConfig, **dtypes: cache_lib.StoredDType | None
) -> Stored:
  """What a pool of these dtypes, see `make_pool`, holds of a token."""
  pool = cache_lib.make_pool(cfg, 1, 1, **dtypes)  # of one token
  size = lambda tree: timing.num_bytes(tree) // pool.layers
  return Stored(size(pool.kv), size(pool.k_index))


def distinct_experts(cfg: config_lib.ModelConfig, tokens: int) -> float:
  """Expected number of a layer's experts that so many tokens choose."""
  E, J = cfg.num_experts, cfg.experts_per_token
  return E * (1 - (1 - J / E) ** tokens)


def select(
  cfg: config_lib.ModelConfig, stored: Stored, B: int, T: int, offset: int
) -> Work:
  """Index scores of all keys that tokens see, in one layer."""
  M, I = cfg.index_heads, cfg.index_head_dim
  pairs = B * int(_visible(T, offset).sum())
  return Work(2 * pairs * M * I, B * (offset + T) * stored.key)


def absorbed(
  attention: str,
  cfg: config_lib.ModelConfig,
  stored: Stored,
  B: int,
  T: int,
  offset: int,
) -> Work:
  """Attention of one layer to latents, all that tokens see or K of them."""
  N, C, R = cfg.num_heads, cfg.kv_rank, cfg.rope_head_dim
  read = _visible(T, offset)
  if attention == "sparse":
    read = np.minimum(read, cfg.top_k)
  # What the last token reads, at least: the others may all read the same.
  return Work(
    2 * B * int(read.sum()) * N * (C + R + C),
    B * int(read[-1]) * stored.latent,
  )


def expanded(
  cfg: config_lib.ModelConfig, stored: Stored, B: int, T: int, offset: int
) -> Work:
  """Attention of one layer to keys and values of each head.

  All cached latents are read and expanded. (The tokens' own are, too: as many
  FLOPs as are in the weights' products in either form.)
  """
  N, C, R = cfg.num_heads, cfg.kv_rank, cfg.rope_head_dim
  H, U = cfg.nope_head_dim, cfg.value_head_dim
  pairs = int(_visible(T, offset).sum())
  return Work(
    2 * B * N * (pairs * (H + R + U) + offset * C * (H + U)),
    B * (offset + T) * stored.latent,
  )


def whole(
  cfg: config_lib.ModelConfig,
  stored: Stored,
  attention: str,
  B: int,
  T: int,
  offset: int,
  *,
  samples: bool,
) -> Work:
  """A pass of all layers.

  Args:
    cfg: The model's config, without MTP.
    stored: What the cache holds.
    attention: "sparse" or "dense".
    B: Sequences.
    T: Tokens of each.
    offset: Tokens cached before.
    samples: Whether logits are computed. If not, the last layer only makes its
      keys: nothing else of it has a use.
  """
  layer, tokens = flops_lib.layer_parameters(cfg), B * T

  def product(weights, read=None):
    """Of each token with weights; of these, so many are read."""
    read = weights if read is None else read
    return Work(2 * tokens * weights, read * _size(cfg))

  experts = product(
    cfg.experts_per_token * layer.expert,
    distinct_experts(cfg, tokens) * layer.expert,
  )
  moe = product(layer.router_and_shared) + experts
  # Of both forms, the one with fewer FLOPs.
  where = cfg, stored, B, T, offset
  attends = min(
    absorbed(attention, *where), expanded(*where), key=lambda work: work.flops
  )
  indexer = product(layer.indexer) + select(*where)
  is_sparse, work = attention == "sparse", Work()
  for i in range(cfg.num_layers):
    has_indexer = is_sparse and cfg.has_indexer[i]
    if not samples and i == cfg.num_layers - 1:
      work += product(cfg.embed_dim * (cfg.kv_rank + cfg.rope_head_dim))
      work += product(cfg.embed_dim * cfg.index_head_dim * int(has_indexer))
      continue
    work += product(layer.attention) + attends
    if has_indexer:
      work += indexer
    work += product(layer.dense_ffn) if i < cfg.num_dense_layers else moe
  if samples:
    work += product(cfg.vocab_size * cfg.embed_dim)
  return work


def _visible(T: int, offset: int) -> np.ndarray:
  """Keys that each token sees."""
  return offset + 1 + np.arange(T)


def _size(cfg: config_lib.ModelConfig) -> int:
  return 2 if cfg.dtype == "bfloat16" else 4
