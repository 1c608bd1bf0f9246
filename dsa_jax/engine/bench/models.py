"""The models that are measured: their shapes, and random weights."""

import dataclasses
import functools
from typing import Any, Final

from flax import nnx
import jax
import jax.numpy as jnp

import dsa_jax
from dsa_jax import config as config_lib

_WIDE: Final[dict[str, Any]] = dict(
  num_experts=32,
  expert_groups=1,
  groups_per_token=1,
  vocab_size=32768,
  param_dtype="bfloat16",
)


def _wide(layers: int, dense: int) -> dsa_jax.ModelConfig:
  """DeepSeek-V3.2 with few layers, experts and tokens."""
  return dataclasses.replace(
    config_lib.v32_671b(), **_WIDE, num_layers=layers, num_dense_layers=dense
  )


MODELS: Final = {
  "wide": lambda: _wide(layers=4, dense=1),
  "experts": lambda: _wide(layers=2, dense=0),
  "tiny": config_lib.tiny,
}


def config_of(args) -> dsa_jax.ModelConfig:
  """The model's config; it has an MTP block if that drafts."""
  return dataclasses.replace(
    MODELS[args.model](),
    num_mtp_layers=1 if args.speculate else 0,
  )


def make_model(cfg: dsa_jax.ModelConfig) -> dsa_jax.Transformer:
  """Random weights, one array at a time: a program for all takes minutes."""
  graphdef, shapes = nnx.split(
    nnx.eval_shape(lambda: dsa_jax.Transformer(cfg, rngs=nnx.Rngs(0)))
  )

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

  def fill(path, x):
    name = jax.tree_util.keystr(path)
    if "scale_" in name or "bias_" in name:
      return jnp.full(x.shape, float("scale_" in name), x.dtype)
    # Not `hash`, which is another one in each process.
    seed = sum(map(ord, name))
    return normal(jax.random.key(seed), x.shape, x.dtype)

  return nnx.merge(graphdef, jax.tree.map_with_path(fill, shapes))
