"""Sparse attention's gradients on Hopper: one or two thread blocks a query.

Up to 64 heads are one block's. 128 are a cluster's: each of its two blocks
takes all heads, but half of the columns of Q, dO, K, dQ and dKV, so that every
row is gathered once and every sum over heads goes to device memory once.

Q and dO stay in shared memory; tiles of 64 selected rows stream through it, one
after another:

- Warpgroup 2 gathers the rows with 16-byte cp.async.
- Warpgroup 0 computes S^T = K Q^T, from it the weights P^T; warpgroup 1
  dP^T = V dO^T, then dS^T = scale P^T (dP^T - delta). Keys are the rows of
  these products, so that a key's probability summed over heads is a sum over a
  row.
- In a cluster these are sums over half of the columns: each block sends the
  64 heads it does not own to the other one, adds what it gets to its own 64,
  and sends back their weights.
- P^T and dS^T go through shared memory. A warpgroup has its share of the
  columns (alone) or of the heads (in a cluster) of dQ += dS K in registers
  until the end, and its share of the columns of dKV = P^T dO + dS^T Q, 64 at a
  time: from registers to device memory as vector additions, while the next 64
  are multiplied.

The tile is freed after dQ, so that the next gather overlaps with dKV.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ops.sparse_mla.mosaic_gpu import backward_plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu import (
  backward_products as products_lib,
)
from pallas_kernels.ops.sparse_mla.mosaic_gpu import backward_rows as rows_lib
from pallas_kernels.ops.sparse_mla.mosaic_gpu import instructions as gpu
from pallas_kernels.ops.sparse_mla.mosaic_gpu import key_sums as key_sums_lib

# Limit of one chunk of queries in the deterministic variant.
_CHUNK_BYTES = 1 << 28


def _kernel(
  first_ref,
  tiles_ref,
  q_ref,
  do_ref,
  kv_ref,
  indices_ref,
  lse_ref,
  delta_ref,
  d_kv_ref,
  d_q_ref,
  p_ref,
  q_wide,
  q_narrow,
  do_wide,
  kv_wide,
  kv_narrow,
  p_tile,
  ds_tile,
  index_tile,
  per_head,
  loaded,
  *,
  plan: plans.Plan,
):
  place, group = lax.axis_index("query"), lax.axis_index("group")
  rank = lax.axis_index("rank") if plan.blocks == 2 else 0
  # The last query again, where a chunk of them reaches beyond it.
  query = jnp.minimum(first_ref[0] + place, q_ref.shape[0] - 1)
  batch = query // plan.queries
  tiles = tiles_ref[query]
  plain, wide, narrow = (
    plgpu.RefType(x) for x in ((), plans.WIDE, plans.NARROW)
  )
  number = plgpu.Layout.WG_SPLAT

  @plgpu.inline_mgpu(arg_types=(plain,))
  def start_barriers(_, index_tile):
    plans.start_barriers(index_tile, plan)

  start_barriers(index_tile)

  @pl.when(group == 2)
  def _():
    plgpu.set_max_registers(plans.GATHER_REGISTERS, action="decrease")

    @plgpu.inline_mgpu(arg_types=(plain, plain, wide, narrow, plain, number))
    def gather(_, *args):
      *refs, tiles = args
      rows_lib.gather(*refs, tiles.registers.item(), plan=plan)
      if plan.blocks == 2:
        gpu.meet_cluster()

    gather(
      kv_ref.at[batch],
      indices_ref.at[query],
      kv_wide,
      kv_narrow,
      index_tile,
      tiles,
    )

  @pl.when(group == 0)
  def _():
    columns = pl.ds(rank * plan.wide, plan.wide)
    rotated = pl.ds(plans.C + rank * plan.narrow, plan.narrow)
    for i in range(plan.blocks):  # those that the block owns come first
      heads, here = (
        pl.ds((rank ^ i) * plans.HEADS, plans.HEADS),
        pl.ds(i * plans.HEADS, plans.HEADS),
      )
      for source, target in (
        (q_ref.at[query, heads, columns], q_wide.at[here]),
        (q_ref.at[query, heads, rotated], q_narrow.at[here]),
        (do_ref.at[query, heads, columns], do_wide.at[here]),
      ):
        plgpu.copy_gmem_to_smem(source, target, loaded)
    heads = pl.ds(rank * plans.HEADS, plans.HEADS)
    for i, source in enumerate((lse_ref, delta_ref)):
      plgpu.copy_gmem_to_smem(source.at[query, heads], per_head.at[i], loaded)

  for which in range(2):

    @pl.when(group == which)
    def _(which=which):
      plgpu.set_max_registers(plans.MULTIPLY_REGISTERS, action="increase")
      plgpu.barrier_wait(loaded)

      @plgpu.inline_mgpu(
        arg_types=(
          *(wide, narrow, wide, wide, narrow, wide, wide),
          *(plain,) * 5,
          *(number,) * 2,
        )
      )
      def multiply(_, *args):
        *refs, tiles, slot = args
        numbers = (x.registers.item() for x in (tiles, slot))
        products_lib.multiply(*refs, *numbers, which=which, plan=plan)

      multiply(
        q_wide,
        q_narrow,
        do_wide,
        kv_wide,
        kv_narrow,
        p_tile,
        ds_tile,
        index_tile,
        per_head,
        d_kv_ref if plan.deterministic else d_kv_ref.at[batch],
        d_q_ref.at[query],
        p_ref.at[query, rank],
        tiles,
        place * (plan.tiles * plans.KEYS),
      )


def refuse(q, kv, indices, latent_rank: int) -> None:
  """Raises NotImplementedError for inputs that `backward` does not support."""
  N, width = q.shape[2:]
  if (latent_rank, width) != (plans.C, plans.D):
    raise NotImplementedError(
      f"{latent_rank=} of width {width}; the kernel has {plans.C} of {plans.D}."
    )
  if q.dtype != jnp.bfloat16 or kv.dtype != jnp.bfloat16:
    raise NotImplementedError(f"{q.dtype} and {kv.dtype}; it has bfloat16.")
  if N > 2 * plans.HEADS:
    raise NotImplementedError(f"{N} heads; it has at most {2 * plans.HEADS}.")
  if not indices.shape[2] or indices.shape[2] % plans.KEYS:
    raise NotImplementedError(
      f"{indices.shape[2]} keys a query; it has multiples of {plans.KEYS}."
    )


def backward(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"],
  indices: Int[Array, "B T K"],
  out: Float[Array, "B T N C"],
  lse: Float[Array, "B T N"],
  d_out: Float[Array, "B T N C"],
  d_lse: Float[Array, "B T N"],
  latent_rank: int,
  scale: float,
  *,
  deterministic: bool = False,
) -> tuple[
  Float[Array, "B T N CR"], Float[Array, "B S CR"], Float[Array, "B T K"]
]:
  """Computes the gradients of `api.sparse_mla`, and the summed weights.

  Memory: a float32 copy of kv's gradient, a copy of kv; deterministic: 256 MiB.

  Args:
    q: As in the forward pass, like `kv`, `indices`, `latent_rank`, `scale`.
    kv: Keys.
    indices: Selected keys.
    out: Output of the forward pass.
    lse: Logsumexp of the forward pass; -inf for a query without a key.
    d_out: Cotangent of `out`.
    d_lse: Cotangent of `lse`; arbitrary where lse is -inf.
    latent_rank: C.
    scale: Scale of the logits.
    deterministic: Sum the gradient of a key in one fixed order, so that it is
      bitwise reproducible. The other results always are.

  Returns:
    The gradients, kv's summed in float32, and for each selected key the sum
    over heads of its probability, 0 for an index out of range.

  Raises:
    NotImplementedError: These shapes or dtypes are not supported.
  """
  refuse(q, kv, indices, latent_rank)
  B, T, N, _ = q.shape
  S, K = kv.shape[1], indices.shape[2]
  f32, bf16 = jnp.float32, jnp.bfloat16
  delta = jnp.sum(d_out.astype(f32) * out.astype(f32), -1)
  # A dead row has weights of 0, whatever d_lse.
  dead = jnp.isneginf(lse)
  delta = jnp.where(dead, 0.0, delta - d_lse)
  lse = jnp.where(dead, jnp.inf, lse)
  blocks = -(-N // plans.HEADS)

  def rows(x, fill=0):
    """Reshapes to [B T, heads, ...], padded with heads of zero weight."""
    pad = [(0, 0)] * (x.ndim - 1)
    pad[1] = 0, blocks * plans.HEADS - N
    return jnp.pad(x.reshape(B * T, *x.shape[2:]), pad, constant_values=fill)

  indices = indices.reshape(B * T, K)
  tiles_of_key = jnp.arange(K, dtype=jnp.int32) // plans.KEYS + 1
  valid = (indices >= 0) & (indices < S)
  args = (
    jnp.max(jnp.where(valid, tiles_of_key[None], 0), -1),
    rows(q),
    rows(d_out),
    rows_lib.permuted(kv),
    indices,
    rows(-lse * plans.LOG2E, -jnp.inf),
    rows(-scale * delta),
  )
  d_q = jax.ShapeDtypeStruct((B * T, blocks * plans.HEADS, plans.D), bf16)
  p = jax.ShapeDtypeStruct((B * T, blocks, K), f32)
  chunk = max(_CHUNK_BYTES // (plans.ROW * K), 1) if deterministic else B * T
  plan = plans.Plan(
    blocks=blocks,
    keys=S,
    tiles=K // plans.KEYS,
    queries=T,
    scale=scale,
    deterministic=deterministic,
  )
  smem = lambda n, columns, transforms: plgpu.SMEM(
    (n, columns), bf16, transforms=transforms
  )
  heads = blocks * plans.HEADS
  kernel = plgpu.kernel(
    functools.partial(_kernel, plan=plan),
    out_type=() if deterministic else (d_q, p),
    grid=(min(chunk, B * T),),
    grid_names=("query",),
    num_threads=3,
    thread_name="group",
    scratch_types=[
      smem(heads, plan.wide, plans.WIDE),
      smem(heads, plan.narrow, plans.NARROW),
      smem(heads, plan.wide, plans.WIDE),
      smem(plans.KEYS, plan.wide, plans.WIDE),
      smem(plans.KEYS, plan.narrow, plans.NARROW),
      smem(blocks * plans.KEYS, plans.HEADS, plans.WIDE),
      smem(blocks * plans.KEYS, plans.HEADS, plans.WIDE),
      plgpu.SMEM((plans.KEYS + 2 * len(plans.ARRIVALS),), jnp.int32),
      plgpu.SMEM((2 if blocks == 1 else 2 + plans.KEYS, plans.HEADS), f32),
      plgpu.Barrier(num_arrivals=3 * blocks + 2),
    ],
    kernel_name="sparse_mla_backward",
    cluster=(2,) if blocks == 2 else (),
    cluster_names=("rank",) if blocks == 2 else (),
  )
  d_kv_ref = jax.new_ref(jnp.zeros((B, S, plans.D), f32))
  if deterministic:
    d_q, p = key_sums_lib.by_chunk(
      kernel, args, chunk, indices, T, d_kv_ref, (d_q, p)
    )
  else:
    d_q, p = kernel(jnp.zeros((1,), jnp.int32), *args, d_kv_ref)
  d_q = d_q[:, :N].reshape(q.shape)
  return d_q, d_kv_ref[...].astype(bf16), p.sum(1).reshape(B, T, K)
