"""Loss of dense attention on TPUs: three kernels per chunk of queries.

  scores     index scores and their logsumexp
  target     attention weights, averaged over heads
  gradients  gradients from d scores = (softmax - target) d loss

They exchange the scores and the target of a chunk, f32 [S, chunk]. Reading them
takes a small part of the products' time, and the target can be averaged over
devices in between. The products of index queries and keys are computed twice,
by the first and the last kernel: storing them for 64 heads would take 64 times
that memory.
"""

import dataclasses
import functools
import math
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import operands
from pallas_kernels import softmax
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import (
  chunks as chunks_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import (
  gradients as gradients_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import (
  scores as scores_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import (
  target as target_lib,
)
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import heads
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products

_CHUNK_BYTES: Final = 256 << 20


def dense_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
  tiles: chunks_lib.Tiles | None = None,
) -> Float[Array, "B T"]:
  """See `api.dense_indexer_loss`. Tiles bound the memory, not the result."""
  attended = jax.lax.stop_gradient(attended)
  q, k, lse = attended.q, attended.kv, attended.lse
  T, (_, S, N, _) = q.shape[1], k.shape
  tiles = tiles or pick_tiles(T, S, N)
  check(index, attended, tiles)
  start, end = jnp.clip(start, 0, S), jnp.clip(end, 0, S)
  queries = lambda x: lanes.pad(x, tiles.chunk)
  loss_BT = _loss(
    queries(index.q),
    lanes.pad(index.k, tiles.bS),
    queries(index.w.astype(jnp.float32)),
    *(queries(start), queries(end)),
    *(queries(q), heads.side_by_side(lanes.pad(k, tiles.target_bS))),
    *(queries(lse), jnp.asarray(measure)),
    _Op(scale, heads_axis, tiles),
  )
  return loss_BT[:, :T]


def pick_tiles(T: int, S: int, N: int) -> chunks_lib.Tiles:
  """Largest tiles that fit: with more queries, keys are read less often."""
  chip = tpu.chip()
  bT = 1024 if chip.vmem >= 128 << 20 else 512
  while bT > lanes.LANES and 4 * chip.cores * bT * S > _CHUNK_BYTES:
    bT //= 2
  bT = min(bT, lanes.whole(-(-T // chip.cores)))
  bS, target_bS = (min(n, lanes.whole(S)) for n in (512, 2048))
  return chunks_lib.Tiles(chip.cores, bT, bS, target_bS, math.gcd(N, 4))


def check(
  index: operands.Index, attended: operands.Attended, tiles: chunks_lib.Tiles
) -> None:
  """Raises NotImplementedError for inputs that the kernels do not support."""
  q_index, k_index, q, k = index.q, index.k, attended.q, attended.kv
  (_, _, M, I), (_, S, N, HR) = q_index.shape, k.shape
  products.check(q_index=q_index, k_index=k_index)
  products.check(q=q, k=k)
  if HR % 64:
    raise NotImplementedError(f"{HR=} is not a multiple of 64.")
  if 4 * tiles.chunk * S > _CHUNK_BYTES:
    raise NotImplementedError(
      f"{S=}: {tiles.chunk} queries x S in float32 are more than "
      f"{_CHUNK_BYTES} bytes."
    )
  needed = max(
    target_lib.vmem_bytes(tiles, N, HR, q.dtype.itemsize),
    gradients_lib.vmem_bytes(tiles, M, I, q_index.dtype.itemsize),
  )
  if needed > tpu.chip().vmem:
    raise NotImplementedError(
      f"{N=} heads of width {HR} and {M=} index heads of width {I=} take "
      f"{needed} bytes of VMEM; {tpu.chip().vmem} at most."
    )


@dataclasses.dataclass(frozen=True)
class _Op:
  """Context shared by forward and backward."""

  scale: float
  heads_axis: str | tuple[str, ...] | None
  tiles: chunks_lib.Tiles

  def chunks(self, function, init, inputs, *more):
    """Scans `function(carry, chunk, distributions, *more)` over batch rows.

    Args:
      function: Returns the carry and results [chunk, ...].
      init: The carry at the first chunk of a row.
      inputs: Inputs of the op.
      *more: Arrays [B, T, ...], of which `function` gets a chunk.

    Returns:
      The carry of each row, [B, ...]; the results as [B, T, ...].
    """
    q_index, k_index, w, start, end, q, k, lse = inputs
    B, T = start.shape
    index = q_index.swapaxes(1, 2), k_index, w.swapaxes(1, 2)
    bias_BTN = softmax.bias(lse)
    attention = q.swapaxes(1, 2), k, bias_BTN.swapaxes(1, 2)
    chunks = chunks_lib.split(start, end, self.tiles)
    more = [x.reshape(B, -1, self.tiles.chunk, *x.shape[2:]) for x in more]

    def step(carry, xs):
      chunk, *more = xs
      scores = scores_lib.scores(*index, chunk, self.tiles)
      target_ST = target_lib.target(
        *attention, chunk, self.tiles, self.scale, k_index.shape[1]
      )
      if self.heads_axis is not None:
        target_ST = jax.lax.pmean(target_ST, self.heads_axis)
      return function(carry, chunk, (*scores, target_ST), *more)

    carry, results = jax.lax.map(
      lambda xs: jax.lax.scan(step, init, xs), (chunks, *more)
    )
    return carry, jax.tree.map(lambda x: x.reshape(B, T, *x.shape[3:]), results)


@functools.partial(jax.custom_vjp, nondiff_argnames=("op",))
def _loss(q_index, k_index, w, start, end, q, k, lse, measure, op):
  return _vjp_forward(q_index, k_index, w, start, end, q, k, lse, measure, op)[
    0
  ]


def _vjp_forward(q_index, k_index, w, start, end, q, k, lse, measure, op):
  inputs = q_index, k_index, w, start, end, q, k, lse

  def divergence(carry, chunk, distributions):
    scores_ST, lse_1T, target_ST = distributions
    key_S1 = jnp.arange(scores_ST.shape[0])[:, None]
    used_ST = (key_S1 >= chunk.start) & (key_S1 < chunk.end) & (target_ST > 0)
    gap_ST = jnp.log(target_ST) - (scores_ST - lse_1T)
    return carry, jnp.where(used_ST, target_ST * gap_ST, 0.0).sum(0)

  loss_BT = jax.lax.cond(
    measure,
    lambda: op.chunks(divergence, None, inputs)[1],
    lambda: jnp.zeros(w.shape[:2], jnp.float32),
  )
  return loss_BT, inputs


def _vjp_backward(op, inputs, d_loss):
  q_index, k_index, w, *_ = inputs
  f32, (_, S, I) = jnp.float32, k_index.shape
  weighted_q = (q_index.astype(f32) * w[..., None]).astype(q_index.dtype)
  heads_first = q_index.swapaxes(1, 2), weighted_q.swapaxes(1, 2)

  def gradients(d_k, chunk, distributions, q_index, w, d_loss):
    sums_MIT, d_k = gradients_lib.gradients(
      *(*heads_first, k_index, *distributions, d_loss[None], d_k),
      *(chunk, op.tiles),
    )
    sums_TMI = sums_MIT.transpose(2, 0, 1)
    d_w = (sums_TMI * q_index.astype(f32)).sum(-1)
    return d_k, ((w[..., None] * sums_TMI).astype(q_index.dtype), d_w)

  d_k, (d_q, d_w) = op.chunks(
    *(gradients, jnp.zeros((op.tiles.cores, S, I), f32), inputs),
    *(q_index, w, d_loss),
  )
  d_k = d_k.sum(1).astype(k_index.dtype)
  return d_q, d_k, d_w, *[None] * 6


_loss.defvjp(_vjp_forward, _vjp_backward)
