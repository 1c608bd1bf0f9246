"""Lightning indexer: scores every visible key for every query, cheaply.

Letters: B batch, T queries, S keys, K chosen keys, D model width, Q query rank,
M index heads, I their width, of which the first R are rotated.
"""

import dataclasses

from flax import nnx
import jax
from jax import P
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax import cache as cache_lib
from dsa_jax import cached_attention
from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import norms
from dsa_jax import parameter
from dsa_jax import rope
from dsa_jax import sharding
from dsa_jax import zigzag
import pallas_kernels
from pallas_kernels import checkpoint_names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Indexed:
  """Result of an indexer, for its own layer and those that share it."""

  selected: Int[Array, "B T K"] | None
  """The keys to read; None in dense attention, which reads all."""
  index: pallas_kernels.Index | None
  """Learns from the index loss; None if that is not asked for."""


def index_specs(rules: sharding.ShardingRules) -> tuple[P | None, ...]:
  """Specs of an index's q, k and w."""
  return (
    rules("batch", "seq", "index_heads", None),
    rules("keys", None, None),
    rules("batch", "seq", "index_heads"),
  )


class Indexer(nnx.Module):
  """Scores keys, and chooses those to attend to (DeepSeek-V3.2, eq. 1-2)."""

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    D, Q, M, I = cfg.embed_dim, cfg.q_rank, cfg.index_heads, cfg.index_head_dim
    self.cfg = cfg
    self.q_QMI = parameter.weight(
      rngs, cfg, (Q, M, I), ("rank", "index_heads", None)
    )
    self.k_DI = parameter.weight(rngs, cfg, (D, I), ("embed", None))
    self.k_norm = norms.LayerNorm(I, cfg)
    # Kept and applied in fp32: it decides which keys survive.
    self.w_DM = parameter.weight(
      rngs, cfg, (D, M), ("embed", "index_heads"), "float32"
    )

  @jax.named_scope("indexer")
  def __call__(
    self,
    x: Float[Array, "B T D"],
    q_latent: Float[Array, "B T Q"],
    frame: frame_lib.Frame,
  ) -> pallas_kernels.Index:
    """Index queries, keys and weights; the trunk gets no gradient from here.

    Args:
      x: The attention's normalised input.
      q_latent: MLA's normalised query latent.
      frame: Positions and visible keys.
    """
    # The indexer learns from its own loss only, and teaches the trunk nothing.
    x, q_latent = jax.lax.stop_gradient((x, q_latent))
    q_BTMI, w_BTM = self._queries(x, q_latent, frame)
    k_BSI = zigzag.gather_keys(self._keys(x, frame), self.cfg.rules)
    return pallas_kernels.Index(q_BTMI, k_BSI, w_BTM)

  def _queries(self, x, q_latent, frame):
    """Index queries and their heads' weights."""
    cfg, rules = self.cfg, self.cfg.rules
    q_BTMI = parameter.einsum(
      "BTQ,QMI->BTMI",
      q_latent,
      self.q_QMI[...],
      out_sharding=rules("batch", "seq", "index_heads", None),
    )
    w_BTM = parameter.einsum(
      "BTD,DM->BTM",
      x.astype(jnp.float32),
      self.w_DM[...],
      out_sharding=rules("batch", "seq", "index_heads"),
    )
    w_BTM = w_BTM * (cfg.index_heads * cfg.index_head_dim) ** -0.5
    return self._rotate(q_BTMI, frame), w_BTM

  def _keys(self, x, frame):
    """Index keys of these tokens."""
    k_BTI = parameter.einsum(
      "BTD,DI->BTI",
      x,
      self.k_DI[...],
      out_sharding=self.cfg.rules("batch", "seq", None),
    )
    return self._rotate(self.k_norm(k_BTI), frame)

  def _rotate(self, y, frame):
    """Rotates the first R of I dimensions."""
    R = self.cfg.rope_head_dim
    y_rope = rope.rotate(
      y[..., :R],
      frame.cos,
      frame.sin,
      interleaved=self.cfg.index_rope_interleaved,
    )
    return jnp.concatenate([y_rope, y[..., R:]], -1)

  def find(
    self,
    x: Float[Array, "B T D"],
    q_latent: Float[Array, "B T Q"],
    frame: frame_lib.Frame,
    shared: Indexed | None = None,
    full: Bool[Array, ""] | None = None,
  ) -> Indexed:
    """Returns the keys to attend to.

    Args:
      x: As of a call, like `q_latent` and `frame`.
      q_latent: See `x`.
      frame: See `x`.
      shared: What the last full layer found, if layers share it.
      full: Whether this layer is one; if not, it returns `shared`, at no cost.
        None without sharing.
    """

    def own():
      index = self(x, q_latent, frame)
      selected = None
      if frame.attention == "sparse":
        selected = self.select(index, frame.start, frame.end)
      return Indexed(selected, index if frame.index_loss else None)

    if full is None:
      return own()
    return jax.lax.cond(full, own, lambda: shared)

  @jax.named_scope("indexer")
  def cached_keys(
    self, x: Float[Array, "B T D"], frame: frame_lib.Frame
  ) -> Float[Array, "B T I"]:
    """Index keys of these tokens, to be cached."""
    return self._keys(x, frame)

  def find_cached(
    self,
    x: Float[Array, "B T D"],
    q_latent: Float[Array, "B T Q"],
    frame: frame_lib.Frame,
    cache: cache_lib.LayerCache,
  ) -> Int[Array, "B T K"]:
    """The cached keys to attend to, ascending, then -1.

    Args:
      x: As of a call, like `q_latent` and `frame`.
      q_latent: See `x`.
      frame: See `x`.
      cache: The layer's, with the keys of these tokens.
    """
    with jax.named_scope("indexer"):
      q_BTMI, w_BTM = self._queries(x, q_latent, frame)
    with jax.named_scope("select"):
      top_k, rules = self.cfg.top_k, self.cfg.rules
      return cached_attention.select(q_BTMI, w_BTM, cache, frame, top_k, rules)

  @jax.named_scope("select")
  def select(
    self,
    index: pallas_kernels.Index,
    start: Int[Array, "B T"],
    end: Int[Array, "B T"],
  ) -> Int[Array, "B T K"]:
    """The K best of the keys [start, end), ascending, then -1."""
    cfg, rules = self.cfg, self.cfg.rules
    K = min(cfg.top_k, index.k.shape[1])
    per_query = rules("batch", "seq")
    select = sharding.local(
      lambda q, k, w, start, end: pallas_kernels.indexer_topk(
        pallas_kernels.Index(q, k, w), start, end, K
      )[0],
      in_specs=(*index_specs(rules), per_query, per_query),
      out_specs=rules("batch", "seq", None),
    )
    indices = select(index.q, index.k, index.w, start, end)
    # Kept by remat: choosing again could choose otherwise.
    return checkpoint_name(indices, checkpoint_names.INDEXER_TOPK)
