"""Scores and selection on Hopper, a chunk of queries at a time."""

import functools
from typing import Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import operands
from pallas_kernels import tiles
from pallas_kernels.ops.indexer_topk import fp8
from pallas_kernels.ops.indexer_topk import paging
from pallas_kernels.ops.indexer_topk.mosaic_gpu import scores as scores_lib
from pallas_kernels.ops.indexer_topk.mosaic_gpu import select as select_lib

# Limit of the scores of a chunk: the memory law.
_CHUNK_BYTES: Final = 256 << 20
_QUERIES: Final = 8  # a chunk is a multiple of this


def indexer_topk(
  index: operands.Index,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  top_k: int,
  *,
  pages: Int[Array, "B P"] | None = None,
  score_dtype: Literal["float8_e4m3fn"] | None = None,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
  """See `api.indexer_topk`. Holds the scores of one chunk of queries.

  With `pages`, also a copy of one row's keys.
  """
  check(index, top_k, score_dtype)
  index = jax.lax.stop_gradient(index)
  T, S = index.q.shape[1], paging.num_keys(index.k, pages)
  bT = chunk_size(T, S)

  def chunk(queries, k, k_scale):
    q, w, start, end = queries
    if score_dtype is not None:
      q, q_scale = fp8.quantize(q)
      w = w * q_scale
    scores_TS = scores_lib.scores(q, k, w, start, end, k_scale)
    end = jnp.minimum(end, S)  # rows of scores are longer
    return select_lib.select(scores_TS, start, end, top_k)

  def row(xs):
    *queries, k = xs
    if pages is not None:
      k = paging.gather(index.k, k)
    k, k_scale = (k, None) if score_dtype is None else fp8.quantize(k)
    tiled = [tiles.split(x, bT) for x in queries]
    indices, scores = jax.lax.map(
      functools.partial(chunk, k=k, k_scale=k_scale), tiled
    )
    return tiles.join(indices, T), tiles.join(scores, T)

  missing = _fitting_heads(index.q.shape[2]) - index.q.shape[2]
  heads = [(0, 0), (0, 0), (0, missing)]  # of zero weight
  q = jnp.pad(index.q, [*heads, (0, 0)]) if missing else index.q
  w = index.w.astype(jnp.float32)
  w = jnp.pad(w, heads) if missing else w
  keys = index.k if pages is None else pages
  return jax.lax.map(row, (q, w, start, end, keys))


def _fitting_heads(M: int) -> int:
  """The fewest index heads that the kernels take and that M fit into."""
  return min(n for n in scores_lib.HEADS if n >= M)


def check(index: operands.Index, top_k: int, score_dtype: str | None) -> None:
  """Raises NotImplementedError for what the kernels cannot do."""
  M, I = index.q.shape[2:]
  for name, x in (("q", index.q), ("k", index.k)):
    if score_dtype is None and x.dtype != jnp.bfloat16:
      raise NotImplementedError(
        f"index.{name}.dtype={x.dtype} is not bfloat16."
      )
  if not 0 < M <= (most := max(scores_lib.HEADS)):
    raise NotImplementedError(f"{M=} index heads: 1 to {most} can be done.")
  dtype = jnp.dtype(score_dtype or jnp.bfloat16)
  if I * dtype.itemsize not in scores_lib.WIDTHS:
    raise NotImplementedError(
      f"Index heads of {I=} {dtype.name} are none of {scores_lib.WIDTHS} bytes "
      "wide."
    )
  if top_k > select_lib.LARGEST_K:
    raise NotImplementedError(
      f"{top_k=} is above {select_lib.LARGEST_K}: the list of candidates would "
      "not fit into shared memory."
    )


def chunk_size(T: int, S: int) -> int:
  """Queries whose scores fit the budget; chunks of about the same size."""
  row_bytes = 4 * (S + -S % scores_lib.bS)
  most = max(_CHUNK_BYTES // row_bytes // _QUERIES, 1) * _QUERIES
  chunks = -(-T // most)
  return -(-T // (chunks * _QUERIES)) * _QUERIES
