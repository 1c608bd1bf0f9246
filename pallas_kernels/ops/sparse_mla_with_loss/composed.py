"""Definition of the op: one op after the other."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import operands
from pallas_kernels.ops.sparse_indexer_loss import api as sparse_indexer_loss
from pallas_kernels.ops.sparse_mla import api as sparse_mla


def of(implementation: Any) -> Callable[..., Any]:
  """Composes the two ops, both of `implementation`; None selects for each."""

  def sparse_mla_with_loss(
    q: Float[Array, "B T N CR"],
    kv: Float[Array, "B S CR"],
    indices: Int[Array, "B T K"],
    index: operands.Index,
    latent_rank: int,
    scale: float,
    heads_axis: str | tuple[str, ...] | None = None,
    measure: Bool[Array, ""] | bool = True,
  ) -> tuple[
    Float[Array, "B T N C"], Float[Array, "B T N"], Float[Array, "B T"]
  ]:
    """See `api.sparse_mla_with_loss`."""
    out, lse = sparse_mla.sparse_mla(
      q, kv, indices, latent_rank, scale, implementation=implementation
    )
    loss = sparse_indexer_loss.sparse_indexer_loss(
      *(index, operands.Attended(q, kv, lse), indices),
      *(scale, heads_axis, measure),
      implementation=implementation,
    )
    return out, lse, loss

  return sparse_mla_with_loss
