"""Loss of the indexer against attention to all visible keys."""

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
from pallas_kernels.ops.dense_indexer_loss import api
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import counts

# Logits that are computed at once.
_LOGITS: Final = 1 << 28


def make(
  setting: setting_lib.Setting, attended: operands.Attended | None = None
) -> contract.Case:
  """Compares with `attended`, or else with an attention of its own."""
  shape = setting.shape
  start, end = data.ranges(shape, setting.visible)
  if attended is None:
    q, k = data.heads(setting)
    attended = operands.Attended(q, k, _lse(q, k, start, end, shape.scale))

  def call(q_index, k_index, w, start, end, q, k, lse, *, implementation):
    return api.dense_indexer_loss(
      operands.Index(q_index, k_index, w),
      operands.Attended(q, k, lse),
      *(start, end),
      scale=shape.scale,
      measure=setting.measure,
      implementation=implementation,
    )

  num_pairs = data.pairs(start, end)
  target, score = shape.N * (shape.H + shape.R), shape.M * shape.I
  return contract.Case(
    op="dense_indexer_loss",
    call=call,
    inputs={
      **data.index(setting),
      "start": start,
      "end": end,
      "q": attended.q,
      "k": attended.kv,
      "lse": attended.lse,
    },
    differentiated=3,
    shared=("k_index", "k"),
    outputs={"loss": tolerance.LOSS},
    flops=2 * num_pairs * (target + score) * setting.measure,
    flops_backward=2 * num_pairs * (target + 3 * score),
    bytes_per_query=4 * shape.S * (3 * shape.N + 4 * shape.M),
    kernels=counts.KERNELS,
  )


@jax.jit(static_argnames="scale")
def _lse(
  q: Float[Array, "1 T N HR"],
  k: Float[Array, "1 S N HR"],
  start: Int[Array, "1 T"],
  end: Int[Array, "1 T"],
  scale: float,
) -> Float[Array, "1 T N"]:
  """Logsumexp of the attention's logits, in float32."""
  S, N = k.shape[1:3]
  key_S = jnp.arange(S)

  def query(xs):
    q_NX, start, end = xs
    logits_NS = scale * contraction.einsum("NX,SNX->NS", q_NX, k[0])
    sees_S = (start <= key_S) & (key_S < end)
    return jax.nn.logsumexp(logits_NS, -1, where=sees_S)

  some = max(_LOGITS // (N * S), 1)
  return jax.lax.map(query, (q[0], start[0], end[0]), batch_size=some)[None]
