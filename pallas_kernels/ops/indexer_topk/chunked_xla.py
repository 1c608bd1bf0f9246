"""Exact selection tile by tile, on any backend, without sorting.

For each tile of bT queries, and for each block of some thousands of keys, from
the first to the last that a query of the tile sees:

  1. score the block's keys, a tile of bS keys at a time; tiles that no query
     sees are skipped. With the K best of the blocks before, which stand first
     so that ties go to them: [bT, X], the largest array there is
  2. map each score to an unsigned integer of the same order
  3. find the K-th largest, bit by bit from the top: 32 counts
  4. mark the keys above it, and the first of those equal to it, as bits: 32
     keys a word
  5. find the k-th marked key by the words' running popcounts, so that the
     indices are ascending

No step depends on the tiling of keys or queries: every score is one dot product
over I and one sum over M. (Its last bits depend on the backend's matmul, which
may differ with the tile's shape: the order of scores that close is arbitrary.)
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import contraction
from pallas_kernels import dispatch
from pallas_kernels import operands
from pallas_kernels import tiles
from pallas_kernels.ops.indexer_topk import fp8
from pallas_kernels.ops.indexer_topk import paging

_WORD = 32  # keys a word
_BLOCK = {"cpu": 4096, "gpu": 65536}  # keys, or 4 K if that is more


def indexer_topk(
  index: operands.Index,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  top_k: int,
  *,
  pages: Int[Array, "B P"] | None = None,
  score_dtype: Literal["float8_e4m3fn"] | None = None,
  query_tile: int | None = None,
  key_tile: int | None = None,
  key_block: int | None = None,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
  """See `api.indexer_topk`.

  `query_tile`, `key_tile` and `key_block` are the queries per tile, the keys
  scored at a time and the keys chosen from at a time; by default as many as fit
  the tile budget. Keys are taken in whole pages. None changes the result.
  """
  index = jax.lax.stop_gradient(index)
  q, k, w, k_scale = index.q, index.k, index.w, index.k_scale
  T, S, M = q.shape[1], paging.num_keys(k, pages), q.shape[2]
  block = _BLOCK.get(dispatch.platform(), _BLOCK["gpu"])
  most = key_block or max(block, 4 * top_k)
  bT = query_tile or tiles.tile_size(T, 8 * min(S, most), largest=128)
  bS = key_tile or tiles.tile_size(S, 4 * bT * M)
  if pages is None:
    if k_scale is not None:
      k_scale = paging.cut(k_scale[..., None], bS)[0][..., 0]
    k, pages = paging.cut(k, bS)
  tile_pages = max(bS // k.shape[1], 1)
  bS = tile_pages * k.shape[1]
  block_tiles = min(-(-S // bS), max(most // bS, 1))
  pages = jnp.pad(pages, [(0, 0), (0, -pages.shape[1] % tile_pages)])

  def row(q, w, start, end, pages):
    keys = _Keys(k, k_scale, pages, tile_pages, score_dtype)
    tile = functools.partial(
      _select_tile, keys=keys, top_k=top_k, block_tiles=block_tiles, S=S
    )
    tiled = [tiles.split(x, bT) for x in (q, w, start, end)]
    indices, scores = jax.lax.map(lambda xs: tile(*xs), tiled)
    return tiles.join(indices, T), tiles.join(scores, T)

  if score_dtype is not None:
    q = fp8.rounded(q)
  # Visibility depends on start and end alone. Tied to q, it cannot be computed
  # in advance, once for all layers of a model: that would be T x S.
  q, start, end = jax.lax.optimization_barrier((q, start, end))
  return tiles.map_rows(
    row,
    *(q, w.astype(jnp.float32), start, end, pages),
    tile_bytes=max(8 * bT * bS * block_tiles, 4 * bT * bS * M),
  )


@dataclasses.dataclass(frozen=True)
class _Keys:
  """The keys of a batch row, read a tile of whole pages at a time."""

  pool: Float[Array, "pages page I"]
  scale: Float[Array, "pages page"] | None
  pages: Int[Array, " P"]
  tile_pages: int
  score_dtype: Literal["float8_e4m3fn"] | None

  @property
  def bS(self) -> int:
    """Keys of a tile."""
    return self.tile_pages * self.pool.shape[1]

  def tile(self, i: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "bS I"]:
    """Keys i bS to (i + 1) bS; those of 8 bits in `dtype`."""
    n = self.tile_pages
    pages = jax.lax.dynamic_slice_in_dim(self.pages, i * n, n)
    k = paging.gather(self.pool, pages)
    if self.score_dtype is None:
      return k
    return fp8.rounded_keys(k, paging.gather_scale(self.scale, pages), dtype)


def _select_tile(q, w, start, end, *, keys, top_k, block_tiles, S):
  """Indices and scores of one tile of queries: q [bT, M, I]."""
  start, end = jnp.clip(start, 0, S), jnp.clip(end, 0, S)
  first, last = tiles.seen_keys(start, end, keys.bS)
  start, end = start[:, None], end[:, None]

  def block(i, best):
    """Chooses from the best keys of earlier blocks, which ascend, and these."""
    tile = i * block_tiles
    seen = jnp.maximum(first, tile), jnp.minimum(last, tile + block_tiles)
    scores_TS = _scores(q, w, keys, tile, seen, block_tiles)
    key_S = tile * keys.bS + jnp.arange(scores_TS.shape[1], dtype=jnp.int32)
    key_TS = jnp.broadcast_to(key_S, scores_TS.shape)
    key_TX, scores_TX = (
      jnp.concatenate(x, 1) for x in zip(best, (key_TS, scores_TS))
    )
    return _select(key_TX, scores_TX, start, end, top_k)

  def nothing(width):
    shape = (len(q), width)
    return jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf)

  if block_tiles * keys.bS >= S:
    return block(0, nothing(0))
  blocks = first // block_tiles, -(-last // block_tiles)
  return jax.lax.fori_loop(*blocks, block, nothing(top_k))


def _select(key_TX, scores_TX, start, end, top_k):
  """The best of these keys, each row of which ascends but for -1."""
  padding = [(0, 0), (0, -key_TX.shape[1] % _WORD)]
  key_TX = jnp.pad(key_TX, padding, constant_values=-1)
  scores_TX = jnp.pad(scores_TX, padding)
  visible_TX = (key_TX >= start) & (key_TX < end)
  order_TX = jnp.where(visible_TX, _order(scores_TX), 0)
  threshold_T1 = _kth_largest(order_TX, top_k)

  above_TW = _pack(order_TX > threshold_T1)
  # Threshold 0: there are at most K visible keys, and all lie above it.
  equal_TW = _pack((order_TX == threshold_T1) & (threshold_T1 > 0))
  missing_T1 = top_k - _popcount(above_TW).sum(-1, keepdims=True)
  equal_before_TW = _exclusive_sum(_popcount(equal_TW))
  chosen_TW = above_TW | _lowest_bits(equal_TW, missing_T1 - equal_before_TW)

  place_TK = _marked(chosen_TW, top_k)
  key_TK, scores_TK = (
    jnp.take_along_axis(
      x, jnp.maximum(place_TK, 0), -1, mode="promise_in_bounds"
    )
    for x in (key_TX, scores_TX)
  )
  exists_TK = place_TK >= 0
  return (
    jnp.where(exists_TK, key_TK, -1),
    jnp.where(exists_TK, scores_TK, -jnp.inf),
  )


def _scores(q, w, keys, tile, seen, block_tiles) -> Float[Array, "T S"]:
  """Scores of a block of key tiles from `tile` on, of those that are seen."""

  def key_tile(i, scores_TS):
    logits = contraction.einsum("TMI,SI->TMS", q, keys.tile(i, q.dtype))
    scores = jnp.sum(jax.nn.relu(logits) * w[..., None], axis=1)
    # -0.0 is a score of 0: it ties with 0.0.
    scores = jnp.where(scores == 0, 0.0, scores)
    return jax.lax.dynamic_update_slice_in_dim(
      scores_TS, scores, (i - tile) * keys.bS, 1
    )

  empty = jnp.zeros((len(q), block_tiles * keys.bS), jnp.float32)
  return jax.lax.fori_loop(*seen, key_tile, empty)


def _order(scores: Float[Array, "T S"]) -> UInt32[Array, "T S"]:
  """Maps each score to an integer above 0 that compares as the score does."""
  bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
  sign = bits >> 31
  return bits ^ jnp.where(sign == 1, jnp.uint32(2**32 - 1), jnp.uint32(2**31))


def _kth_largest(order: UInt32[Array, "T S"], k: int) -> UInt32[Array, "T 1"]:
  """Largest x that at least `k` items of the row reach; 0 without such."""

  def bit(i, found_T1):
    trial_T1 = found_T1 | (jnp.uint32(2**31) >> i.astype(jnp.uint32))
    reached_T1 = jnp.sum(order >= trial_T1, -1, keepdims=True, dtype=jnp.int32)
    return jnp.where(reached_T1 >= k, trial_T1, found_T1)

  zero = jnp.zeros((order.shape[0], 1), jnp.uint32)
  return jax.lax.fori_loop(0, 32, bit, zero)


def _pack(marked: Array) -> UInt32[Array, "T W"]:
  """Bit i of word j says whether key 32 j + i is marked."""
  bits = marked.reshape(marked.shape[0], -1, _WORD).astype(jnp.uint32)
  place = jnp.arange(_WORD, dtype=jnp.uint32)[None, None]
  return jnp.sum(bits << place, -1, dtype=jnp.uint32)


def _popcount(words: UInt32[Array, "..."]) -> Int[Array, "..."]:
  return jax.lax.population_count(words).astype(jnp.int32)


def _exclusive_sum(counts: Int[Array, "T W"]) -> Int[Array, "T W"]:
  return jnp.cumsum(counts, -1) - counts


def _bit_position(
  words: UInt32[Array, "..."], n: Int[Array, "..."]
) -> UInt32[Array, "..."]:
  """Position of the n-th (from 0) set bit of each word, by bisection."""
  n, position = n.astype(jnp.uint32), jnp.zeros_like(words)
  for width in (16, 8, 4, 2, 1):
    low = (words >> position) & jnp.uint32(2**width - 1)
    below = jax.lax.population_count(low)
    higher = n >= below
    n = jnp.where(higher, n - below, n)
    position = jnp.where(higher, position + jnp.uint32(width), position)
  return position


def _lowest_bits(
  words: UInt32[Array, "T W"], n: Int[Array, "T W"]
) -> UInt32[Array, "T W"]:
  """Keeps the n lowest set bits of each word: none if n <= 0, or all."""
  cut = _bit_position(words, jnp.clip(n, 0, _WORD - 1))
  below = words & ((jnp.uint32(1) << cut) - 1)
  return jnp.where(n >= _popcount(words), words, jnp.where(n <= 0, 0, below))


def _marked(words: UInt32[Array, "T W"], k: int) -> Int[Array, "T K"]:
  """First k set bits of each row, ascending, padded with -1."""
  counts_TW = _popcount(words)
  through_TW = jnp.cumsum(counts_TW, -1)
  rank_K = jnp.arange(k, dtype=jnp.int32)
  # The word that holds the rank-th bit: the first with a larger running count.
  search = functools.partial(jnp.searchsorted, side="right")
  word_TK = jax.vmap(search, in_axes=(0, None))(through_TW, rank_K)
  exists_TK = rank_K[None] < through_TW[:, -1:]
  word_TK = jnp.where(exists_TK, word_TK, 0).astype(jnp.int32)
  take = functools.partial(
    jnp.take_along_axis, axis=-1, mode="promise_in_bounds"
  )
  rank_in_word_TK = rank_K[None] - take(through_TW - counts_TW, word_TK)
  bit_TK = _bit_position(take(words, word_TK), rank_in_word_TK)
  index_TK = word_TK * _WORD + bit_TK.astype(jnp.int32)
  return jnp.where(exists_TK, index_TK, -1)
