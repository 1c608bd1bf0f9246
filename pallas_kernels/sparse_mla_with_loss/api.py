"""Public entry point: picks an implementation."""

from typing import Final, Literal

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.sparse_mla_with_loss import composed
from pallas_kernels.sparse_mla_with_loss import mosaic_gpu

type Implementation = Literal[
  "mosaic_tpu", "mosaic_gpu", "chunked_xla", "reference"
]

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
  q_index: Float[Array, "B T M I"],
  k_index: Float[Array, "B S I"],
  w: Float[Array, "B T M"],
  latent_rank: int,
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
  *,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"], Float[Array, "B T"]]:
  """`sparse_mla`, and the `sparse_indexer_loss` of what it does.

  One op, as the gradients of both need the same thing: the attention's weights.
  A kernel computes them once; other implementations are the two ops in turn.

  Args:
    q: Absorbed queries.
    kv: Latents and rotated keys.
    indices: The chosen keys, each at most once; outside [0, S) is ignored.
    q_index: Index queries, as given to `indexer_topk`.
    k_index: Index keys.
    w: Head weights.
    latent_rank: C.
    scale: Multiplies the attention's logits.
    heads_axis: The mesh axes that shard N, inside a shard_map: what the heads
      attend to is summed over them.
    measure: Whether to compute the loss. If not, it is 0, and the gradient,
      which does not need it, is the same. May be decided as the program runs.
    implementation: `None` takes the fastest that supports these inputs on this
      backend. A name takes that one, or raises `NotImplementedError`.

  Returns:
    As of `sparse_mla`, the mixed latents and the logsumexp, differentiable in
    `q` and `kv`; as of `sparse_indexer_loss`, the divergence of each query,
    differentiable in `q_index`, `k_index` and `w`.
  """
  implementations = dict(IMPLEMENTATIONS)
  if implementation is None and dispatch.platform() != "cpu":
    # Where no kernel does both, there may be one for each.
    implementations[dispatch.PORTABLE] = composed.of(None)
  return dispatch.call(
    "sparse_mla_with_loss",
    implementations,
    implementation,
    q,
    kv,
    indices,
    q_index,
    k_index,
    w,
    latent_rank,
    scale,
    heads_axis,
    measure,
  )
