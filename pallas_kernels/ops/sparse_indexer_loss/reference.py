"""Definition of the op; every implementation must agree with it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import contraction
from pallas_kernels import operands


def sparse_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  indices: Int[Array, "B T K"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
) -> Float[Array, "B T"]:
  """See `api.sparse_indexer_loss`. Materialises [B, T, K, C+R]."""
  attended = jax.lax.stop_gradient(attended)
  q, kv, lse = attended.q, attended.kv, attended.lse
  f32, S = jnp.float32, kv.shape[1]
  valid_BTK = (indices >= 0) & (indices < S)
  safe_BTK = jnp.where(valid_BTK, indices, 0)
  take = jax.vmap(lambda rows, chosen: rows[chosen])

  # The target: attention weights summed over heads.
  logits_BTNK = scale * contraction.einsum(
    "BTND,BTKD->BTNK", q, take(kv, safe_BTK)
  )
  weights_BTNK = jnp.where(
    valid_BTK[:, :, None], jnp.exp(logits_BTNK - lse[..., None]), 0.0
  )
  target_BTK = weights_BTNK.sum(2)
  if heads_axis is not None:
    target_BTK = jax.lax.psum(target_BTK, heads_axis)
  mass_BT1 = target_BTK.sum(-1, keepdims=True)
  target_BTK = target_BTK / jnp.where(mass_BT1 > 0, mass_BT1, 1.0)

  # The indexer's own distribution over the same keys.
  similarity_BTMK = contraction.einsum(
    "BTMI,BTKI->BTMK",
    index.q,
    # Cast from fp32, so that the gradient of a key is summed in fp32.
    take(index.k.astype(f32), safe_BTK).astype(index.q.dtype),
  )
  scores_BTK = contraction.einsum(
    "BTMK,BTM->BTK", jax.nn.relu(similarity_BTMK), index.w.astype(f32)
  )
  dead_BT1 = ~valid_BTK.any(-1, keepdims=True)
  scores_BTK = jnp.where(valid_BTK, scores_BTK, -jnp.inf)
  scores_BTK = jnp.where(dead_BT1, 0.0, scores_BTK)
  log_index_BTK = jax.nn.log_softmax(scores_BTK)

  # KL(target || index); a key of zero target adds nothing, whatever its score.
  used_BTK = valid_BTK & (target_BTK > 0)
  log_target_BTK = jnp.log(jnp.where(used_BTK, target_BTK, 1.0))
  gap_BTK = log_target_BTK - jnp.where(used_BTK, log_index_BTK, 0.0)
  loss_BT = jnp.where(used_BTK, target_BTK * gap_BTK, 0.0).sum(-1)
  return loss_BT - jax.lax.stop_gradient(jnp.where(measure, 0.0, loss_BT))
