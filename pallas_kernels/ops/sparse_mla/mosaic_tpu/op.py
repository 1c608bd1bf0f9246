"""Sparse attention on TPUs: input checks, and the kernels' derivative."""

import functools
from typing import Final

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checkpoint_names
from pallas_kernels import softmax
from pallas_kernels.ops.sparse_mla.mosaic_tpu import backward as backward_lib
from pallas_kernels.ops.sparse_mla.mosaic_tpu import forward as forward_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import row_copies as rows_lib
from pallas_kernels.tpu import row_plan as plan_lib

MOST_KEYS: Final = (
  8192  # a block's list of them is double-buffered in 1 MiB of SMEM
)


def check(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"],
  indices: Int[Array, "B T K"],
  latent_rank: int,
  tiles: plan_lib.Tiles,
) -> None:
  """Raises NotImplementedError for inputs that the kernels do not support."""
  N, D, S, K = *q.shape[2:], kv.shape[1], indices.shape[2]
  if q.dtype != kv.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      f"q is {q.dtype} and kv {kv.dtype}; both must be bfloat16, or float32"
    )
  sublanes = 32 // q.dtype.itemsize
  if N % sublanes:
    raise NotImplementedError(f"{N=} heads are no multiple of {sublanes}")
  if latent_rank % rows_lib.LANES:
    raise NotImplementedError(
      f"C={latent_rank} is no multiple of {rows_lib.LANES}"
    )
  largest = jnp.iinfo(jnp.int32).max >> tiles.bQ
  if S + tiles.bK > largest:
    raise NotImplementedError(f"{S=} keys; {largest - tiles.bK} at most")
  if K > MOST_KEYS:
    raise NotImplementedError(f"{K=} keys for a query; {MOST_KEYS} at most")
  n_tiles = tiles.bQ * -(-K // tiles.bK)
  sizes = N, D, latent_rank, n_tiles, q.dtype.itemsize, tiles
  for kernel in (forward_lib, backward_lib):
    if (needed := kernel.vmem_bytes(*sizes)) > tpu.chip().vmem:
      raise NotImplementedError(
        f"{N=} heads and {K=} keys take {needed} bytes of VMEM; there are "
        f"{tpu.chip().vmem}"
      )


@functools.partial(
  jax.custom_vjp, nondiff_argnames=("latent_rank", "scale", "tiles")
)
def sparse_mla(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"],
  indices: Int[Array, "B T K"],
  latent_rank: int,
  scale: float,
  tiles: plan_lib.Tiles | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """See `api.sparse_mla`."""
  return _forward(q, kv, indices, latent_rank, scale, tiles)[0]


def _pad(x, tiles, fill=0):
  """Pads queries to whole blocks, the same number for each core."""
  T, multiple = x.shape[1], tiles.bQ * tpu.chip().cores
  padding = [(0, 0), (0, -T % multiple)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, padding, constant_values=fill)


def _forward(q, kv, indices, latent_rank, scale, tiles):
  T, K = indices.shape[1:]
  tiles = tiles or plan_lib.tiles(T, K, q.shape[2])
  check(q, kv, indices, latent_rank, tiles)
  plan = plan_lib.plan(_pad(indices, tiles, -1), kv.shape[1], tiles)
  out, lse = forward_lib.forward(
    _pad(q, tiles), kv, plan, latent_rank, scale, tiles
  )
  # Named, so that a remat policy can save them instead of recomputing them.
  out, lse = checkpoint_name(
    (out[:, :T], lse[:, :T]), checkpoint_names.SPARSE_MLA
  )
  return (out, lse), (q, kv, indices, out, lse)


def _vjp_backward(latent_rank, scale, tiles, residuals, cotangents):
  del latent_rank  # d_out has it
  q, kv, indices, out, lse = residuals
  d_out, d_lse = cotangents
  T, K = indices.shape[1:]
  tiles = tiles or plan_lib.tiles(T, K, q.shape[2])
  lse, delta = softmax.lse_and_delta(out, lse, d_out, d_lse)
  d_q, d_kv = backward_lib.backward(
    _pad(q, tiles),
    kv,
    plan_lib.plan(_pad(indices, tiles, -1), kv.shape[1], tiles),
    _pad(lse, tiles, jnp.inf),
    _pad(delta, tiles),
    _pad(d_out, tiles),
    scale,
    tiles,
  )
  return d_q[:, :T], d_kv.astype(kv.dtype), None


sparse_mla.defvjp(_forward, _vjp_backward)
