"""Loss of dense attention on Hopper: three tiled passes per chunk of queries.

  scores     index scores, and one bit for each active head
  target     attention weights, summed over heads
  gradients  gradients from d scores = (softmax - target) d loss

The passes exchange arrays of [chunk, S]: the bits, 8 bytes for each pair of a
query and a key, are the largest; they bound the chunk.
"""

import dataclasses
import functools
import math
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import operands
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  launch as launch_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  scores as scores_lib,
)

_CHUNK_BYTES: Final = 256 << 20
_PAIR_BYTES: Final = 8
_LARGEST_CHUNK: Final = 1024
_bT: Final = launch_lib.bT
_bS: Final = launch_lib.bS
_I: Final = 128


def dense_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
) -> Float[Array, "B T"]:
  """See `api.dense_indexer_loss`."""
  attended = jax.lax.stop_gradient(attended)
  q, k, lse = attended.q, attended.kv, attended.lse
  _check(index.q, index.k, q, k)
  (_, T, M, _), S = index.q.shape, k.shape[1]
  width = -(-S // _bS) * _bS
  chunk = _LARGEST_CHUNK
  while chunk > _bT and (
    chunk * width * _PAIR_BYTES > _CHUNK_BYTES or T < chunk
  ):
    chunk //= 2
  op = _Op(scale, heads_axis, chunk, width)
  start, end = jnp.clip(start, 0, S), jnp.clip(end, 0, S)
  heads = scores_lib.HEADS - M
  queries = -T % chunk
  # TMA takes multiples of 8 rows, and a tile must not be larger than the array.
  fill = lambda n, least: max(-(-n // 8) * 8, least) - n
  pad = lambda x, *widths: jnp.pad(x, [(0, n) for n in widths])
  loss_BT = _loss(
    pad(index.q, 0, queries, heads, 0),
    pad(index.k, 0, fill(S, _bS), 0),
    pad(index.w.astype(jnp.float32), 0, queries, heads),
    pad(start, 0, queries),
    pad(end, 0, queries),
    pad(q, 0, fill(T, _bT), 0, 0),
    pad(k, 0, fill(S, _bS), 0, 0),
    pad(lse, 0, queries, 0),
    jnp.asarray(measure),
    op,
  )
  return loss_BT[:, :T]


def _check(q_index, k_index, q, k):
  (_, _, M, I), HR, S = q_index.shape, q.shape[-1], k.shape[1]
  for name, x in dict(q_index=q_index, k_index=k_index, q=q, k=k).items():
    if x.dtype != jnp.bfloat16:
      raise NotImplementedError(f"{name}.dtype={x.dtype} is not bfloat16.")
  if M > scores_lib.HEADS or I != _I:
    raise NotImplementedError(
      f"{M=} index heads of width {I=}: at most {scores_lib.HEADS} of"
      f" {_I} can be done."
    )
  if HR % 64 or not HR:
    raise NotImplementedError(f"{HR=} is not a multiple of 64.")
  if _bT * S * _PAIR_BYTES > _CHUNK_BYTES:
    raise NotImplementedError(
      f"{S=}: {_bT} queries x S take more than {_CHUNK_BYTES >> 20} MiB."
    )


@dataclasses.dataclass(frozen=True)
class _Op:
  """Context shared by the passes."""

  scale: float
  heads_axis: str | tuple[str, ...] | None
  chunk: int
  width: int

  def chunks(self, function, init, keys, inputs, more=()):
    """Scans `function(carry, where, whole, *more)` over chunks of batch rows.

    Args:
      function: Returns the carry and results [chunk, ...].
      init: The carry at the first chunk of a row.
      keys: Index keys and keys of all rows.
      inputs: The per-query inputs, of all rows too.
      more: Arrays of [B, T, ...], of which `function` gets one chunk.

    Returns:
      The carry of each row, [B, ...]; the results as [B, T, ...].
    """
    q_index, w, start, end, q, lse = inputs
    k_index, k = keys
    B, T = start.shape
    half_w_BMT = 0.5 * w.swapaxes(1, 2)
    # A dead row weighs nothing.
    bias_BTN = jnp.where(jnp.isneginf(lse), -jnp.inf, -lse * math.log2(math.e))
    whole = q_index, k_index, half_w_BMT, q, k, bias_BTN.swapaxes(1, 2)
    chunks = launch_lib.chunks(start, end, self.chunk)
    more = [x.reshape(B, -1, self.chunk, *x.shape[2:]) for x in more]

    def step(carry, xs):
      where, *more = xs
      return function(carry, where, whole, *more)

    carry, results = jax.lax.map(
      lambda xs: jax.lax.scan(step, init, xs), (chunks, *more)
    )
    return carry, jax.tree.map(lambda x: x.reshape(B, T, *x.shape[3:]), results)

  def distributions(self, where, whole):
    """Scores of a chunk, their logsumexp, bits of active heads, target."""
    scores_TS, active, top, total, target_TS = launch_lib.distributions(
      *whole, where, self.scale, self.width
    )
    top_T = top.max(0)
    finite_T = jnp.where(jnp.isneginf(top_T), 0.0, top_T)
    total_T = (total * jnp.exp(top - finite_T[None])).sum(0)
    lse_T = jnp.where(total_T > 0, finite_T + jnp.log(total_T), 0.0)
    N = whole[3].shape[2]
    target_TS = target_TS[:, : self.width] / N
    if self.heads_axis is not None:
      # Keys that no query sees were never written.
      target_TS = jnp.where(self.visible(where), target_TS, 0.0)
      target_TS = jax.lax.pmean(target_TS, self.heads_axis)
    return scores_TS, lse_T, active, target_TS

  def visible(self, where):
    key = jnp.arange(self.width)[None]
    return (key >= where.start[:, None]) & (key < where.end[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnames=("op",))
def _loss(q_index, k_index, w, start, end, q, k, lse, measure, op):
  return _vjp_forward(q_index, k_index, w, start, end, q, k, lse, measure, op)[
    0
  ]


def _vjp_forward(q_index, k_index, w, start, end, q, k, lse, measure, op):
  def chunk(carry, where, whole):
    scores_TS, lse_T, _, target_TS = op.distributions(where, whole)
    used_TS = op.visible(where) & (target_TS > 0)
    gap_TS = jnp.log(target_TS) - (scores_TS - lse_T[:, None])
    return carry, jnp.where(used_TS, target_TS * gap_TS, 0.0).sum(1)

  queries = q_index, w, start, end, q, lse
  loss_BT = jax.lax.cond(
    measure,
    lambda: op.chunks(chunk, None, (k_index, k), queries)[1],
    lambda: jnp.zeros(w.shape[:2], jnp.float32),
  )
  return loss_BT, (q_index, k_index, w, start, end, q, k, lse)


def _vjp_backward(op, inputs, d_loss):
  q_index, k_index, w, start, end, q, k, lse = inputs
  S, f32 = k_index.shape[1], jnp.float32

  def chunk(d_k, where, whole, q_index, w, d_loss):
    scores_TS, lse_T, active, target_TS = op.distributions(where, whole)
    d_scores_TS = jnp.exp(scores_TS - lse_T[:, None]) - target_TS
    d_scores_TS = (d_scores_TS * d_loss[:, None]).astype(jnp.bfloat16)
    w_TM1 = w[..., None]
    weighted_q = (q_index.astype(f32) * w_TM1).astype(q_index.dtype)
    sums_TMI, d_k = launch_lib.gradients(
      d_scores_TS, active, whole[1], weighted_q, where, d_k
    )
    d_w = (sums_TMI * q_index.astype(f32)).sum(-1)
    return d_k, ((w_TM1 * sums_TMI).astype(q_index.dtype), d_w)

  d_k, (d_q, d_w) = op.chunks(
    chunk,
    jnp.zeros((op.width, _I), f32),
    (k_index, k),
    (q_index, w, start, end, q, lse),
    (q_index, w, d_loss),
  )
  return d_q, d_k[:, :S].astype(k_index.dtype), d_w, *[None] * 6


_loss.defvjp(_vjp_forward, _vjp_backward)
