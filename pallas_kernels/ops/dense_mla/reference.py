"""Definition of the op; every implementation must agree with it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import contraction


def dense_mla(
  q: Float[Array, "B T N HR"],
  k: Float[Array, "B S N HR"],
  v: Float[Array, "B S N U"],
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  indices: Int[Array, "B T K"] | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
  """See `api.dense_mla`. Materialises [B, T, N, S] and [B, T, K, S]."""
  f32, S = jnp.float32, k.shape[1]
  logits_BTNS = scale * contraction.einsum("BTND,BSND->BTNS", q, k)
  key = jnp.arange(S)[None, None]
  visible_BTS = (key >= start[..., None]) & (key < end[..., None])
  if indices is not None:
    visible_BTS &= (indices[..., None] == key[:, :, None]).any(-2)
  logits_BTNS = jnp.where(visible_BTS[:, :, None], logits_BTNS, -jnp.inf)
  dead_BT11 = ~visible_BTS.any(-1)[..., None, None]
  # A finite row in place of a dead one: its softmax has a gradient, of zero.
  logits_BTNS = jnp.where(dead_BT11, 0.0, logits_BTNS)
  lse_BTN = jax.nn.logsumexp(logits_BTNS, axis=-1)
  weights_BTNS = jnp.exp(logits_BTNS - lse_BTN[..., None])
  weights_BTNS = jnp.where(dead_BT11, 0.0, weights_BTNS)
  out_BTNU = contraction.einsum("BTNS,BSNU->BTNU", weights_BTNS, v.astype(f32))
  lse_BTN = jnp.where(dead_BT11[..., 0], -jnp.inf, lse_BTN)
  return out_BTNU.astype(q.dtype), lse_BTN
