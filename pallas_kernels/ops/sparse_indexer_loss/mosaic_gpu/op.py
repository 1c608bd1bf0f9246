"""Loss of sparse attention on Hopper: three kernels over the selected keys.

  target    attention weights, summed over heads
  compare   the divergence of the scores' softmax, and gap = softmax - target,
            its gradient with respect to the scores
  gradient  gradients from gap * d loss

Memory: target and gap, [B, T, K] in f32.
"""

import functools
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import operands
from pallas_kernels.hopper import widths
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import (
  compare as compare_lib,
)
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import (
  gradient as gradient_lib,
)
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import spans
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import (
  target as target_lib,
)

_N: Final = 128  # most heads of the attention
_HEADS: Final = 8  # they come by so many


def sparse_indexer_loss(
  index: operands.Index,
  attended: operands.Attended,
  indices: Int[Array, "B T K"],
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
) -> Float[Array, "B T"]:
  """See `api.sparse_indexer_loss`.

  The gradient of index.k is summed in no fixed order, so that its last bits
  differ from run to run.
  """
  check(index, indices)
  check_attention(attended.q, attended.kv)
  attended = jax.lax.stop_gradient(attended)
  return _loss(
    *(index.q, index.k, index.w, indices),
    *(attended.q, attended.kv, attended.lse),
    None if measure is True else jnp.asarray(measure),
    *(scale, heads_axis),
  )


def check(index: operands.Index, indices: Int[Array, "B T K"]) -> None:
  """Raises NotImplementedError for inputs that the indexer's kernels lack."""
  (M, I), K = index.q.shape[2:], indices.shape[2]
  for name, x in (("q", index.q), ("k", index.k)):
    if x.dtype != jnp.bfloat16:
      raise NotImplementedError(
        f"index.{name}.dtype={x.dtype} is not bfloat16."
      )
  if M > widths.M or I != widths.I:
    raise NotImplementedError(
      f"{M=} index heads of width {I=}: at most {widths.M} of {widths.I} can be"
      " done."
    )
  if not 0 < K <= widths.MOST_KEYS:
    raise NotImplementedError(
      f"{K=} chosen keys: 1 to {widths.MOST_KEYS} can be done."
    )


def check_attention(
  q: Float[Array, "B T N CR"], kv: Float[Array, "B S CR"]
) -> None:
  """Raises NotImplementedError for inputs that `target` does not support."""
  N, CR = q.shape[2:]
  for name, x in (("q", q), ("kv", kv)):
    if x.dtype != jnp.bfloat16:
      raise NotImplementedError(f"{name}.dtype={x.dtype} is not bfloat16.")
  if not 0 < N <= _N or CR != widths.CR:
    raise NotImplementedError(
      f"{N=} heads of width {CR=}: 1 to {_N} of {widths.CR} can be done."
    )


def target(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"],
  indices: Int[Array, "B T K"],
  lse: Float[Array, "B T N"],
  scale: float,
) -> Float[Array, "B T K"]:
  """Sum over these heads of each selected key's weight; 0 if ignored."""
  K = indices.shape[2]
  if missing := -q.shape[2] % _HEADS:  # heads of zero weight
    q = jnp.pad(q, [(0, 0), (0, 0), (0, missing), (0, 0)])
    lse = jnp.pad(lse, [(0, 0), (0, 0), (0, missing)], constant_values=jnp.inf)
  padded = _pad_keys(indices, -1)
  return target_lib.target(q, kv, padded, lse, scale)[..., :K]


def compare(
  q_index: Float[Array, "B T M I"],
  k_index: Float[Array, "B S I"],
  w: Float[Array, "B T M"],
  indices: Int[Array, "B T K"],
  p: Float[Array, "B T K"],
) -> tuple[
  Float[Array, "B T"], tuple[Float[Array, "B T X"], Int[Array, "B T"]]
]:
  """Computes the loss from all heads' target, and `gradient`'s residuals."""
  loss, gap, count = compare_lib.compare(
    _pad_heads(q_index, 2),
    k_index,
    _pad_heads(w.astype(jnp.float32), 2),
    _pad_keys(indices, -1),
    _pad_keys(p, 0),
  )
  return loss, (gap, count)


def gradient(
  q_index: Float[Array, "B T M I"],
  k_index: Float[Array, "B S I"],
  w: Float[Array, "B T M"],
  indices: Int[Array, "B T K"],
  gap: tuple[Float[Array, "B T X"], Int[Array, "B T"]],
  d_loss: Float[Array, "B T"],
) -> tuple[
  Float[Array, "B T M I"], Float[Array, "B S I"], Float[Array, "B T M"]
]:
  """Computes the gradients of q_index, k_index and w."""
  M = w.shape[2]
  d_q, d_k, d_w = gradient_lib.gradient(
    _pad_heads(q_index, 2),
    k_index,
    _pad_heads(w.astype(jnp.float32), 2),
    _pad_keys(indices, -1),
    *gap,
    d_loss,
  )
  return d_q[:, :, :M], d_k.astype(k_index.dtype), d_w[..., :M].astype(w.dtype)


def _pad_keys(x, fill):
  missing = -x.shape[2] % spans.MULTIPLE
  return jnp.pad(x, [(0, 0), (0, 0), (0, missing)], constant_values=fill)


def _pad_heads(x, axis):
  """Pads with heads of zero weight."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, widths.M - x.shape[axis])
  return jnp.pad(x, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _loss(q_index, k_index, w, indices, q, kv, lse, measure, scale, heads_axis):
  compared = lambda: _compared(
    q_index, k_index, w, indices, q, kv, lse, scale, heads_axis
  )[0]
  return measured(measure, compared, indices)


def measured(measure, loss, indices) -> Float[Array, "B T"]:
  """Returns loss() if `measure` is true or None, else zeros."""
  if measure is None:
    return loss()
  nothing = lambda: jnp.zeros(indices.shape[:2], jnp.float32)
  return jax.lax.cond(measure, loss, nothing)


def _compared(q_index, k_index, w, indices, q, kv, lse, scale, heads_axis):
  p = target(q, kv, indices, lse, scale)
  if heads_axis is not None:
    p = jax.lax.psum(p, heads_axis)
  return compare(q_index, k_index, w, indices, p)


def _vjp_forward(
  q_index, k_index, w, indices, q, kv, lse, measure, scale, heads_axis
):
  inputs = q_index, k_index, w, indices, q, kv, lse
  loss, gap = _compared(*inputs, scale, heads_axis)
  if measure is not None:
    # Separate, so that under remat the first forward pass skips it.
    loss = _loss(*inputs, measure, scale, heads_axis)
  return loss, (q_index, k_index, w, indices, gap)


def _vjp_backward(scale, heads_axis, residuals, d_loss):
  del scale, heads_axis
  return *gradient(*residuals, d_loss), *[None] * 5


_loss.defvjp(_vjp_forward, _vjp_backward)
