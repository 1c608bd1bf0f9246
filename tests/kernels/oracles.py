"""The ops as loops over float64 numbers, written from their contracts alone.

Letters as in `pallas_kernels`. Gradients are written out by hand.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

type Arrays = tuple[np.ndarray, ...]


def _float64(*arrays: ArrayLike) -> Arrays:
  return tuple(np.asarray(x).astype(np.float64) for x in arrays)


def index_scores(q: ArrayLike, k: ArrayLike, w: ArrayLike) -> np.ndarray:
  """Index scores [B, T, S] of every key, seen or not."""
  q_BTMI, k_BSI, w_BTM = _float64(q, k, w)
  (B, T, M, _), S = q_BTMI.shape, k_BSI.shape[1]
  scores_BTS = np.zeros((B, T, S))
  for b, t, s, m in np.ndindex(B, T, S, M):
    similarity = q_BTMI[b, t, m] @ k_BSI[b, s]
    if similarity > 0:
      scores_BTS[b, t, s] += w_BTM[b, t, m] * similarity
  return scores_BTS


def topk(
  scores: ArrayLike, start: ArrayLike, end: ArrayLike, top_k: int
) -> Arrays:
  """Keys [B, T, K] that `indexer_topk` must choose, and their scores."""
  scores_BTS = np.asarray(scores)
  start_BT, end_BT = np.asarray(start).tolist(), np.asarray(end).tolist()
  B, T, S = scores_BTS.shape
  indices_BTK = np.full((B, T, top_k), -1)
  chosen_BTK = np.full((B, T, top_k), -np.inf)
  for b, t in np.ndindex(B, T):
    visible = [s for s in range(S) if start_BT[b][t] <= s < end_BT[b][t]]
    ranked = sorted(visible, key=lambda s: (-scores_BTS[b, t, s], s))
    for place, s in enumerate(sorted(ranked[:top_k])):
      indices_BTK[b, t, place] = s
      chosen_BTK[b, t, place] = scores_BTS[b, t, s]
  return indices_BTK, chosen_BTK


def _valid(indices_K: np.ndarray, S: int) -> list[int]:
  return [i for i in indices_K.tolist() if 0 <= i < S]


def _attend(
  q_D: np.ndarray,
  k_KD: np.ndarray,
  v_KU: np.ndarray,
  scale: float,
  d_out_U: np.ndarray,
  d_lse: float,
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray, np.ndarray]:
  """One query, one head, the keys that it sees: out, lse, dq, dk, dv."""
  if not len(k_KD):
    zeros = np.zeros_like(q_D), np.zeros_like(k_KD), np.zeros_like(v_KU)
    return np.zeros_like(d_out_U), -np.inf, *zeros
  logits_K = scale * (k_KD @ q_D)
  lse = np.logaddexp.reduce(logits_K)
  weights_K = np.exp(logits_K - lse)
  out_U = weights_K @ v_KU
  d_logits_K = weights_K * (v_KU @ d_out_U - out_U @ d_out_U + d_lse)
  d_q_D = scale * d_logits_K @ k_KD
  d_k_KD = scale * np.outer(d_logits_K, q_D)
  return out_U, lse, d_q_D, d_k_KD, np.outer(weights_K, d_out_U)


def sparse_mla(
  q: ArrayLike,
  kv: ArrayLike,
  indices: ArrayLike,
  latent_rank: int,
  scale: float,
  d_out: ArrayLike,
  d_lse: ArrayLike,
) -> Arrays:
  """out, lse, and the gradients to q and kv for cotangents d_out and d_lse."""
  q, kv, d_out, d_lse = _float64(q, kv, d_out, d_lse)
  B, T, N, _ = q.shape
  out, lse = np.zeros((B, T, N, latent_rank)), np.zeros((B, T, N))
  d_q, d_kv = np.zeros_like(q), np.zeros_like(kv)
  for b, t, n in np.ndindex(B, T, N):
    valid = _valid(np.asarray(indices)[b, t], kv.shape[1])
    rows = kv[b, valid]
    values = rows[:, :latent_rank]
    out[b, t, n], lse[b, t, n], d_q[b, t, n], d_rows, d_values = _attend(
      q[b, t, n], rows, values, scale, d_out[b, t, n], d_lse[b, t, n]
    )
    for place, s in enumerate(valid):  # a key that occurs twice gets both
      d_kv[b, s] += d_rows[place]
      d_kv[b, s, :latent_rank] += d_values[place]
  return out, lse, d_q, d_kv


def dense_mla(
  q: ArrayLike,
  k: ArrayLike,
  v: ArrayLike,
  start: ArrayLike,
  end: ArrayLike,
  scale: float,
  d_out: ArrayLike,
  d_lse: ArrayLike,
  indices: ArrayLike | None = None,
) -> Arrays:
  """out, lse, and the gradients to q, k and v."""
  q, k, v, d_out, d_lse = _float64(q, k, v, d_out, d_lse)
  start_BT, end_BT = np.asarray(start).tolist(), np.asarray(end).tolist()
  (B, T, N, _), (_, S, _, U) = q.shape, v.shape
  out, lse = np.zeros((B, T, N, U)), np.zeros((B, T, N))
  d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b, t, n in np.ndindex(B, T, N):
    visible = [s for s in range(S) if start_BT[b][t] <= s < end_BT[b][t]]
    if indices is not None:
      visible = sorted({*visible} & {*np.asarray(indices)[b, t].tolist()})
    out[b, t, n], lse[b, t, n], d_q[b, t, n], d_keys, d_values = _attend(
      q[b, t, n],
      k[b, visible, n],
      v[b, visible, n],
      scale,
      d_out[b, t, n],
      d_lse[b, t, n],
    )
    d_k[b, visible, n] += d_keys
    d_v[b, visible, n] += d_values
  return out, lse, d_q, d_k, d_v


def sparse_indexer_loss(
  q_index: ArrayLike,
  k_index: ArrayLike,
  w: ArrayLike,
  indices: ArrayLike,
  q: ArrayLike,
  kv: ArrayLike,
  lse: ArrayLike,
  scale: float,
  d_loss: ArrayLike,
) -> Arrays:
  """Loss [B, T], and the gradients to q_index, k_index and w."""
  q, kv, lse = _float64(q, kv, lse)
  N = q.shape[2]

  def target(b, t):
    keys = _valid(np.asarray(indices)[b, t], kv.shape[1])
    p = np.zeros(len(keys))
    for n in range(N):
      p += np.exp(scale * (kv[b, keys] @ q[b, t, n]) - lse[b, t, n])
    return keys, p / p.sum()

  return _indexer_loss(q_index, k_index, w, d_loss, target)


def dense_indexer_loss(
  q_index: ArrayLike,
  k_index: ArrayLike,
  w: ArrayLike,
  start: ArrayLike,
  end: ArrayLike,
  q: ArrayLike,
  k: ArrayLike,
  lse: ArrayLike,
  scale: float,
  d_loss: ArrayLike,
) -> Arrays:
  """Loss [B, T], and the gradients to q_index, k_index and w."""
  q, k, lse = _float64(q, k, lse)
  start_BT, end_BT = np.asarray(start).tolist(), np.asarray(end).tolist()
  N, S = q.shape[2], k.shape[1]

  def target(b, t):
    keys = [s for s in range(S) if start_BT[b][t] <= s < end_BT[b][t]]
    p = np.zeros(len(keys))
    for n in range(N):
      p += np.exp(scale * (k[b, keys, n] @ q[b, t, n]) - lse[b, t, n]) / N
    return keys, p

  return _indexer_loss(q_index, k_index, w, d_loss, target)


def _indexer_loss(
  q_index: ArrayLike,
  k_index: ArrayLike,
  w: ArrayLike,
  d_loss: ArrayLike,
  target: Callable[[int, int], tuple[list[int], np.ndarray]],
) -> Arrays:
  """`target(b, t)`: the keys that count, and the distribution to learn."""
  q_index, k_index, w, d_loss = _float64(q_index, k_index, w, d_loss)
  B, T, M, _ = q_index.shape
  loss = np.zeros((B, T))
  d_q, d_k, d_w = (np.zeros_like(x) for x in (q_index, k_index, w))
  for b, t in np.ndindex(B, T):
    keys, p_K = target(b, t)
    if not keys:
      continue
    similarity = k_index[b, keys] @ q_index[b, t].T  # [K, M]
    scores = np.maximum(similarity, 0.0) @ w[b, t]
    log_index = scores - np.logaddexp.reduce(scores)
    for p, log_q in zip(p_K, log_index):
      loss[b, t] += p * (np.log(p) - log_q) if p > 0 else 0.0
    d_scores = d_loss[b, t] * (np.exp(log_index) - p_K)
    for place, s in enumerate(keys):
      for m in range(M):
        if similarity[place, m] > 0:
          d_similarity = d_scores[place] * w[b, t, m]
          d_q[b, t, m] += d_similarity * k_index[b, s]
          d_k[b, s] += d_similarity * q_index[b, t, m]
          d_w[b, t, m] += d_scores[place] * similarity[place, m]
  return loss, d_q, d_k, d_w
