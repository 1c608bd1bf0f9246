"""The latent cache: C+R+I values a token and layer.

Letters: L layers, B batch, S keys, C latent rank, R rotated width, I index
width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import mla
from dsa_jax import ranges


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Cache of the tokens so far; all rows are equally long."""

  layers: mla.LayerCache
  """Caches of all layers, with L in front."""
  start: Int[Array, " B"]
  """Where each row begins; before it is padding."""
  length: Int[Array, ""]
  """Tokens in it, of room for S."""
  attention: frame_lib.Attention = dataclasses.field(metadata={"static": True})


def make_cache(
  cfg: config_lib.ModelConfig,
  batch: int,
  size: int,
  *,
  attention: frame_lib.Attention = "sparse",
) -> Cache:
  """An empty cache with room for `size` tokens a row.

  Raises:
    ValueError: An argument is not of its kind, or below 1.
  """
  ranges.require("make_cache: batch", batch, ranges.Count)
  ranges.require("make_cache: size", size, ranges.Count)
  ranges.require("make_cache: attention", attention, frame_lib.Attention)

  def zeros(width):
    return jnp.zeros(
      (cfg.num_layers, batch, size, width),
      jnp.dtype(cfg.dtype),
      out_sharding=cfg.rules(None, "batch", None, None),
    )

  layers = mla.LayerCache(
    zeros(cfg.kv_rank + cfg.rope_head_dim), zeros(cfg.index_head_dim)
  )
  start = jnp.zeros((batch,), jnp.int32, out_sharding=cfg.rules("batch"))
  return Cache(layers, start, jnp.zeros((), jnp.int32), attention)
