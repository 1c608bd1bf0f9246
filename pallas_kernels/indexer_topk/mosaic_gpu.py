"""Scores and selection by kernels on Hopper, a chunk of queries at a time."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tiles
from pallas_kernels.indexer_topk import select_mosaic_gpu

# What the scores of a chunk may take: the memory law.
_CHUNK_BYTES = 256 << 20
_QUERIES = 8  # a chunk is a multiple of this


def indexer_topk(
  q: Float[Array, "B T M I"],
  k: Float[Array, "B S I"],
  w: Float[Array, "B T M"],
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  top_k: int,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
  """See `api.indexer_topk`."""
  T, S = q.shape[1], k.shape[1]
  bT = chunk_size(T, S)
  q, k, w = jax.lax.stop_gradient((q, k, w.astype(jnp.float32)))

  def chunk(queries, k):
    q, w, start, end = queries
    scores_TS = _scores(q, k, w)
    end = jnp.minimum(end, S)  # the scores are padded
    return select_mosaic_gpu.select(scores_TS, start, end, top_k)

  def row(xs):
    *queries, k = xs
    tiled = [tiles.split(x, bT) for x in queries]
    indices, scores = jax.lax.map(functools.partial(chunk, k=k), tiled)
    return tiles.join(indices, T), tiles.join(scores, T)

  return jax.lax.map(row, (q, w, start, end, k))


def chunk_size(T: int, S: int) -> int:
  """Queries whose scores fit the budget; chunks of about the same size."""
  most = max(_CHUNK_BYTES // (4 * S) // _QUERIES, 1) * _QUERIES
  chunks = -(-T // most)
  return -(-T // (chunks * _QUERIES)) * _QUERIES


def _scores(q, k, w) -> Float[Array, "T S_padded"]:
  bS = tiles.tile_size(k.shape[0], 4 * q.shape[0] * q.shape[1])
  bS = max(bS, 128)

  def key_tile(k):
    logits = jnp.einsum("TMI,SI->TMS", q, k, preferred_element_type=jnp.float32)
    return jnp.sum(jax.nn.relu(logits) * w[..., None], axis=1)

  scores = jax.lax.map(key_tile, tiles.split(k, bS))
  return jnp.swapaxes(scores, 0, 1).reshape(q.shape[0], -1)
