"""Sparse attention on Hopper: input checks, and the kernels' derivative."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checkpoint_names
from pallas_kernels import operands
from pallas_kernels.hopper import widths
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import launch
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import kernel


def check(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"] | operands.QuantizedLatents,
  indices: Int[Array, "B T K"],
  latent_rank: int,
) -> None:
  """Raises NotImplementedError for inputs that the kernels do not support.

  Those of the forward pass and those of the gradient support the same, but that
  latents in 8 bits have no gradient.
  """
  N, width, K = *q.shape[2:], indices.shape[2]
  is_quantized = isinstance(kv, operands.QuantizedLatents)
  latents, rows = (kv.values, kv.rope) if is_quantized else (kv, kv)
  if q.dtype != jnp.bfloat16 or rows.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f"q is {q.dtype} and kv {rows.dtype}; both must be bfloat16"
    )
  if is_quantized and latents.dtype != jnp.float8_e4m3fn:
    raise NotImplementedError(
      f"kv.values are {latents.dtype}; they must be float8_e4m3fn"
    )
  if (latent_rank, width) != (widths.C, widths.CR):
    raise NotImplementedError(
      f"C={latent_rank} and C+R={width} must be {widths.C} and {widths.CR}"
    )
  if not N:
    raise NotImplementedError(f"{N=} heads; at least 1 can be done")
  if not 0 < K <= widths.MOST_KEYS:
    raise NotImplementedError(
      f"{K=} selected keys; 1 to {widths.MOST_KEYS} can be done"
    )


@functools.partial(
  jax.custom_vjp, nondiff_argnames=("latent_rank", "scale", "deterministic")
)
def sparse_mla(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"] | operands.QuantizedLatents,
  indices: Int[Array, "B T K"],
  latent_rank: int,
  scale: float,
  deterministic: bool = False,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """See `api.sparse_mla`.

  kv's gradient is summed in no fixed order, so that its last bits differ from
  run to run, unless `deterministic`, which is slower.
  """
  del deterministic
  return _forward(q, kv, indices, latent_rank, scale)[0]


def _forward(q, kv, indices, latent_rank, scale):
  check(q, kv, indices, latent_rank)
  out, lse = kernel.forward(q, kv, indices, scale)
  # Named, so that a remat policy can save them instead of recomputing them.
  out, lse = checkpoint_name((out, lse), checkpoint_names.SPARSE_MLA)
  return (out, lse), (q, kv, indices, out, lse)


def _vjp_forward(q, kv, indices, latent_rank, scale, deterministic):
  del deterministic
  return _forward(q, kv, indices, latent_rank, scale)


def _vjp_backward(latent_rank, scale, deterministic, residuals, cotangents):
  del latent_rank  # the kernel has one
  d_q, d_kv, _ = launch.backward(
    *residuals, *cotangents, scale, deterministic=deterministic
  )
  return d_q, d_kv, None


sparse_mla.defvjp(_vjp_forward, _vjp_backward)
