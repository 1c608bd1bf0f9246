"""Public entry point: selects an implementation."""

from typing import Final

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels import operands
from pallas_kernels.ops.dense_indexer_loss import chunked_xla
from pallas_kernels.ops.dense_indexer_loss import reference
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import op as mosaic_tpu

IMPLEMENTATIONS: Final = {
  "mosaic_tpu": mosaic_tpu.dense_indexer_loss,
  "mosaic_gpu": mosaic_gpu.dense_indexer_loss,
  "chunked_xla": chunked_xla.dense_indexer_loss,
  "reference": reference.dense_indexer_loss,
}


def dense_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
  *,
  implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T"]:
  """KL divergence of each query's index scores from dense attention.

  `KL(p[t] || softmax(I[t]))` over all keys in [start, end), where p is the mean
  over heads of the attention's weights and I the index scores (DeepSeek-V3.2,
  eq. 3). In fp32. Its gradient with respect to I is exactly softmax(I) - p,
  times that of the result. No gradient flows into `attended`. Memory is
  O(T + S) and one tile of queries x keys, except for `reference`; `mosaic_tpu`
  has two, and `mosaic_gpu` about four, tiles of up to 256 MiB.

  Args:
    index: Index, as passed to `indexer_topk`.
    attended: Inputs of `dense_mla`, and the logsumexp that it returned, with
      which p sums to 1: kv is k, [B, S, N, H+R].
    start: First key that each query sees.
    end: One past the last key it sees; with `start >= end` it sees none.
    scale: Softmax scale, as passed to `dense_mla`.
    heads_axis: The mesh axes that shard N, inside a shard_map: the target is
      averaged over them.
    measure: Whether to compute the result. If not, it is 0; the gradient, which
      does not need it, is the same. May be a traced value.
    implementation: A name; `None` takes the fastest, see `dispatch.call`.

  Returns:
    Nats for each query, at least 0 up to rounding; 0 if it sees no key.

  Raises:
    ValueError: The index's keys are in 8 bits.
  """
  index.require_unquantized("dense_indexer_loss")
  args = index, attended, start, end, scale, heads_axis, measure
  return dispatch.call(
    "dense_indexer_loss", IMPLEMENTATIONS, implementation, *args
  )
