"""The definition applied to one tile of queries at a time.

Autodiff runs through it; a tile's intermediates are computed again in the
backward pass, so that no more than one tile of them exists.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tiles
from pallas_kernels.sparse_indexer_loss import reference


def sparse_indexer_loss(
  q_index: Float[Array, "B T M I"],
  k_index: Float[Array, "B S I"],
  w: Float[Array, "B T M"],
  indices: Int[Array, "B T K"],
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"],
  lse: Float[Array, "B T N"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  query_tile: int | None = None,
) -> Float[Array, "B T"]:
  """See `api.sparse_indexer_loss`. `query_tile`: queries held at once."""
  (_, T, N, D), K, I = q.shape, indices.shape[2], k_index.shape[2]
  M = q_index.shape[2]
  bytes_per_query = 4 * K * (D + I + 2 * N + 2 * M)
  bT = query_tile or tiles.tile_size(T, bytes_per_query, largest=128)

  @jax.checkpoint
  def tile(q_index, w, indices, q, lse, k_index, kv):
    batch_of_one = (x[None] for x in (q_index, k_index, w, indices, q, kv, lse))
    return reference.sparse_indexer_loss(*batch_of_one, scale, heads_axis)[0]

  def row(q_index, k_index, w, indices, q, kv, lse):
    tiled = (
      tiles.split(q_index, bT),
      tiles.split(w, bT),
      tiles.split(indices, bT, -1),
      tiles.split(q, bT),
      tiles.split(lse, bT),
    )
    k_index = k_index.astype(jnp.float32)  # its gradient is summed over tiles
    return tiles.join(jax.lax.map(lambda xs: tile(*xs, k_index, kv), tiled), T)

  q, kv, lse = jax.lax.stop_gradient((q, kv, lse))
  return tiles.map_rows(row, q_index, k_index, w, indices, q, kv, lse)
