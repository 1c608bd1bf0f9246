"""Definition of the op; every implementation must agree with it."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import contraction
from pallas_kernels import operands
from pallas_kernels.ops.indexer_topk import fp8
from pallas_kernels.ops.indexer_topk import paging


def indexer_topk(
  index: operands.Index,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  top_k: int,
  *,
  pages: Int[Array, "B P"] | None = None,
  score_dtype: Literal["float8_e4m3fn"] | None = None,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
  """See `api.indexer_topk`. Materialises [B, T, M, S]."""
  index = jax.lax.stop_gradient(index)
  q, k, w = index.q, index.k, index.w
  k_scale = index.k_scale
  if pages is not None:
    k, k_scale = paging.gather(k, pages), paging.gather_scale(k_scale, pages)
  f32, S = jnp.float32, k.shape[1]
  if score_dtype is not None:
    q, k = fp8.rounded(q), fp8.rounded_keys(k, k_scale, q.dtype)
  logits_BTMS = contraction.einsum("BTMI,BSI->BTMS", q, k)
  scores_BTS = contraction.einsum(
    "BTMS,BTM->BTS", jax.nn.relu(logits_BTMS), w.astype(f32)
  )
  key = jnp.arange(S)[None, None]
  visible_BTS = (key >= start[..., None]) & (key < end[..., None])
  scores_BTS = jnp.where(visible_BTS, scores_BTS, -jnp.inf)

  # Visible first, then highest; a stable sort leaves ties in the order of keys.
  # (-0.0 equals 0.0 here, unlike in lax.top_k.)
  chosen_BTK = jnp.lexsort((-scores_BTS, ~visible_BTS))[..., :top_k]
  chosen_BTK = jnp.where(
    jnp.take_along_axis(visible_BTS, chosen_BTK, -1), chosen_BTK, S
  )
  chosen_BTK = jnp.sort(chosen_BTK)
  pad = [(0, 0), (0, 0), (0, top_k - chosen_BTK.shape[-1])]
  chosen_BTK = jnp.pad(chosen_BTK, pad, constant_values=S)
  scores_BTK = jnp.take_along_axis(
    scores_BTS, chosen_BTK, -1, mode="fill", fill_value=-jnp.inf
  )
  return jnp.where(chosen_BTK < S, chosen_BTK, -1).astype(jnp.int32), scores_BTK
