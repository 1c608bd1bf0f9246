"""Sparse attention on TPUs: input checks, and the kernels' derivative."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checkpoint_names
from pallas_kernels import operands
from pallas_kernels import softmax
from pallas_kernels.ops.sparse_mla.mosaic_tpu import backward as backward_lib
from pallas_kernels.ops.sparse_mla.mosaic_tpu import forward as forward_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products
from pallas_kernels.tpu import row_plan
from pallas_kernels.tpu import row_walk


def sparse_mla(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"] | operands.QuantizedLatents,
  indices: Int[Array, "B T K"],
  latent_rank: int,
  scale: float,
  tiles: row_plan.Tiles | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """See `api.sparse_mla`."""
  tiles = tiles or row_plan.pick_tiles(indices.shape[2], q.shape[2])
  check(q, kv, indices, latent_rank, tiles)
  return _sparse_mla(q, kv, indices, latent_rank, scale, tiles)


def check(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"] | operands.QuantizedLatents,
  indices: Int[Array, "B T K"],
  latent_rank: int,
  tiles: row_plan.Tiles,
) -> None:
  """Raises NotImplementedError for inputs that the kernels do not support."""
  if isinstance(kv, operands.QuantizedLatents):
    raise NotImplementedError("kv in 8 bits is not read")
  N, D, S, K = *q.shape[2:], kv.shape[1], indices.shape[2]
  products.check(q=q, kv=kv)
  N += -N % _sublanes(q)  # as padded
  if latent_rank % lanes.LANES:
    raise NotImplementedError(
      f"C={latent_rank} is no multiple of {lanes.LANES}"
    )
  row_walk.check(S, K, tiles)
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
def _sparse_mla(q, kv, indices, latent_rank, scale, tiles):
  return _vjp_forward(q, kv, indices, latent_rank, scale, tiles)[0]


def _sublanes(x):
  """Heads that fill a register."""
  return 32 // x.dtype.itemsize


def _whole_blocks(x, tiles, *multiples, fill=0):
  """Pads queries to whole blocks, the same number for each core."""
  return lanes.pad(x, tiles.bQ * tpu.chip().cores, *multiples, fill=fill)


def _walk(indices, kv, tiles):
  padded = _whole_blocks(indices, tiles, fill=-1)
  return row_walk.walk(padded, kv.shape[1], tiles)


def _vjp_forward(q, kv, indices, latent_rank, scale, tiles):
  (T, N), walk = q.shape[1:3], _walk(indices, kv, tiles)
  out, lse = forward_lib.forward(
    _whole_blocks(q, tiles, _sublanes(q)), kv, walk, latent_rank, scale
  )
  # Named, so that a remat policy can save them instead of recomputing them.
  out, lse = checkpoint_name(
    (out[:, :T, :N], lse[:, :T, :N]), checkpoint_names.SPARSE_MLA
  )
  return (out, lse), (q, kv, indices, out, lse)


def _vjp_backward(latent_rank, scale, tiles, residuals, cotangents):
  del latent_rank  # d_out has it
  q, kv, indices, out, lse = residuals
  d_out, d_lse = cotangents
  lse, delta = softmax.lse_and_delta(out, lse, d_out, d_lse)
  (T, N), heads = q.shape[1:3], _sublanes(q)
  d_q, d_kv = backward_lib.backward(
    _whole_blocks(q, tiles, heads),
    kv,
    _walk(indices, kv, tiles),
    _whole_blocks(lse, tiles, heads, fill=jnp.inf),
    _whole_blocks(delta, tiles, heads),
    _whole_blocks(d_out, tiles, heads),
    scale,
  )
  return d_q[:, :T, :N], d_kv.astype(kv.dtype), None


_sparse_mla.defvjp(_vjp_forward, _vjp_backward)
