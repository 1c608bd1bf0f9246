"""Definition of the op; every implementation must agree with it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import contraction
from pallas_kernels import latents
from pallas_kernels import operands


def sparse_mla(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"] | operands.QuantizedLatents,
  indices: Int[Array, "B T K"],
  latent_rank: int,
  scale: float,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """See `api.sparse_mla`. Materialises [B, T, K, C+R]."""
  kv = latents.dequantize(kv, q.dtype)
  f32, S = jnp.float32, kv.shape[1]
  valid_BTK = (indices >= 0) & (indices < S)
  safe_BTK = jnp.where(valid_BTK, indices, 0)
  take = jax.vmap(lambda rows, chosen: rows[chosen])
  # Cast from fp32, so that the gradient of a key is summed in fp32.
  kv_BTKD = take(kv.astype(f32), safe_BTK).astype(kv.dtype)
  logits_BTNK = scale * contraction.einsum("BTND,BTKD->BTNK", q, kv_BTKD)
  logits_BTNK = jnp.where(valid_BTK[:, :, None], logits_BTNK, -jnp.inf)
  dead_BT11 = ~valid_BTK.any(-1)[..., None, None]
  # A finite row in place of a dead one: its softmax has a gradient, of zero.
  logits_BTNK = jnp.where(dead_BT11, 0.0, logits_BTNK)
  lse_BTN = jax.nn.logsumexp(logits_BTNK, axis=-1)
  weights_BTNK = jnp.exp(logits_BTNK - lse_BTN[..., None])
  weights_BTNK = jnp.where(dead_BT11, 0.0, weights_BTNK)
  out_BTNC = contraction.einsum(
    "BTNK,BTKC->BTNC", weights_BTNK, kv_BTKD[..., :latent_rank].astype(f32)
  )
  lse_BTN = jnp.where(dead_BT11[..., 0], -jnp.inf, lse_BTN)
  return out_BTNC.astype(q.dtype), lse_BTN
