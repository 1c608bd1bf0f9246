"""Exact selection tile by tile, on any backend, without sorting.

For each tile of bT queries:

  1. score all visible keys, a tile of bS keys at a time: [bT, S], the largest
     array there is; keys that no query of the tile can see are skipped
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

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import contraction
from pallas_kernels import operands
from pallas_kernels import tiles
from pallas_kernels.ops.indexer_topk import fp8

_WORD = 32  # keys a word


def indexer_topk(
  index: operands.Index,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  top_k: int,
  *,
  score_dtype: Literal["float8_e4m3fn"] | None = None,
  query_tile: int | None = None,
  key_tile: int | None = None,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
  """See `api.indexer_topk`.

  `query_tile` and `key_tile` are the queries per tile and the keys scored at a
  time; by default as many as fit the tile budget. Neither changes the result.
  """
  index = jax.lax.stop_gradient(index)
  q, k, w = index.q, index.k, index.w
  T, S, M = q.shape[1], k.shape[1], q.shape[2]
  bT = query_tile or tiles.tile_size(T, 8 * S, largest=128)
  bS = key_tile or tiles.tile_size(S, 4 * bT * M)
  tile = functools.partial(_select_tile, top_k=top_k, bS=bS, S=S)

  def row(q, k, w, start, end):
    k = jnp.pad(k, [(0, -S % bS), (0, 0)])
    tiled = [tiles.split(x, bT) for x in (q, w, start, end)]
    indices, scores = jax.lax.map(lambda xs: tile(*xs, k=k), tiled)
    return tiles.join(indices, T), tiles.join(scores, T)

  if score_dtype is not None:
    q, k = fp8.rounded(q), fp8.rounded(k)
  # Visibility depends on start and end alone. Tied to q, it cannot be computed
  # in advance, once for all layers of a model: that would be T x S.
  q, start, end = jax.lax.optimization_barrier((q, start, end))
  return tiles.map_rows(
    row,
    *(q, k, w.astype(jnp.float32), start, end),
    tile_bytes=max(8 * bT * S, 4 * bT * bS * M),
  )


def _select_tile(q, w, start, end, *, k, top_k, bS, S):
  """Indices and scores of one tile: q [bT, M, I], k [S padded to bS, I]."""
  start, end = jnp.clip(start, 0, S)[:, None], jnp.clip(end, 0, S)[:, None]
  scores_TS = _scores(q, k, w, start, end, bS)
  S_words = -(-k.shape[0] // _WORD) * _WORD
  scores_TS = jnp.pad(scores_TS, [(0, 0), (0, S_words - k.shape[0])])
  key = jnp.arange(S_words, dtype=start.dtype)[None]
  order_TS = jnp.where((key >= start) & (key < end), _order(scores_TS), 0)
  threshold_T1 = _kth_largest(order_TS, top_k)

  above_TW = _pack(order_TS > threshold_T1)
  # Threshold 0: there are at most K visible keys, and all lie above it.
  equal_TW = _pack((order_TS == threshold_T1) & (threshold_T1 > 0))
  missing_T1 = top_k - _popcount(above_TW).sum(-1, keepdims=True)
  equal_before_TW = _exclusive_sum(_popcount(equal_TW))
  chosen_TW = above_TW | _lowest_bits(equal_TW, missing_T1 - equal_before_TW)

  indices_TK = _marked(chosen_TW, top_k)
  scores_TK = jnp.take_along_axis(
    scores_TS, jnp.maximum(indices_TK, 0), -1, mode="promise_in_bounds"
  )
  return indices_TK, jnp.where(indices_TK < 0, -jnp.inf, scores_TK)


def _scores(q, k, w, start, end, bS) -> Float[Array, "T S"]:
  """Scores of the key tiles that at least one of these queries can see."""
  bT, S = q.shape[0], k.shape[0]
  seen = tiles.seen_keys(start[:, 0], end[:, 0], bS)

  def key_tile(i, scores_TS):
    k_tile = jax.lax.dynamic_slice_in_dim(k, i * bS, bS)
    logits = contraction.einsum("TMI,SI->TMS", q, k_tile)
    tile = jnp.sum(jax.nn.relu(logits) * w[..., None], axis=1)
    # -0.0 is a score of 0: it ties with 0.0.
    tile = jnp.where(tile == 0, 0.0, tile)
    return jax.lax.dynamic_update_slice_in_dim(scores_TS, tile, i * bS, 1)

  empty = jnp.zeros((bT, S), jnp.float32)
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
