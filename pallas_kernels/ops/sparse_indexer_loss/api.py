"""Public entry point: selects an implementation."""

from typing import Final

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels import operands
from pallas_kernels.ops.sparse_indexer_loss import chunked_xla
from pallas_kernels.ops.sparse_indexer_loss import reference
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import op as mosaic_tpu

IMPLEMENTATIONS: Final = {
  "mosaic_tpu": mosaic_tpu.sparse_indexer_loss,
  "mosaic_gpu": mosaic_gpu.sparse_indexer_loss,
  "chunked_xla": chunked_xla.sparse_indexer_loss,
  "reference": reference.sparse_indexer_loss,
}


def sparse_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  indices: Int[Array, "B T K"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
  *,
  implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T"]:
  """KL divergence of each query's index scores from its sparse attention.

  `KL(p[t] || softmax(I[t]))` over the selected keys, where p is the mean over
  heads of the main attention's weights there and I the index scores
  (DeepSeek-V3.2, eq. 4). In fp32. Its gradient with respect to I is exactly
  softmax(I) - p, times that of the result. No gradient flows into `attended`.
  Work is O(T K); memory is the gradients and one tile of queries, or
  with a kernel the target, except for `reference`'s gathered copy. Where the
  attention runs in the same step, `sparse_mla_with_loss` is cheaper.

  Args:
    index: Index, as passed to `indexer_topk`.
    attended: Inputs of `sparse_mla`, and the logsumexp that it returned: kv is
      [B, S, C+R].
    indices: Selected keys, each at most once; entries outside [0, S) are
      ignored.
    scale: Softmax scale, as passed to `sparse_mla`.
    heads_axis: The mesh axes that shard N, inside a shard_map: the target is
      summed over them.
    measure: Whether to compute the result. If not, it is 0; the gradient, which
      does not need it, is the same. May be a traced value.
    implementation: A name; `None` takes the fastest, see `dispatch.call`.

  Returns:
    Nats for each query, at least 0 up to rounding; 0 without a valid key.

  Raises:
    ValueError: The index's keys are in 8 bits.
  """
  index.require_unquantized("sparse_indexer_loss")
  args = index, attended, indices, scale, heads_axis, measure
  return dispatch.call(
    "sparse_indexer_loss", IMPLEMENTATIONS, implementation, *args
  )
