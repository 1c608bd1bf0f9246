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
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import (
  distributions as distributions_lib,
)
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import (
  gradients as gradients_lib,
)
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products
from pallas_kernels.tpu import row_plan
from pallas_kernels.tpu import row_walk

# Largest size of a union, in multiples of one query's keys.
LONGEST_UNION: Final = 3


def sparse_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  indices: Int[Array, "B T K"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
  tiles: row_plan.Tiles | None = None,
) -> Float[Array, "B T"]:
  """See `api.sparse_indexer_loss`."""
  T, K = indices.shape[1:]
  tiles = tiles or pick_tiles(K, attended.q.shape[2])
  check(index, attended, indices, tiles)
  attended = jax.lax.stop_gradient(attended)
  whole = tiles.bQ * tpu.chip().cores, _sublanes(attended.kv)
  loss_BT = _loss(
    lanes.pad(index.q, *whole),
    index.k,
    lanes.pad(index.w.astype(jnp.float32), *whole),
    lanes.pad(indices, whole[0], fill=-1),
    lanes.pad(attended.q, *whole),
    attended.kv,
    lanes.pad(attended.lse, *whole, fill=-jnp.inf),
    jnp.asarray(measure),
    *(scale, heads_axis, tiles),
  )
  return loss_BT[:, :T]


def pick_tiles(K: int, N: int) -> row_plan.Tiles:
  """Tiles of `sparse_mla`, so that the plan can be shared, but with a union
  limited to what bounds the arrays between the kernels."""
  tiles = row_plan.pick_tiles(K, N)
  longest_union = min(tiles.longest_union, LONGEST_UNION)
  return dataclasses.replace(tiles, longest_union=longest_union)


def check(
  index: operands.Index,
  attended: operands.Attended,
  indices: Int[Array, "B T K"],
  tiles: row_plan.Tiles,
) -> None:
  """Raises NotImplementedError for inputs that the kernels do not support."""
  q_index, k_index, q, kv = index.q, index.k, attended.q, attended.kv
  products.check(q_index=q_index, k_index=k_index, q=q, kv=kv)
  (M, I), (N, D), K = q_index.shape[2:], q.shape[2:], indices.shape[2]
  row_walk.check(kv.shape[1], K, tiles)
  # As padded with heads of zero weight.
  itemsize, sublanes = kv.dtype.itemsize, _sublanes(kv)
  M, N = M + -M % sublanes, N + -N % sublanes
  needed = max(
    distributions_lib.vmem_bytes(N, D, M, I, K, itemsize, tiles),
    gradients_lib.vmem_bytes(M, I, K, itemsize, tiles),
  )
  if needed > tpu.chip().vmem:
    raise NotImplementedError(
      f"{N=} heads of width {D} and {M=} index heads of width {I} take "
      f"{needed} bytes of VMEM; {tpu.chip().vmem} at most."
    )


def _sublanes(x):
  """Heads that fill a register."""
  return 32 // x.dtype.itemsize


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10))
def _loss(*args):
  return _vjp_forward(*args)[0]


def _compared(walk, inputs, scale, heads_axis):
  """Computes the loss [B, nQ, bQ] and its gradient by place, the gap."""
  q_index, k_index, w, indices, q, kv, lse = inputs
  bias_BTN = softmax.bias(lse)
  n_places = distributions_lib.places(indices.shape[2], walk.tiles)
  target, scores = distributions_lib.distributions(
    walk, n_places, q_index, k_index, w, q, kv, bias_BTN, scale
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
    walk = row_walk.walk(indices, kv.shape[1], tiles)
    loss = _compared(walk, inputs, scale, heads_axis)[0]
    return loss.reshape(w.shape[:2])

  loss_BT = jax.lax.cond(
    measure, measured, lambda: jnp.zeros(w.shape[:2], jnp.float32)
  )
  return loss_BT, inputs


def _vjp_backward(scale, heads_axis, tiles, inputs, d_loss):
  q_index, k_index, w, indices, _, kv, _ = inputs
  walk = row_walk.walk(indices, kv.shape[1], tiles)
  _, gap = _compared(walk, inputs, scale, heads_axis)
  d_scores = gap * walk.split(d_loss)[:, :, None, :, None]
  f32, w_BTM1 = jnp.float32, w[..., None]
  weighted_q = (q_index.astype(f32) * w_BTM1).astype(q_index.dtype)
  sums_BTMI, d_k = gradients_lib.gradients(
    walk, q_index, weighted_q, k_index, d_scores
  )
  d_w = (sums_BTMI * q_index.astype(f32)).sum(-1)
  d_q = (w_BTM1 * sums_BTMI).astype(q_index.dtype)
  return d_q, d_k.astype(k_index.dtype), d_w, *[None] * 5


_loss.defvjp(_vjp_forward, _vjp_backward)
