"""Loss of the indexer against attention to random keys."""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import contraction
from pallas_kernels import operands
from pallas_kernels.cases import contract
from pallas_kernels.cases import data
from pallas_kernels.cases import setting as setting_lib
from pallas_kernels.cases import tolerance
from pallas_kernels.ops.sparse_indexer_loss import api
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import counts

# Queries whose logits are computed at once.
_QUERIES: Final = 16


def make(setting: setting_lib.Setting) -> contract.Case:
  shape = setting.shape
  q, kv = data.latents(setting)
  indices = data.chosen(setting)

  def call(q_index, k_index, w, indices, q, kv, lse, *, implementation):
    return api.sparse_indexer_loss(
      operands.Index(q_index, k_index, w),
      operands.Attended(q, kv, lse),
      indices,
      scale=shape.scale,
      measure=setting.measure,
      implementation=implementation,
    )

  num_selected = data.selected(indices, shape.S)
  target, score = shape.N * (shape.C + shape.R), shape.M * shape.I
  return contract.Case(
    op="sparse_indexer_loss",
    call=call,
    inputs={
      **data.index(setting),
      "indices": indices,
      "q": q,
      "kv": kv,
      "lse": _lse(q, kv, indices, shape.scale),
    },
    differentiated=3,
    shared=("k_index", "kv"),
    outputs={"loss": tolerance.LOSS},
    flops=2 * num_selected * (target + score) * setting.measure,
    flops_backward=2 * num_selected * (target + 3 * score),
    bytes_per_query=4
    * shape.K
    * (4 * (shape.C + shape.R) + 4 * (shape.N + shape.M)),
    kernels=counts.KERNELS,
  )


@jax.jit(static_argnames="scale")
def _lse(
  q: Float[Array, "1 T N CR"],
  kv: Float[Array, "1 S CR"],
  indices: Int[Array, "1 T K"],
  scale: float,
) -> Float[Array, "1 T N"]:
  """Logsumexp of the attention's logits, in float32."""

  def query(xs):
    q_NX, indices_K = xs
    valid_K = (indices_K >= 0) & (indices_K < kv.shape[1])
    keys_KX = kv[0, jnp.where(valid_K, indices_K, 0)]
    logits_NK = scale * contraction.einsum("NX,KX->NK", q_NX, keys_KX)
    return jax.nn.logsumexp(logits_NK, -1, where=valid_K)

  return jax.lax.map(query, (q[0], indices[0]), batch_size=_QUERIES)[None]
