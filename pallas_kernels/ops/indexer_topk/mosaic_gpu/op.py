"""Scores and selection on Hopper, a chunk of queries at a time."""

from typing import Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import operands
from pallas_kernels import tiles
from pallas_kernels.ops.indexer_topk import fp8
from pallas_kernels.ops.indexer_topk import paging
from pallas_kernels.ops.indexer_topk.mosaic_gpu import plan as plan_lib
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

  Reads keys where they lie in their pages.
  """
  check(index, top_k, pages, score_dtype)
  index = jax.lax.stop_gradient(index)
  (B, T), S = start.shape, paging.num_keys(index.k, pages)
  q, k, k_scale, w = index.q, index.k, index.k_scale, index.w
  if pages is None:  # each row's keys are a page of their own
    k = jnp.pad(k, [(0, 0), (0, -S % plan_lib.ROWS), (0, 0)])
    pages = jnp.arange(B, dtype=jnp.int32)[:, None]
  if score_dtype is not None and k_scale is None:
    k, k_scale = fp8.quantize(k)
  rows, bT = chunk_size(B, T, S)

  def chunk(xs):
    q, w, start, end, pages = xs
    w = w.astype(jnp.float32)
    if k_scale is not None:
      q, q_scale = fp8.quantize(q)
      w = w * q_scale
    missing = _fitting_heads(q.shape[2]) - q.shape[2]
    heads = [(0, 0), (0, 0), (0, missing)]  # of zero weight
    q, w = jnp.pad(q, [*heads, (0, 0)]), jnp.pad(w, heads)
    scores_BTS = scores_lib.scores(q, k, w, start, end, pages, k_scale)
    chosen = select_lib.select(
      scores_BTS.reshape(rows * bT, -1),
      start.reshape(-1),
      jnp.minimum(end, S).reshape(-1),  # rows of scores are longer
      top_k,
    )
    return [x.reshape(rows, bT, top_k) for x in chosen]

  # A chunk is some rows of the batch, or some of a row's queries.
  parts = -(-T // bT)
  queries = [
    jnp.pad(x, [(0, 0), (0, -T % bT), *[(0, 0)] * (x.ndim - 2)])
    for x in (q, w, start, end)
  ]
  queries = [x.reshape(B * parts, bT, *x.shape[2:]) for x in queries]
  inputs = *queries, jnp.repeat(pages, parts, 0)
  chosen = jax.lax.map(chunk, [tiles.split(x, rows) for x in inputs])
  indices, scores = (
    tiles.join(x, B * parts).reshape(B, parts * bT, top_k)[:, :T]
    for x in chosen
  )
  return indices, scores


def _fitting_heads(M: int) -> int:
  """The fewest index heads that the kernels take and that M fit into."""
  return min(n for n in plan_lib.HEADS if n >= M)


def check(
  index: operands.Index,
  top_k: int,
  pages: Int[Array, "B P"] | None,
  score_dtype: str | None,
) -> None:
  """Raises NotImplementedError for what the kernels cannot do."""
  M, I = index.q.shape[2:]
  is_kept = index.k_scale is not None  # in 8 bits
  eight = is_kept or score_dtype is not None
  for name, x in (("q", index.q), ("k", index.k)):
    if not eight and x.dtype != jnp.bfloat16:
      raise NotImplementedError(
        f"index.{name}.dtype={x.dtype} is not bfloat16."
      )
  if not 0 < M <= (most := max(plan_lib.HEADS)):
    raise NotImplementedError(f"{M=} index heads: 1 to {most} can be done.")
  dtype = jnp.dtype(jnp.float8_e4m3fn if eight else jnp.bfloat16)
  if I * dtype.itemsize not in scores_lib.WIDTHS:
    raise NotImplementedError(
      f"Index heads of {I=} {dtype.name} are none of {scores_lib.WIDTHS} bytes "
      "wide."
    )
  if pages is not None and eight and not is_kept:
    raise NotImplementedError(
      f"{score_dtype=} of a pool would quantise all of it: give keys that have "
      "index.k_scale."
    )
  if pages is not None and index.k.shape[1] % plan_lib.ROWS:
    raise NotImplementedError(
      f"Pages of {index.k.shape[1]} keys are no multiple of {plan_lib.ROWS}."
    )
  if top_k > select_lib.LARGEST_K:
    raise NotImplementedError(
      f"{top_k=} is above {select_lib.LARGEST_K}: the list of candidates would "
      "not fit into shared memory."
    )


def chunk_size(B: int, T: int, S: int) -> tuple[int, int]:
  """Rows of the batch and queries of each whose scores fit the budget.

  Several rows, with all their T queries; or chunks of about the same size.
  """
  row_bytes = 4 * (S + -S % plan_lib.bS)
  most = max(_CHUNK_BYTES // row_bytes // _QUERIES, 1) * _QUERIES
  if T <= most:
    return min(B, most // T), T
  chunks = -(-T // most)
  return 1, -(-T // (chunks * _QUERIES)) * _QUERIES
