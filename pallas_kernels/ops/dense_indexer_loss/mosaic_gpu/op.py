"""Loss of dense attention on Hopper: three tiled passes per chunk of queries.

  scores     index scores, and one bit for each active head
  target     attention weights, summed over heads
  gradients  gradients from d scores = (softmax - target) d loss

The passes exchange arrays of [chunk, S]: the bits, 8 bytes for each pair of a
query and a key, are the largest; they bound the chunk.
"""

import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import operands
from pallas_kernels import softmax
from pallas_kernels.hopper import widths
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import active_bits
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import chunks
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  gradients as gradients_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import kernels
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  scores as scores_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  target as target_lib,
)

_CHUNK_BYTES: Final = 256 << 20
_PAIR_BYTES: Final = 8
_LARGEST_CHUNK: Final = 1024


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
  _check(index, attended)
  T, S = index.q.shape[1], index.k.shape[1]
  width = -(-S // kernels.bS) * kernels.bS
  op = _Op(scale, heads_axis, _chunk(T, width), width)
  start, end = jnp.clip(start, 0, S), jnp.clip(end, 0, S)
  inputs = _pad(index, attended, start, end, op.chunk)
  return _loss(inputs, jnp.asarray(measure), op)[:, :T]


def _check(index, attended):
  q, k = attended.q, attended.kv
  (_, _, M, I), HR, S = index.q.shape, q.shape[-1], k.shape[1]
  arrays = dict(q_index=index.q, k_index=index.k, q=q, k=k)
  for name, x in arrays.items():
    if x.dtype != jnp.bfloat16:
      raise NotImplementedError(f"{name}.dtype={x.dtype} is not bfloat16.")
  if M > active_bits.HEADS or I != widths.I:
    raise NotImplementedError(
      f"{M=} index heads of width {I=}: at most {active_bits.HEADS} of"
      f" {widths.I} can be done."
    )
  if HR % 64 or not HR:
    raise NotImplementedError(f"{HR=} is not a multiple of 64.")
  if kernels.bT * S * _PAIR_BYTES > _CHUNK_BYTES:
    raise NotImplementedError(
      f"{S=}: {kernels.bT} queries x S take more than {_CHUNK_BYTES >> 20} MiB."
    )


def _chunk(T, width):
  """Queries of a chunk."""
  chunk = _LARGEST_CHUNK
  while chunk > kernels.bT and (
    chunk * width * _PAIR_BYTES > _CHUNK_BYTES or T < chunk
  ):
    chunk //= 2
  return chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
  """Inputs, padded to whole chunks of queries, but q and keys for TMA."""

  q_index: Any
  k_index: Any
  w: Any
  start: Any
  end: Any
  q: Any
  k: Any
  lse: Any


def _pad(index, attended, start, end, chunk):
  (_, T, M, _), S = index.q.shape, index.k.shape[1]
  heads, queries = active_bits.HEADS - M, -T % chunk
  # TMA takes multiples of 8 rows, and a tile must not be larger than the array.
  fill = lambda n, least: max(-(-n // 8) * 8, least) - n
  pad = lambda x, *more: jnp.pad(x, [(0, n) for n in more])
  return _Inputs(
    q_index=pad(index.q, 0, queries, heads, 0),
    k_index=pad(index.k, 0, fill(S, kernels.bS), 0),
    w=pad(index.w.astype(jnp.float32), 0, queries, heads),
    start=pad(start, 0, queries),
    end=pad(end, 0, queries),
    q=pad(attended.q, 0, fill(T, kernels.bT), 0, 0),
    k=pad(attended.kv, 0, fill(S, kernels.bS), 0, 0),
    lse=pad(attended.lse, 0, queries, 0),
  )


@dataclasses.dataclass(frozen=True)
class _Op:
  """The op on padded inputs."""

  scale: float
  heads_axis: str | tuple[str, ...] | None
  chunk: int
  width: int

  def forward(self, inputs, measure):
    """Loss of each query, 0 unless it is to be measured."""

    def loss():
      index, attended = _operands(inputs)

      def step(carry, where):
        scores, lse_T, target_TS = self.distributions(index, attended, where)
        used_TS = where.queries.visible(self.width) & (target_TS > 0)
        gap_TS = jnp.log(target_TS) - (scores.scores - lse_T[:, None])
        return carry, jnp.where(used_TS, target_TS * gap_TS, 0.0).sum(1)

      return self.scan(step, None, inputs)[1]

    nothing = lambda: jnp.zeros(inputs.start.shape, jnp.float32)
    return jax.lax.cond(measure, loss, nothing)

  def backward(self, inputs, d_loss):
    """Gradients of q_index, k_index and w."""
    f32, dtype = jnp.float32, inputs.q_index.dtype
    no_d_k = jnp.zeros((self.width, widths.I), f32)
    index, attended = _operands(inputs)

    def step(d_k, where, q_index, w, d_loss):
      scores, lse_T, target_TS = self.distributions(index, attended, where)
      d_scores_TS = jnp.exp(scores.scores - lse_T[:, None]) - target_TS
      d_scores_TS = (d_scores_TS * d_loss[:, None]).astype(jnp.bfloat16)
      w_TM1 = w[..., None]
      weighted_q = (q_index.astype(f32) * w_TM1).astype(dtype)
      sums_TMI, d_k = kernels.gradients(
        d_scores_TS, scores.active, index.k, weighted_q, where, d_k
      )
      d_w = (sums_TMI * q_index.astype(f32)).sum(-1)
      return d_k, ((w_TM1 * sums_TMI).astype(dtype), d_w)

    d_k, (d_q, d_w) = self.scan(
      step, no_d_k, inputs, inputs.q_index, inputs.w, d_loss
    )
    d_k = d_k[:, : inputs.k_index.shape[1]].astype(inputs.k_index.dtype)
    return d_q, d_k, d_w

  def distributions(self, index, attended, where):
    """Scores of a chunk, their logsumexp, and the target."""
    scores, target_TS = kernels.distributions(
      index, attended, where, self.scale, self.width
    )
    top_T = scores.top.max(0)
    finite_T = jnp.where(jnp.isneginf(top_T), 0.0, top_T)
    total_T = (scores.total * jnp.exp(scores.top - finite_T[None])).sum(0)
    lse_T = jnp.where(total_T > 0, finite_T + jnp.log(total_T), 0.0)
    target_TS = target_TS[:, : self.width] / attended.q.shape[2]
    if self.heads_axis is not None:
      # Keys that no query sees were never written.
      visible_TS = where.queries.visible(self.width)
      target_TS = jnp.where(visible_TS, target_TS, 0.0)
      target_TS = jax.lax.pmean(target_TS, self.heads_axis)
    return scores, lse_T, target_TS

  def scan(self, step, init, inputs, *more):
    """Scans `step(carry, chunk, *more)` over the chunks of each batch row.

    Args:
      step: Returns the carry and results [chunk, ...].
      init: The carry at the first chunk of a row.
      inputs: Whose queries are scanned.
      *more: Arrays of [B, T, ...], of which `step` gets one chunk.

    Returns:
      The carry of each row, [B, ...]; the results as [B, T, ...].
    """
    B, T = inputs.start.shape
    where = chunks.split(
      *(inputs.start, inputs.end, self.chunk),
      target=kernels.bT,
      scores=scores_lib.bT,
      keys=gradients_lib.key_bT,
    )
    more = [x.reshape(B, -1, self.chunk, *x.shape[2:]) for x in more]
    carry, results = jax.lax.map(
      lambda xs: jax.lax.scan(lambda carry, x: step(carry, *x), init, xs),
      (where, *more),
    )
    return carry, jax.tree.map(lambda x: x.reshape(B, T, *x.shape[3:]), results)


def _operands(inputs):
  """Operands of the kernels."""
  half_w_BMT = 0.5 * inputs.w.swapaxes(1, 2)
  bias_BNT = softmax.bias(inputs.lse).swapaxes(1, 2)
  return (
    scores_lib.Index(inputs.q_index, inputs.k_index, half_w_BMT),
    target_lib.Attended(inputs.q, inputs.k, bias_BNT),
  )


@functools.partial(jax.custom_vjp, nondiff_argnames=("op",))
def _loss(inputs, measure, op):
  return op.forward(inputs, measure)


def _vjp_forward(inputs, measure, op):
  return op.forward(inputs, measure), inputs


def _vjp_backward(op, inputs, d_loss):
  d_q, d_k, d_w = op.backward(inputs, d_loss)
  return _Inputs(d_q, d_k, d_w, *[None] * 5), None


_loss.defvjp(_vjp_forward, _vjp_backward)
