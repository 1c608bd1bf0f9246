"""Attention to a range of keys on TPUs, backward, in one kernel.

A grid step has a tile of keys of one head and bT queries. It walks over the
chunks of these keys that some of the queries see. Keys are the rows of its
products, so that per-query values (lse, delta, its range) form a row:

  S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, dQ += (dS^T)^T K

For each tile of keys, queries are fetched from the first tile that sees some of
it to the last. Meanwhile dK and dV of the tile stay in VMEM; dQ of all queries
stays there until the head ends. Steps run one after another, so the order of
additions is fixed.
"""

import functools
import math
from typing import Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.ops.dense_mla.mosaic_tpu import mask_bits as mask_bits_lib
from pallas_kernels.ops.dense_mla.mosaic_tpu.forward import dot
from pallas_kernels.tpu import chip as tpu

LANES: Final = 128
_LEAST: Final = jnp.iinfo(jnp.int32).min
_LOG2E: Final = math.log2(math.e)


def backward(
  q: Float[Array, "B N paddedT HR"],
  k: Float[Array, "B N paddedS HR"],
  v: Float[Array, "B N paddedS U"],
  d_out: Float[Array, "B N paddedT U"],
  lse: Float[Array, "B N 1 paddedT"],
  delta: Float[Array, "B N 1 paddedT"],
  start: Int[Array, "B 1 paddedT"],
  end: Int[Array, "B 1 paddedT"],
  bounds: Int[Array, "B nT 4"],
  walks: Int[Array, "B nS 2"],
  mask_bits: Int[Array, "B nW 128 paddedT"] | None,
  scale: float,
  *,
  chunk: int,
  dtype: DTypeLike,
) -> tuple[
  Float[Array, "B N paddedT HR"],
  Float[Array, "B N paddedS HR"],
  Float[Array, "B N paddedS U"],
]:
  """Computes the gradients of the queries, keys and values.

  Args:
    q: Queries, padded to whole tiles.
    k: Keys, padded to whole tiles.
    v: Values.
    d_out: Gradient of the output.
    lse: Logsumexp of scaled logits, in base 2; inf if no key is seen.
    delta: Subtracted from d weights.
    start: First key of each query.
    end: One past the last key.
    bounds: Bounds of each tile of queries; see `forward`.
    walks: For each tile of keys, the tiles of queries in [first, second).
    mask_bits: If given, the mask, in place of start and end; see
      `mask_bits_lib`.
    scale: Scale of the logits; positive.
    chunk: Keys per chunk.
    dtype: Dtype of the gradients of keys and values.
  """
  (B, N, T, HR), (S, U) = q.shape, v.shape[2:]
  nT, nS = bounds.shape[1], walks.shape[1]
  bT, bS = T // nT, S // nS
  bounds, walks = bounds.reshape(-1), walks.reshape(-1)

  def i(b, j, x, walks):
    """Query tile of step x; past the last, the first one of the next keys."""
    at, following = (2 * (b * nS + y) for y in (j, lax.rem(j + 1, nS)))
    tile = walks[at] + x
    return jnp.where(tile < walks[at + 1], tile, walks[following])

  of_queries = lambda width: pl.BlockSpec(
    (None, None, bT, width),
    lambda b, n, j, x, _, walks: (b, n, i(b, j, x, walks), 0),
  )
  of_keys = lambda width: pl.BlockSpec(
    (None, None, bS, width), lambda b, n, j, x, *_: (b, n, j, 0)
  )
  row = pl.BlockSpec(
    (None, None, 1, bT),
    lambda b, n, j, x, _, walks: (b, n, 0, i(b, j, x, walks)),
  )
  bound = pl.BlockSpec(
    (None, 1, bT), lambda b, n, j, x, _, walks: (b, 0, i(b, j, x, walks))
  )
  in_specs = [
    of_queries(HR), of_keys(HR), of_keys(U), of_queries(U), row, row
  ]  # fmt: skip
  operands = [q, k, v, d_out, lse, delta]
  if mask_bits is None:
    in_specs += [bound, bound]
    operands += [start, end]
  else:
    per_word = 32 * LANES // bS
    in_specs.append(
      pl.BlockSpec(
        (None, None, LANES, bT),
        lambda b, n, j, x, _, walks: (b, j // per_word, 0, i(b, j, x, walks)),
      )  # fmt: skip
    )
    operands.append(mask_bits)
  steps = jnp.max(walks[1::2] - walks[::2])
  return pl.pallas_call(
    functools.partial(
      _kernel,
      scale=scale,
      nT=nT,
      nS=nS,
      chunk=chunk,
      has_mask=mask_bits is not None,
    ),  # fmt: skip
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(B, N, nS, jnp.maximum(steps, 1)),
      in_specs=in_specs,
      out_specs=[
        pl.BlockSpec((None, None, T, HR), lambda b, n, *_: (b, n, 0, 0)),
        of_keys(HR),
        of_keys(U),
      ],
      scratch_shapes=[
        pltpu.VMEM((T, HR), jnp.float32),
        pltpu.VMEM((bS, HR), jnp.float32),
        pltpu.VMEM((bS, U), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(k.shape, dtype),
      jax.ShapeDtypeStruct(v.shape, dtype),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tpu.chip().vmem,
    ),
    interpret=tpu.interpret(),
    name=f"dense_mla_{'masked_' * (mask_bits is not None)}backward"
    f"_q{bT}_k{bS}_c{chunk}",
  )(bounds, walks, *operands)


def _kernel(
  bounds, walks, q, k, v, d_out, lse, delta, *refs,
  scale, nT, nS, chunk, has_mask,
):  # fmt: skip
  if has_mask:
    mask_bits, *refs = refs
  else:
    start, end, *refs = refs
  d_q, d_k, d_v, total_q, total_k, total_v = refs
  bT, bS = q.shape[0], k.shape[0]
  b, j, x = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  is_last = x == pl.num_programs(3) - 1
  i = walks[2 * (b * nS + j)] + x

  @pl.when((j == 0) & (x == 0))
  def _():
    total_q[...] = jnp.zeros_like(total_q)

  @pl.when(x == 0)
  def _():
    total_k[...] = jnp.zeros_like(total_k)
    total_v[...] = jnp.zeros_like(total_v)

  def seen(c):
    """bool[chunk, bT]"""
    first_key = j * bS + c * chunk
    if has_mask:
      return mask_bits_lib.unpack(mask_bits[...], first_key, chunk, axis=0)
    key = lax.broadcasted_iota(jnp.int32, (chunk, bT), 0)
    # Compared as unsigned: keys before the start exceed any length.
    key += first_key - start[...] + _LEAST
    return key < jnp.maximum(end[...] - start[...], 0) + _LEAST

  def walk(c, masked):
    keys = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
    queries = pl.ds(pl.multiple_of(i * bT, bT), bT)
    logits_ST = dot(k[keys], q[...], (1, 1))
    weights_ST = jnp.exp2(logits_ST * (scale * _LOG2E) - lse[...])
    if masked:
      weights_ST = jnp.where(seen(c), weights_ST, 0.0)
    d_weights_ST = dot(v[keys], d_out[...], (1, 1))
    # Without the scale, by which the sums are multiplied at the end.
    d_logits_ST = weights_ST * (d_weights_ST - delta[...])
    d_logits_ST = d_logits_ST.astype(q.dtype)
    weights_ST = weights_ST.astype(d_out.dtype)
    total_v[keys] += dot(weights_ST, d_out[...], (1, 0))
    total_k[keys] += dot(d_logits_ST, q[...], (1, 0))
    total_q[queries] += dot(d_logits_ST, k[keys], (0, 0))

  @pl.when(i < walks[2 * (b * nS + j) + 1])
  def _():
    least_start, largest_start, least_end, largest_end = (
      bounds[4 * (b * nT + i) + x] for x in range(4)
    )

    @pl.loop(0, bS // chunk)
    def _(c):
      first_key = j * bS + c * chunk
      is_seen = (least_start < first_key + chunk) & (largest_end > first_key)
      if has_mask:
        pl.when(is_seen)(lambda: walk(c, masked=True))
      else:
        is_whole = (largest_start <= first_key) & (
          least_end >= first_key + chunk
        )
        pl.when(is_seen & is_whole)(lambda: walk(c, masked=False))
        pl.when(is_seen & ~is_whole)(lambda: walk(c, masked=True))

  @pl.when(is_last)
  def _():
    d_k[...] = (total_k[...] * scale).astype(d_k.dtype)
    d_v[...] = total_v[...].astype(d_v.dtype)

  @pl.when(is_last & (j == nS - 1))
  def _():
    d_q[...] = (total_q[...] * scale).astype(d_q.dtype)
