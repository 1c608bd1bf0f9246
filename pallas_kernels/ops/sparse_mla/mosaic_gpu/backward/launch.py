"""Runs the backward kernel: its inputs, its results, and groups of heads."""

from collections.abc import Sequence
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax
from pallas_kernels.hopper import widths
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import kernel
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import key_sums
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import permutation
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans

# Limit of one chunk of queries in the deterministic variant.
_CHUNK_BYTES: Final = 1 << 28


def backward(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"],
  indices: Int[Array, "B T K"],
  out: Float[Array, "B T N C"],
  lse: Float[Array, "B T N"],
  d_out: Float[Array, "B T N C"],
  d_lse: Float[Array, "B T N"],
  scale: float,
  *,
  deterministic: bool = False,
) -> tuple[
  Float[Array, "B T N CR"], Float[Array, "B S CR"], Float[Array, "B T K"]
]:
  """Computes the gradients of `api.sparse_mla`, and the summed weights.

  Memory: a float32 copy of kv's gradient, a copy of kv; deterministic: 256 MiB.

  Args:
    q: As in the forward pass, like `kv`, `indices`, `scale`; see `op.check`.
    kv: Keys.
    indices: Selected keys.
    out: Output of the forward pass.
    lse: Logsumexp of the forward pass; -inf for a query without a key.
    d_out: Cotangent of `out`.
    d_lse: Cotangent of `lse`; arbitrary where lse is -inf.
    scale: Scale of the logits.
    deterministic: Sum the gradient of a key in one fixed order, so that it is
      bitwise reproducible. The other results always are.

  Returns:
    The gradients, kv's summed in float32, and for each selected key the sum
    over heads of its probability, 0 for an index out of range.
  """
  B, T, N, _ = q.shape
  S, K = kv.shape[1], indices.shape[2]
  lse, delta = softmax.lse_and_delta(out, lse, d_out, d_lse)
  heads = -(-N // plans.HEADS) * plans.HEADS

  def groups(x, fill=0):
    """Splits [B, T, N, ...] to [B T, heads, ...] of at most 128 heads each,
    padded with heads of zero weight."""
    pad = [(0, 0)] * (x.ndim - 1)
    pad[1] = 0, heads - N
    x = x.reshape(B * T, *x.shape[2:])
    x = jnp.pad(x, pad, constant_values=fill)
    starts = range(0, heads, plans.MOST_HEADS)
    return [x[:, i : i + plans.MOST_HEADS] for i in starts]

  indices = _whole_tiles(indices.reshape(B * T, K))
  tiles = _tiles_with_keys(indices, S)
  q_groups, do_groups, kv = groups(q), groups(d_out), permutation.permuted(kv)
  biases = groups(-lse * softmax.LOG2E, -jnp.inf)
  offsets = groups(-scale * delta)
  d_kv_ref = jax.new_ref(jnp.zeros((B, S, widths.CR), jnp.float32))
  results = []
  for q_rows, do_rows, *per_head in zip(q_groups, do_groups, biases, offsets):
    plan = plans.Plan(
      heads=q_rows.shape[1],
      keys=S,
      tiles=indices.shape[1] // plans.KEYS,
      queries=T,
      scale=scale,
      deterministic=deterministic,
    )
    args = tiles, q_rows, do_rows, kv, indices, *per_head
    results.append(_launch(plan, args, d_kv_ref))
  d_q, p = (jnp.concatenate(x, axis=1) for x in zip(*results))
  d_q = d_q[:, :N].reshape(q.shape)
  d_kv = d_kv_ref[...].astype(jnp.bfloat16)
  return d_q, d_kv, p.sum(1)[:, :K].reshape(B, T, K)


def _whole_tiles(indices):
  """Fills the indices up to whole tiles with -1."""
  if not (missing := -indices.shape[1] % plans.KEYS):
    return indices
  return jnp.pad(indices, [(0, 0), (0, missing)], constant_values=-1)


def _tiles_with_keys(indices, keys):
  """Counts the tiles of each query up to the last that has a key."""
  tile = jnp.arange(indices.shape[1], dtype=jnp.int32) // plans.KEYS + 1
  valid = (indices >= 0) & (indices < keys)
  return jnp.max(jnp.where(valid, tile[None], 0), -1)


def _launch(
  plan: plans.Plan, args: Sequence[Array], d_kv_ref: jax.Ref
) -> Sequence[Array]:
  """Runs the kernel on one group of heads.

  Args:
    plan: The group's.
    args: Arrays that the kernel reads, of all queries.
    d_kv_ref: What kv's gradient is added to, [B, S, C+R].

  Returns:
    q's gradient, [B T, heads, C+R], and the weights' sums, [B T, blocks, K].
  """
  indices = args[4]
  BT, K = indices.shape
  results = (
    jax.ShapeDtypeStruct((BT, plan.heads, widths.CR), jnp.bfloat16),
    jax.ShapeDtypeStruct((BT, plan.blocks, K), jnp.float32),
  )
  if not plan.deterministic:
    call = kernel.of(plan, BT, results)
    return call(jnp.zeros((1,), jnp.int32), *args, d_kv_ref)
  chunk = min(max(_CHUNK_BYTES // (plans.ROW * K), 1), BT)
  return key_sums.by_chunk(
    kernel.of(plan, chunk),
    *(args, chunk, indices, plan.queries, d_kv_ref, results),
  )
