"""Models and tokens that the tests of this folder share."""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import numpy as np

import dsa_jax
from dsa_jax import config as config_lib

# T > K in every test: selection must matter.
CONFIG = dataclasses.replace(
  config_lib.tiny(),
  vocab_size=64,
  embed_dim=32,
  num_layers=3,
  num_heads=2,
  nope_head_dim=12,
  rope_head_dim=8,
  value_head_dim=16,
  q_rank=24,
  kv_rank=16,
  index_heads=3,
  index_head_dim=16,
  top_k=8,
  dense_ffn_dim=48,
  expert_ffn_dim=24,
  num_experts=8,
  experts_per_token=2,
  init_std=0.2,  # attention that is far from uniform
)
# Of widths that can be cached in 8 bits.
WIDE = dataclasses.replace(CONFIG, kv_rank=128)
EIGHT_BITS: Any = dict(
  index_key_dtype="float8_e4m3fn", latent_dtype="float8_e4m3fn"
)


@functools.cache
def model(cfg: config_lib.ModelConfig = CONFIG) -> dsa_jax.Transformer:
  shapes = nnx.eval_shape(lambda: dsa_jax.Transformer(cfg, rngs=nnx.Rngs(0)))
  return filled(shapes, cfg.init_std)


def filled[Tree](shapes: Tree, std: float) -> Tree:
  """Parameters as a model begins with, made on the host.

  To compile their making would take longer than most tests do.
  """
  rng = np.random.default_rng(0)

  def fill(path, x):
    name = jax.tree_util.keystr(path)
    if "scale_" in name:
      values = np.ones(x.shape)
    elif "bias_" in name:
      values = np.zeros(x.shape)
    else:
      values = rng.normal(0, std, x.shape)
    return jax.device_put(values.astype(x.dtype), x.sharding)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def tokens(batch: int, length: int, cfg=CONFIG, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(0, cfg.vocab_size, (batch, length)).astype(np.int32)


# Two documents and padding in the first row, one document in the second.
SEGMENTS = np.array([[1] * 11 + [2] * 17 + [0] * 4, [1] * 32], np.int32)
POSITIONS = np.array(
  [[*range(11), *range(17), *range(4)], [*range(32)]], np.int32
)
