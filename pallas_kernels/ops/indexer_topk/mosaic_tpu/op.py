"""Scores and exact selection on TPUs, in one kernel.

The scores of a block of queries never leave VMEM: 4 bytes per key and query, 16
MiB for 32 queries and 131072 keys. Keys are streamed tile by tile; then the
block's indices are selected (`select_lib`).
"""

import dataclasses
import functools
from typing import Any, Final, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import contraction
from pallas_kernels import operands
from pallas_kernels import tiles
from pallas_kernels.ops.indexer_topk import fp8
from pallas_kernels.ops.indexer_topk import paging
from pallas_kernels.ops.indexer_topk.mosaic_tpu import select as select_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products

_SUBLANES: Final = 8  # queries per vector register
_WORD: Final = select_lib.WORD
bS: Final = select_lib.bS
_COLUMNS: Final = 512  # keys per matrix product
_LARGEST_BLOCK: Final = 32  # queries
# Share of VMEM that a kernel may use: the rest is left to the compiler.
_SHARE: Final = 0.75


def indexer_topk(
  index: operands.Index,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  top_k: int,
  *,
  pages: Int[Array, "B P"] | None = None,
  score_dtype: Literal["float8_e4m3fn"] | None = None,
  query_tile: int | None = None,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
  """See `api.indexer_topk`. Holds a copy of q and k in the kernel's layout.

  With `pages`, also one of all rows' keys.

  The returned scores are recomputed by XLA, for the selected keys only: a step
  that does not read them does not pay for them.

  `query_tile` is the number of queries whose scores are in VMEM at a time, a
  multiple of 8; by default as many as fit, up to 32.
  """
  if index.k_scale is not None:
    raise NotImplementedError(
      "keys in 8 bits (index.k_scale): the kernel reads bfloat16 and float32"
    )
  index = jax.lax.stop_gradient(index)
  q, k, w = index.q, index.k, index.w.astype(jnp.float32)
  (_, T, M, I), S = q.shape, paging.num_keys(k, pages)
  bQ = query_tile or block_size(T, S, M, I, top_k, q.dtype.itemsize)
  check(q, k, S, top_k, bQ)
  if pages is not None:
    k = paging.gather(k, pages)
  if score_dtype is not None:
    q, k = fp8.rounded(q), fp8.rounded(k)
  start, end = jnp.clip(start, 0, S), jnp.clip(end, 0, S)
  indices = _indices(q, k, w, start, end, top_k, bQ)
  return indices, _scores(q, k, w, indices)


def check(
  q: Float[Array, "B T M I"],
  k: Float[Array, "_ _ I"],
  S: int,
  top_k: int,
  bQ: int,
) -> None:
  """Raises NotImplementedError for inputs that the kernel does not support."""
  products.check(q=q, k=k)
  M, I = q.shape[2:]
  needed = vmem_bytes(bQ, S, M, I, top_k, q.dtype.itemsize)
  if needed > _vmem():
    raise NotImplementedError(
      f"{S=} keys, {top_k=} to choose: {bQ} queries take {needed:,} bytes of "
      f"vector memory, and there are {_vmem():,}."
    )


def _vmem():
  return int(_SHARE * tpu.chip().vmem)


def block_size(T: int, S: int, M: int, I: int, K: int, itemsize: int) -> int:
  """Number of queries whose scores are in VMEM at a time."""
  bQ = _LARGEST_BLOCK
  while bQ > _SUBLANES and (
    bQ >= 2 * T or vmem_bytes(bQ, S, M, I, K, itemsize) > _vmem()
  ):
    bQ //= 2
  return bQ


def vmem_bytes(bQ: int, S: int, M: int, I: int, K: int, itemsize: int) -> int:
  """Bytes of VMEM for a block of bQ queries."""
  blocks = (
    itemsize * bQ * M * lanes.whole(I)  # queries
    + itemsize * bS * lanes.whole(I)  # keys
    + 4 * bQ * (lanes.whole(M) + lanes.LANES)  # weights, ranges
    + 4 * bQ * lanes.whole(K)  # indices
  )
  scores = 4 * bQ * (S + -S % bS)
  weights = 4 * bQ * M * lanes.LANES
  logits = 4 * bQ * M * _COLUMNS
  return 2 * blocks + scores + weights + logits


def _indices(q, k, w, start, end, top_k, bQ) -> Int[Array, "B T K"]:
  (B, T, M, I), S = q.shape, k.shape[1]
  nQ, nS, groups = pl.cdiv(T, bQ), pl.cdiv(S, bS), bQ // _SUBLANES
  K = lanes.whole(top_k)
  q, w, start, end = (lanes.pad(x, bQ) for x in (q, w, start, end))
  # Rows of the product: 8 queries of one head, then the same 8 of the next, so
  # that the sum over heads adds whole registers.
  q = q.reshape(B, nQ, groups, _SUBLANES, M, I).swapaxes(3, 4)
  q = q.reshape(B, nQ, bQ * M, I)
  # Columns: see `select_lib`.
  k = lanes.pad(k, bS)
  k = k.reshape(B, nS, lanes.LANES, _WORD, I).transpose(0, 1, 4, 3, 2)
  k = k.reshape(B, nS, I, bS)
  first, last = _tiles_seen(start, end, bQ)

  def of_queries(*block):
    zeros = (0,) * (len(block) - 1)
    return pl.BlockSpec(
      (None, *block), lambda b, i, *_: (b, _block(i, nQ), *zeros)
    )

  def of_keys(b, i, tile, first, last):
    # Tiles that are not seen are not fetched: the index stays the same.
    i = _block(i, nQ)
    return b, jnp.clip(tile, first[b, i], jnp.maximum(last[b, i] - 1, 0)), 0, 0

  needed = vmem_bytes(bQ, S, M, I, K, q.dtype.itemsize)
  indices = pl.pallas_call(
    functools.partial(_kernel, top_k=top_k),
    out_shape=jax.ShapeDtypeStruct((B, nQ * bQ, K), jnp.int32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(B, nQ, nS),
      in_specs=[
        _Inputs(
          q=of_queries(None, bQ * M, I),
          k=pl.BlockSpec((None, None, I, bS), of_keys),
          w=of_queries(bQ, M),
          ranges=of_queries(bQ, 2),
        )
      ],
      out_specs=of_queries(bQ, K),
      scratch_shapes=[
        pltpu.VMEM((groups, M, _SUBLANES, lanes.LANES), jnp.float32),
        pltpu.VMEM((nS, _WORD, bQ, lanes.LANES), jnp.int32),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=int(needed / _SHARE),
    ),
    interpret=tpu.interpret(),
    name=f"indexer_topk_q{bQ}_k{bS}",
  )(first, last, _Inputs(q, k, w, jnp.stack([start, end], -1)))
  return indices[:, :T, :top_k]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
  """A block of queries, and a tile of keys."""

  q: Any
  k: Any
  w: Any
  ranges: Any


def _block(i, nQ):
  """Block of queries of grid step `i`: even blocks first, then odd ones.

  On a chip that splits the grid between two cores this balances the work, since
  later queries see more keys.
  """
  return 2 * i % nQ + 2 * i // nQ * (1 - nQ % 2)


def _tiles_seen(start, end, bQ):
  """Range of key tiles that each block of queries sees, [B, nQ] each."""
  start, end = (x.reshape(x.shape[0], -1, bQ) for x in (start, end))
  alive = start < end
  first = jnp.where(alive, start, jnp.iinfo(jnp.int32).max).min(-1) // bS
  last = pl.cdiv(jnp.where(alive, end, 0).max(-1), bS)
  return jnp.minimum(first, last), last


def _kernel(
  first_ref, last_ref, given, index_ref, w_lanes_ref, order_ref, *, top_k
):
  """Scores one tile of keys; after the last one, selects."""
  b, i, tile = (pl.program_id(axis) for axis in range(3))
  i = _block(i, pl.num_programs(1))
  seen = first_ref[b, i], last_ref[b, i]
  bQ, M = given.w.shape
  start = jnp.broadcast_to(given.ranges[:, :1], (bQ, lanes.LANES))
  end = jnp.broadcast_to(given.ranges[:, 1:], (bQ, lanes.LANES))

  @pl.when(tile == 0)
  def _():
    for group, rows in enumerate(_groups(bQ)):
      for m in range(M):
        w_lanes_ref[group, m] = jnp.broadcast_to(
          given.w[rows, m : m + 1], (_SUBLANES, lanes.LANES)
        )

  @pl.when((tile >= seen[0]) & (tile < seen[1]))
  def _():
    _score(given.q, given.k, w_lanes_ref, order_ref, tile, start, end)

  @pl.when(tile == pl.num_programs(2) - 1)
  def _():
    visible = jnp.maximum(end - start, 0)
    select_lib.select(order_ref, index_ref, seen, visible, top_k)


def _groups(bQ: int) -> list[slice]:
  """Rows of each register of queries."""
  return [slice(row, row + _SUBLANES) for row in range(0, bQ, _SUBLANES)]


def _score(q_ref, k_ref, w_lanes_ref, order_ref, tile, start, end):
  """Writes a tile's scores, as ordered integers, to `order_ref[tile]`.

  Its shape is [32, bQ, 128].
  """
  groups, M = w_lanes_ref.shape[:2]

  def columns(i, _):
    at = pl.ds(pl.multiple_of(i * _COLUMNS, _COLUMNS), _COLUMNS)
    logits = products.dot(q_ref[...], k_ref[:, at], products.NN)
    logits = logits.reshape(groups, M, _SUBLANES, _COLUMNS)
    for group, rows in enumerate(_groups(groups * _SUBLANES)):
      for n in range(_COLUMNS // lanes.LANES):
        part = slice(n * lanes.LANES, (n + 1) * lanes.LANES)
        similarities = jnp.maximum(logits[group, :, :, part], 0.0)
        scores = jnp.sum(similarities * w_lanes_ref[group], axis=0)
        row = i * (_COLUMNS // lanes.LANES) + n
        key = select_lib.key_of(tile, jnp.full_like(start[rows], row))
        order_ref[tile, row, rows] = jnp.where(
          (key >= start[rows]) & (key < end[rows]),
          select_lib.order(scores),
          select_lib.HIDDEN,
        )

  jax.lax.fori_loop(0, bS // _COLUMNS, columns, None)


def _scores(q, k, w, indices) -> Float[Array, "B T K"]:
  """Scores of the selected keys, a tile of queries at a time; -inf for -1."""
  T, M, K = q.shape[1], q.shape[2], indices.shape[-1]
  row_bytes = K * (4 * M + q.dtype.itemsize * q.shape[3])
  bT = tiles.tile_size(T, row_bytes, largest=128)

  def tile(k, q, w, indices):
    chosen_TKI = k[jnp.maximum(indices, 0)]
    logits_TMK = contraction.einsum("TMI,TKI->TMK", q, chosen_TKI)
    scores_TK = jnp.sum(jax.nn.relu(logits_TMK) * w[..., None], axis=1)
    scores_TK = jnp.where(scores_TK == 0, 0.0, scores_TK)  # not -0.0
    return jnp.where(indices < 0, -jnp.inf, scores_TK)

  def row(q, k, w, indices):
    tiled = [tiles.split(x, bT) for x in (q, w, indices)]
    return tiles.join(jax.lax.map(lambda xs: tile(k, *xs), tiled), T)

  return tiles.map_rows(row, q, k, w, indices, tile_bytes=bT * row_bytes)
