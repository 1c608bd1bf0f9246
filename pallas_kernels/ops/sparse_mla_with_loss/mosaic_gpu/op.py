"""Fused op on Hopper: the attention's backward also computes the target."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import checkpoint_names
from pallas_kernels import operands
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import op as indexer_loss
from pallas_kernels.ops.sparse_mla.mosaic_gpu import op as attention
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import launch
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import kernel


def sparse_mla_with_loss(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"],
  indices: Int[Array, "B T K"],
  index: operands.Index,
  latent_rank: int,
  scale: float,
  heads_axis: str | tuple[str, ...] | None = None,
  measure: Bool[Array, ""] | bool = True,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"], Float[Array, "B T"]]:
  """See `api.sparse_mla_with_loss`.

  The gradients of kv and index.k are summed in no fixed order, so that their
  last bits differ from run to run.
  """
  attention.check(q, kv, indices, latent_rank)
  indexer_loss.check_attention(q, kv)
  indexer_loss.check(index, indices)
  return _op(
    *(q, kv, indices, index.q, index.k, index.w),
    None if measure is True else jnp.asarray(measure),
    *(latent_rank, scale, heads_axis),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _op(*args):
  return _vjp_forward(*args)[0]


def _summed(p, heads_axis):
  return p if heads_axis is None else jax.lax.psum(p, heads_axis)


def _vjp_forward(
  q,
  kv,
  indices,
  q_index,
  k_index,
  w,
  measure,
  latent_rank,
  scale,
  heads_axis,
):
  del latent_rank  # the forward kernel has one
  out, lse = kernel.forward(q, kv, indices, scale)
  # Named, so that a remat policy can save them instead of recomputing them.
  out, lse = checkpoint_name((out, lse), checkpoint_names.SPARSE_MLA)

  def loss():
    p = _summed(indexer_loss.target(q, kv, indices, lse, scale), heads_axis)
    return indexer_loss.compare(q_index, k_index, w, indices, p)[0]

  loss_BT = indexer_loss.measured(measure, loss, indices)
  residuals = (q, kv, indices, out, lse), (q_index, k_index, w, indices)
  return (out, lse, loss_BT), residuals


def _vjp_backward(latent_rank, scale, heads_axis, residuals, cotangents):
  attended, index = residuals
  d_out, d_lse, d_loss = cotangents
  del latent_rank  # the kernel has one
  d_q, d_kv, p = launch.backward(*attended, d_out, d_lse, scale)
  _, gap = indexer_loss.compare(*index, _summed(p, heads_axis))
  return d_q, d_kv, None, *indexer_loss.gradient(*index, gap, d_loss), None


_op.defvjp(_vjp_forward, _vjp_backward)
