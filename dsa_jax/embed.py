"""Token embedding and output head; they share no weights.

Letters: B batch, T tokens, D model width, V vocabulary.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax import config as config_lib
from dsa_jax import parameter


class Embed(nnx.Module):
  """Tokens to vectors."""

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.table_VD = parameter.weight(
      rngs, cfg, (cfg.vocab_size, cfg.embed_dim), ("vocab", "embed")
    )

  @jax.named_scope("embed")
  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    out = self.cfg.rules("batch", "seq", None)
    rows = self.table_VD[...].astype(self.cfg.dtype).at[tokens]
    return rows.get(out_sharding=out, mode="clip")


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
    return jnp.einsum(
      "BTD,DV->BTV",
      x,
      self.w_DV[...].astype(self.cfg.dtype),
      preferred_element_type=jnp.float32,
      out_sharding=self.cfg.rules("batch", "seq", "vocab"),
    )
