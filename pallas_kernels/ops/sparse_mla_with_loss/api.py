"""Public entry point: selects an implementation."""

from typing import Final

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels import operands
from pallas_kernels.ops.sparse_mla_with_loss import composed
from pallas_kernels.ops.sparse_mla_with_loss.mosaic_gpu import op as mosaic_gpu

IMPLEMENTATIONS: Final = {
  "mosaic_tpu": composed.of("mosaic_tpu"),
  "mosaic_gpu": mosaic_gpu.sparse_mla_with_loss,
  "chunked_xla": composed.of("chunked_xla"),
  "reference": composed.of("reference"),
}


def sparse_mla_with_loss(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"],
  indices: Int[Array, "B T K"],
  index: operands.Index,
  latent_rank: int,
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
  *,
  implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"], Float[Array, "B T"]]:
  """Computes `sparse_mla` and the `sparse_indexer_loss` of its attention.

  Fused, since the gradients of both need the attention's weights: a kernel
  computes them once; other implementations run the two ops one by one.

  Args:
    q: Absorbed queries.
    kv: Latents and rotated keys.
    indices: Selected keys, each at most once; entries outside [0, S) are
      ignored.
    index: Index, as passed to `indexer_topk`.
    latent_rank: C.
    scale: Multiplies the attention's logits.
    heads_axis: The mesh axes that shard N, inside a shard_map: the target is
      summed over them.
    measure: Whether to compute the loss. If not, it is 0; the gradient, which
      does not need it, is the same. May be a traced value.
    implementation: A name; `None` takes the fastest, see `dispatch.call`.

  Returns:
    The mixed latents and the logsumexp of `sparse_mla`, differentiable in `q`
    and `kv`; the divergence of each query of `sparse_indexer_loss`,
    differentiable in `index`.

  Raises:
    ValueError: The index's keys are in 8 bits.
  """
  index.require_unquantized("sparse_mla_with_loss")
  implementations = dict(IMPLEMENTATIONS)
  if implementation is None and dispatch.platform() != "cpu":
    # Where no kernel fuses both, each op may still have its own.
    implementations[dispatch.PORTABLE] = composed.of(None)
  args = q, kv, indices, index, latent_rank, scale, heads_axis, measure
  return dispatch.call(
    "sparse_mla_with_loss", implementations, implementation, *args
  )
