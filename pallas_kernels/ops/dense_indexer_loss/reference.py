"""Definition of the op; every implementation must agree with it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import contraction
from pallas_kernels import operands


def dense_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
) -> Float[Array, "B T"]:
  """See `api.dense_indexer_loss`. Materialises [B, T, N + M, S]."""
  attended = jax.lax.stop_gradient(attended)
  q, k, lse = attended.q, attended.kv, attended.lse
  f32, S = jnp.float32, k.shape[1]
  key = jnp.arange(S)[None, None]
  visible_BTS = (key >= start[..., None]) & (key < end[..., None])

  # The target: attention weights averaged over heads.
  logits_BTNS = scale * contraction.einsum("BTND,BSND->BTNS", q, k)
  weights_BTNS = jnp.where(
    visible_BTS[:, :, None], jnp.exp(logits_BTNS - lse[..., None]), 0.0
  )
  target_BTS = weights_BTNS.mean(2)
  if heads_axis is not None:
    target_BTS = jax.lax.pmean(target_BTS, heads_axis)

  # The indexer's own distribution over the same keys.
  similarity_BTMS = contraction.einsum(
    "BTMI,BSI->BTMS",
    index.q,
    # Cast from fp32, so that the gradient of a key is summed in fp32.
    index.k.astype(f32).astype(index.q.dtype),
  )
  scores_BTS = contraction.einsum(
    "BTMS,BTM->BTS", jax.nn.relu(similarity_BTMS), index.w.astype(f32)
  )
  dead_BT1 = ~visible_BTS.any(-1, keepdims=True)
  scores_BTS = jnp.where(visible_BTS, scores_BTS, -jnp.inf)
  scores_BTS = jnp.where(dead_BT1, 0.0, scores_BTS)
  log_index_BTS = jax.nn.log_softmax(scores_BTS)

  # KL(target || index); a key of zero target adds nothing, whatever its score.
  used_BTS = target_BTS > 0
  log_target_BTS = jnp.log(jnp.where(used_BTS, target_BTS, 1.0))
  gap_BTS = log_target_BTS - jnp.where(used_BTS, log_index_BTS, 0.0)
  loss_BT = jnp.where(used_BTS, target_BTS * gap_BTS, 0.0).sum(-1)
  return loss_BT - jax.lax.stop_gradient(jnp.where(measure, 0.0, loss_BT))
