"""Token embedding and output head; they share no weights.

Letters: B batch, T tokens, D model width, V vocabulary, G devices that
share D.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax import config as config_lib
from dsa_jax import parameter
from dsa_jax import sharding


class Embed(nnx.Module):
  """Tokens to vectors."""

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.table_VD = parameter.weight(
      rngs, cfg, (cfg.vocab_size, cfg.embed_dim), ("vocab", "embed")
    )

  @jax.named_scope("embed")
  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    rules = self.cfg.rules
    look_up = sharding.local(
      functools.partial(
        _rows, dtype=self.cfg.dtype, width_axes=rules.mesh_axes("embed")
      ),
      in_specs=(rules(None, "embed"), rules("batch", "seq")),
      out_specs=rules("batch", "seq", None),
    )
    return look_up(self.table_VD[...], tokens)


def _rows(table_VD, tokens_BT, *, dtype, width_axes):
  """Each token's row; runs inside a shard_map.

  Where devices share the table's width, each looks up its part of the rows of
  all their tokens, and they exchange the parts. The table is in fp32 until
  tokens have their rows, so that a row's gradient, a sum over tokens, is.
  """
  table_VD = table_VD.astype(jnp.float32)
  if width_axes is None:
    return table_VD.at[tokens_BT].get(mode="clip").astype(dtype)
  tokens_GBT = jax.lax.all_gather(tokens_BT, width_axes)
  parts_GBTD = table_VD.at[tokens_GBT].get(mode="clip").astype(dtype)
  return jax.lax.all_to_all(parts_GBTD, width_axes, 0, 3, tiled=True)[0]


class Head(nnx.Module):
  """Normalised vectors to logits."""

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.w_DV = parameter.weight(
      rngs, cfg, (cfg.embed_dim, cfg.vocab_size), ("embed", "vocab")
    )

  @jax.named_scope("head")
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits in fp32."""
    return parameter.einsum(
      "BTD,DV->BTV",
      x,
      self.w_DV[...],
      dtype=jnp.float32,
      out_sharding=self.cfg.rules("batch", "seq", "vocab"),
    )
