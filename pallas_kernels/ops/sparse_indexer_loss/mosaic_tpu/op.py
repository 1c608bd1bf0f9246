"""Loss of sparse attention on TPUs: two kernels over blocks of queries.

  distributions  attention weights summed over heads, and the scores
  gradients      gradients from d scores = (softmax - target) d loss

They exchange arrays of T x 3 K numbers: the target may be summed over devices,
and d scores needs the sums over all of a query's keys.
"""

import dataclasses
import functools
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import operands
from pallas_kernels import softmax
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import kernels
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import walk as walk_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import row_copies as rows_lib
from pallas_kernels.tpu import row_plan as plan_lib

# Largest size of a union, in multiples of one query's keys.
LONGEST_UNION: Final = 3
_SMEM: Final = 3 << 18  # bytes, of 1 MiB


def sparse_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  indices: Int[Array, "B T K"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
  tiles: plan_lib.Tiles | None = None,
) -> Float[Array, "B T"]:
  """See `api.sparse_indexer_loss`."""
  T, K = indices.shape[1:]
  tiles = tiles or pick_tiles(T, K, attended.q.shape[2])
  _check(index, attended, indices, tiles)
  attended = jax.lax.stop_gradient(attended)
  index_heads, heads = _more_heads(index.q), _more_heads(attended.q)
  pad = functools.partial(_pad, -T % (tiles.bQ * tpu.chip().cores))
  loss_BT = _loss(
    pad(index.q, index_heads),
    index.k,
    pad(index.w.astype(jnp.float32), index_heads),
    pad(indices, 0, -1),
    pad(attended.q, heads),
    attended.kv,
    pad(attended.lse, heads, -jnp.inf),
    jnp.asarray(measure),
    *(scale, heads_axis, tiles),
  )
  return loss_BT[:, :T]


def pick_tiles(T: int, K: int, N: int) -> plan_lib.Tiles:
  """Tiles of `sparse_mla`, so that the plan can be shared, but with a union
  limited to what bounds the arrays between the kernels."""
  tiles = plan_lib.tiles(T, K, N)
  longest_union = min(tiles.longest_union, LONGEST_UNION)
  return dataclasses.replace(tiles, longest_union=longest_union)


def _check(index, attended, indices, tiles):
  q_index, k_index, q, kv = index.q, index.k, attended.q, attended.kv
  for name, x in dict(q_index=q_index, k_index=k_index, q=q, kv=kv).items():
    if x.dtype not in (jnp.bfloat16, jnp.float32):
      raise NotImplementedError(f"{name}.dtype={x.dtype} is not bfloat16.")
  if k_index.dtype != kv.dtype:
    raise NotImplementedError(f"{k_index.dtype=} is not {kv.dtype=}.")
  (M, I), (N, D), K = q_index.shape[2:], q.shape[2:], indices.shape[2]
  if not K:
    raise NotImplementedError(f"{K=} keys of a query: at least 1 can be done.")
  S = kv.shape[1]
  if (S + tiles.bK) << tiles.bQ > jnp.iinfo(jnp.int32).max:
    raise NotImplementedError(f"{S=} keys: a plan has no bits for so many.")
  listed = tiles.bQ * -(-K // tiles.bK) + rows_lib.PREFETCHED
  if (scalars := 2 * 4 * listed * tiles.bK) > _SMEM:
    raise NotImplementedError(
      f"{K=} keys of a query take {scalars} bytes of SMEM; {_SMEM} at most."
    )
  M, N = M + _more_heads(q_index), N + _more_heads(q)
  needed = kernels.vmem_bytes(N, D, M, I, K, tiles)
  if needed > tpu.chip().vmem:
    raise NotImplementedError(
      f"{N=} heads of width {D} and {M=} index heads of width {I} take "
      f"{needed} bytes of VMEM; {tpu.chip().vmem} at most."
    )


def _more_heads(x):
  """Pads [B, T, heads, width] to whole registers with heads of zero weight."""
  return -x.shape[2] % (32 // x.dtype.itemsize)


def _pad(queries, x, heads, fill=0):
  padding = (0, 0), (0, queries), (0, heads), *[(0, 0)] * (x.ndim - 3)
  return jnp.pad(x, padding, constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10))
def _loss(*args):
  return _vjp_forward(*args)[0]


def _compared(walk, inputs, scale, heads_axis):
  """Computes the loss [B, nQ, bQ] and its gradient by place, the gap."""
  q_index, k_index, w, _, q, kv, lse = inputs
  bias_BTN = softmax.bias(lse)
  target, scores = kernels.distributions(
    walk, q_index, k_index, w, q, kv, bias_BTN, scale
  )
  if heads_axis is not None:
    target = jax.lax.psum(target, heads_axis)
  keys = 2, 4  # axes of a query's keys
  mass = target.sum(keys, keepdims=True)
  target /= jnp.where(mass > 0, mass, 1.0)
  chosen = ~jnp.isneginf(scores)
  dead = ~chosen.any(keys, keepdims=True)
  log_index = jax.nn.log_softmax(jnp.where(dead, 0.0, scores), keys)
  # A key of zero target adds nothing, whatever its score.
  used = target > 0
  divergence = jnp.log(jnp.where(used, target, 1.0))
  divergence -= jnp.where(used, log_index, 0.0)
  gap = jnp.where(chosen, jnp.exp(log_index) - target, 0.0)
  return (target * divergence).sum(keys), gap


def _vjp_forward(
  q_index,
  k_index,
  w,
  indices,
  q,
  kv,
  lse,
  measure,
  scale,
  heads_axis,
  tiles,
):
  inputs = q_index, k_index, w, indices, q, kv, lse

  def measured():
    walk = walk_lib.walk(indices, kv.shape[1], tiles)
    loss = _compared(walk, inputs, scale, heads_axis)[0]
    return loss.reshape(w.shape[:2])

  loss_BT = jax.lax.cond(
    measure, measured, lambda: jnp.zeros(w.shape[:2], jnp.float32)
  )
  return loss_BT, inputs


def _vjp_backward(scale, heads_axis, tiles, inputs, d_loss):
  q_index, k_index, w, indices, _, kv, _ = inputs
  walk = walk_lib.walk(indices, kv.shape[1], tiles)
  _, gap = _compared(walk, inputs, scale, heads_axis)
  d_scores = gap * walk.split(d_loss)[:, :, None, :, None]
  f32, w_BTM1 = jnp.float32, w[..., None]
  weighted_q = (q_index.astype(f32) * w_BTM1).astype(q_index.dtype)
  sums_BTMI, d_k = kernels.gradients(
    walk, q_index, weighted_q, k_index, d_scores
  )
  d_w = (sums_BTMI * q_index.astype(f32)).sum(-1)
  d_q = (w_BTM1 * sums_BTMI).astype(q_index.dtype)
  return d_q, d_k.astype(k_index.dtype), d_w, *[None] * 5


_loss.defvjp(_vjp_forward, _vjp_backward)
