"""Parameters and FLOPs of a model, by arithmetic.

A multiplication and an addition are two FLOPs; a backward pass costs twice the
forward. Norms, softmax, RoPE, top-k and what remat computes again do not count.

Letters: T tokens of a sequence, and those of config.py.
"""

import dataclasses

from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerParameters:
  """Weights of one layer that multiply a token (norms and biases do not)."""

  attention: int
  indexer: int
  dense_ffn: int
  router_and_shared: int
  expert: int


def layer_parameters(cfg: config_lib.ModelConfig) -> LayerParameters:
  D, N, Q, C = cfg.embed_dim, cfg.num_heads, cfg.q_rank, cfg.kv_rank
  H, R, U = cfg.nope_head_dim, cfg.rope_head_dim, cfg.value_head_dim
  M, I = cfg.index_heads, cfg.index_head_dim
  expert = 3 * D * cfg.expert_ffn_dim
  return LayerParameters(
    attention=(
      D * Q + Q * N * (H + R) + D * (C + R) + C * N * (H + U) + N * U * D
    ),
    indexer=Q * M * I + D * I + D * M,
    dense_ffn=3 * D * cfg.dense_ffn_dim,
    router_and_shared=D * cfg.num_experts + cfg.num_shared_experts * expert,
    expert=expert,
  )


def _layers(cfg: config_lib.ModelConfig, experts: int) -> int:
  """Weights of all layers, with so many experts in each; MTP's among them.

  A shared layer has no indexer, though it has a place in the stack.
  """
  layer = layer_parameters(cfg)
  blocks = cfg.num_layers + cfg.num_mtp_layers
  moe = cfg.num_moe_layers + cfg.num_mtp_layers
  return (
    blocks * layer.attention
    + int(cfg.has_indexer.sum()) * layer.indexer
    + cfg.num_dense_layers * layer.dense_ffn
    + moe * (layer.router_and_shared + experts * layer.expert)
    + cfg.num_mtp_layers * 2 * cfg.embed_dim**2
  )


def total_parameters(cfg: config_lib.ModelConfig) -> int:
  """All weights, without norms."""
  tables = 2 * cfg.vocab_size * cfg.embed_dim
  return _layers(cfg, cfg.num_experts) + tables


def active_parameters(cfg: config_lib.ModelConfig) -> int:
  """Weights that one token goes through; of the embedding it reads one row."""
  head = cfg.vocab_size * cfg.embed_dim
  return _layers(cfg, cfg.experts_per_token) + head


def training_flops_per_token(
  cfg: config_lib.ModelConfig,
  seq_len: int,
  attention: frame_lib.Attention,
  *,
  trains_model: bool,
  trains_indexer: bool,
) -> float:
  """FLOPs of a training step for each token of a causal sequence.

  Args:
    cfg: The model's config.
    seq_len: T.
    attention: "sparse" adds the indexer's scores of all keys, and attends to K.
    trains_model: If not, the model runs forward only, without its head.
    trains_indexer: Add the indexer's loss on what the attention reads, and its
      gradient.
  """
  layer, blocks = layer_parameters(cfg), cfg.num_layers + cfg.num_mtp_layers
  indexers = int(cfg.has_indexer.sum())
  head = cfg.vocab_size * cfg.embed_dim
  body = active_parameters(cfg) - indexers * layer.indexer - head
  model = 2 * body
  if trains_model:  # MTP goes through the head again
    model = 6 * (body + head * (1 + cfg.num_mtp_layers))
  passes = 3 if trains_model else 1  # forward, and twice that backward
  N, C, R = cfg.num_heads, cfg.kv_rank, cfg.rope_head_dim
  score = 2 * cfg.index_heads * cfg.index_head_dim
  visible = (seq_len + 1) / 2  # keys, on average over a sequence
  if attention == "dense":
    read, key_width = visible, cfg.nope_head_dim + R
    attend = 2 * read * N * (key_width + cfg.value_head_dim)
    index = 0.0
  else:
    K = min(cfg.top_k, seq_len)
    read = K - K * (K - 1) / (2 * seq_len)  # the first K queries see fewer
    key_width = C + R
    attend = 2 * read * N * (key_width + C)
    index = visible * score + 2 * layer.indexer
  compare = 0.0
  if trains_indexer:
    # Of every layer: the target; the scores of the keys read, both ways.
    compare = 2 * read * N * key_width + 3 * read * score
    index += (4 if attention == "sparse" else 6) * layer.indexer
  return model + blocks * (passes * attend + compare) + indexers * index
