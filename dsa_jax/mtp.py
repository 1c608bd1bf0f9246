"""Multi-token prediction: one more block, for the token after the next.

Letters: B batch, T tokens, D model width.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax import block
from dsa_jax import cache as cache_lib
from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import norms
from dsa_jax import parameter


class MTP(nnx.Module):
  """DeepSeek-V3, eq. 21-23; as released (layer 61), the embedding comes first.

  Embedding and head are the trunk's.
  """

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    D = cfg.embed_dim
    self.cfg = cfg
    self.embed_norm = norms.RMSNorm(D, cfg)
    self.hidden_norm = norms.RMSNorm(D, cfg)
    # Joins [embedding; hidden], 2 D wide.
    self.join_XDD = parameter.weight(
      rngs, cfg, (2, D, D), (None, "embed", None)
    )
    self.block = block.Block(cfg, experts=True, rngs=rngs)
    self.final_norm = norms.RMSNorm(D, cfg)

  @jax.named_scope("mtp")
  def __call__(
    self,
    embedded: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    frame: frame_lib.Frame,
  ) -> tuple[Float[Array, "B T D"], block.LayerOutput]:
    """Vectors that, at t, let the head predict token t + 2.

    Args:
      embedded: The tokens after the trunk's, token 0 where a document ends.
      hidden: The trunk's output after its final norm.
      frame: As given to the trunk.
    """
    x_BTD, output, _ = self.block(self._join(embedded, hidden), frame)
    return self.final_norm(x_BTD), output

  @jax.named_scope("mtp")
  def decode(
    self,
    embedded: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    frame: frame_lib.Frame,
    pool: cache_lib.Pool,
  ) -> tuple[Float[Array, "B T D"], cache_lib.Pool]:
    """The same over a cache, whose last layer is this one's."""
    cache = cache_lib.LayerCache(pool, jnp.int32(self.cfg.num_layers))
    decoded = self.block.decode(self._join(embedded, hidden), frame, cache)
    return self.final_norm(decoded.x), decoded.cache.pool

  def _join(self, embedded, hidden):
    both_XBTD = jnp.stack([self.embed_norm(embedded), self.hidden_norm(hidden)])
    return parameter.einsum(
      "XBTD,XDE->BTE",
      both_XBTD,
      self.join_XDD[...],
      out_sharding=self.cfg.rules("batch", "seq", None),
    )
