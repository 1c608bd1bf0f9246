"""Next-token cross-entropy without the logits of a whole sequence.

Letters: B batch, T tokens, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsa_jax import embed
from dsa_jax import sharding
from pallas_kernels import tiles


def shift(x: Shaped[Array, "*B T"], by: int) -> Shaped[Array, "*B T"]:
  """`y[..., t] = x[..., t + by]`; 0 past the end."""
  past_end = [(0, 0)] * (x.ndim - 1) + [(0, min(by, x.shape[-1]))]
  return jnp.pad(x[..., by:], past_end)


def has_target(
  segment_ids: Int[Array, "*B T"], ahead: int = 1
) -> Bool[Array, "*B T"]:
  """Whether the token `ahead` of each is of the same document."""
  return (segment_ids > 0) & (shift(segment_ids, ahead) == segment_ids)


@jax.named_scope("cross_entropy")
def cross_entropy(
  head: embed.Head, x: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """`-log p(target)` of each token, nats, fp32.

  The logits exist for a tile of tokens at a time, in the backward pass as well.

  Args:
    head: Makes the logits.
    x: The trunk's normalised output.
    targets: Of each position; to leave one out, drop its loss.
  """
  (B, T, _), rules = x.shape, head.cfg.rules
  rows = -(-B // rules.shards("batch"))
  columns = head.cfg.vocab_size // rules.shards("vocab")
  own = T // rules.shards("seq")
  bT = tiles.tile_size(own, 4 * rows * columns)

  def cut(x, y):  # [B, T, ...] -> [nT, B, bT, ...]
    return tuple(
      jax.vmap(lambda z: tiles.split(z, bT), 0, 1)(z) for z in (x, y)
    )

  wide, narrow = rules("batch", "seq", None), rules("batch", "seq")
  tiled = rules(None, "batch", "seq", None), rules(None, "batch", "seq")
  cut = sharding.local(cut, (wide, narrow), tiled)
  join = sharding.local(
    jax.vmap(lambda z: tiles.join(z, own), 1), tiled[1:], narrow
  )

  @jax.checkpoint
  def tile(head, x, targets):
    logits_BTV = head(x)
    # A gather would need the whole vocabulary on one device.
    label = jax.lax.broadcasted_iota(
      jnp.int32,
      logits_BTV.shape,
      2,
      out_sharding=jax.typeof(logits_BTV).sharding,
    )
    hit_BTV = label == targets[..., None]
    target_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0), -1)
    return jax.nn.logsumexp(logits_BTV, -1) - target_BT

  # The sum of the tiles' gradients has the dtype of the parameter.
  head = jax.tree.map(lambda w: w.astype(jnp.float32), head)
  return join(jax.lax.map(lambda xs: tile(head, *xs), cut(x, targets)))
