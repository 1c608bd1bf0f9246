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

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax
from pallas_kernels.ops.dense_mla.mosaic_tpu import visible as visible_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """What gradients are computed from, in whole tiles of queries and keys.

  As arrays, or as their blocks or references: of bT queries and bS keys of one
  head.
  """

  q: Any
  """Queries, [B, N, paddedT, HR]."""
  k: Any
  """Keys, [B, N, paddedS, HR]."""
  v: Any
  """Values, [B, N, paddedS, U]."""
  d_out: Any
  """Gradient of the output, [B, N, paddedT, U]."""
  lse: Any
  """Logsumexp in base 2; inf if no key is seen; [B, N, 1, paddedT]."""
  delta: Any
  """Subtracted from d weights, [B, N, 1, paddedT]."""
  visible: visible_lib.Visible
  """Keys that each query sees; mask bits [B, nW, 128, paddedT]."""


def backward(
  inputs: Inputs,
  bounds: Int[Array, "B nT 4"],
  walks: Int[Array, "B nS 2"],
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
    inputs: See there.
    bounds: Bounds of each tile of queries.
    walks: For each tile of keys, the tiles of queries in [first, second).
    scale: Scale of the logits; positive.
    chunk: Keys per chunk.
    dtype: Dtype of the gradients of keys and values.
  """
  q, k, v = inputs.q, inputs.k, inputs.v
  (B, N, T, HR), (S, U) = q.shape, v.shape[2:]
  nT, nS = bounds.shape[1], walks.shape[1]
  bT, bS = T // nT, S // nS
  bounds, walks = bounds.reshape(-1), walks.reshape(-1)
  keys = lambda width: pl.BlockSpec(
    (None, None, bS, width), lambda b, n, j, *_: (b, n, j, 0)
  )
  sums: Any = _Sums(
    q=pltpu.VMEM((T, HR), jnp.float32),
    k=pltpu.VMEM((bS, HR), jnp.float32),
    v=pltpu.VMEM((bS, U), jnp.float32),
  )
  steps = jnp.max(walks[1::2] - walks[::2])
  masked = "" if inputs.visible.is_range else "masked_"
  return pl.pallas_call(
    functools.partial(_kernel, scale=scale, nT=nT, nS=nS, chunk=chunk),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(B, N, nS, jnp.maximum(steps, 1)),
      in_specs=[_blocks(inputs, keys, bT, bS, nS)],
      out_specs=[
        pl.BlockSpec((None, None, T, HR), lambda b, n, *_: (b, n, 0, 0)),
        keys(HR),
        keys(U),
      ],
      scratch_shapes=[sums],
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
    name=f"dense_mla_{masked}backward_q{bT}_k{bS}_c{chunk}",
  )(bounds, walks, inputs)


def _blocks(inputs, keys, bT, bS, nS):
  """Blocks of the inputs, of which `keys` makes those of keys."""

  def i(b, j, x, walks):
    """Query tile of step x; past the last, the first one of the next keys."""
    at, following = (2 * (b * nS + y) for y in (j, lax.rem(j + 1, nS)))
    tile = walks[at] + x
    return jnp.where(tile < walks[at + 1], tile, walks[following])

  queries = lambda width: pl.BlockSpec(
    (None, None, bT, width),
    lambda b, n, j, x, _, walks: (b, n, i(b, j, x, walks), 0),
  )
  row = pl.BlockSpec(
    (None, None, 1, bT),
    lambda b, n, j, x, _, walks: (b, n, 0, i(b, j, x, walks)),
  )
  bound = pl.BlockSpec(
    (None, 1, bT), lambda b, n, j, x, _, walks: (b, 0, i(b, j, x, walks))
  )
  tiles_per_word = 32 * lanes.LANES // bS
  words = pl.BlockSpec(
    (None, None, lanes.LANES, bT),
    lambda b, n, j, x, _, walks: (
      *(b, j // tiles_per_word, 0),
      i(b, j, x, walks),
    ),
  )
  HR, U = inputs.q.shape[-1], inputs.v.shape[-1]
  return Inputs(
    q=queries(HR),
    k=keys(HR),
    v=keys(U),
    d_out=queries(U),
    lse=row,
    delta=row,
    visible=inputs.visible.blocks(bound, words),
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
  """Sums of the gradients: of all queries, and of a tile of keys."""

  q: Any
  k: Any
  v: Any


def _kernel(bounds, walks, tiles, d_q, d_k, d_v, sums, *, scale, nT, nS, chunk):
  bS = tiles.k.shape[0]
  b, j, x = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  is_last = x == pl.num_programs(3) - 1
  i = walks[2 * (b * nS + j)] + x

  @pl.when((j == 0) & (x == 0))
  def _():
    sums.q[...] = jnp.zeros_like(sums.q)

  @pl.when(x == 0)
  def _():
    sums.k[...] = jnp.zeros_like(sums.k)
    sums.v[...] = jnp.zeros_like(sums.v)

  @pl.when(i < walks[2 * (b * nS + j) + 1])
  def _():
    least_start, largest_start, least_end, largest_end = (
      bounds[4 * (b * nT + i) + x] for x in range(4)
    )

    @pl.loop(0, bS // chunk)
    def _(c):
      first_key = j * bS + c * chunk
      is_seen = (least_start < first_key + chunk) & (largest_end > first_key)

      def add(masked):
        keys = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
        _add(tiles, sums, i, keys, first_key, scale, masked)

      if tiles.visible.is_range:
        is_whole = (largest_start <= first_key) & (
          least_end >= first_key + chunk
        )
        pl.when(is_seen & is_whole)(lambda: add(masked=False))
        pl.when(is_seen & ~is_whole)(lambda: add(masked=True))
      else:
        pl.when(is_seen)(lambda: add(masked=True))

  @pl.when(is_last)
  def _():
    d_k[...] = (sums.k[...] * scale).astype(d_k.dtype)
    d_v[...] = sums.v[...].astype(d_v.dtype)

  @pl.when(is_last & (j == nS - 1))
  def _():
    d_q[...] = (sums.q[...] * scale).astype(d_q.dtype)


def _add(tiles, sums, i, keys, first_key, scale, masked):
  """Adds the gradients of tile i of queries and of a chunk of keys."""
  q, k, v, d_out = tiles.q, tiles.k, tiles.v, tiles.d_out
  bT = q.shape[0]
  queries = pl.ds(pl.multiple_of(i * bT, bT), bT)
  logits_ST = products.dot(k[keys], q[...], products.NT)
  weights_ST = jnp.exp2(logits_ST * (scale * softmax.LOG2E) - tiles.lse[...])
  if masked:
    seen_ST = tiles.visible.by_key(first_key, keys.size)
    weights_ST = jnp.where(seen_ST, weights_ST, 0.0)
  d_weights_ST = products.dot(v[keys], d_out[...], products.NT)
  # Without the scale, by which the sums are multiplied at the end.
  d_logits_ST = weights_ST * (d_weights_ST - tiles.delta[...])
  d_logits_ST = d_logits_ST.astype(q.dtype)
  weights_ST = weights_ST.astype(d_out.dtype)
  sums.v[keys] += products.dot(weights_ST, d_out[...], products.NN)
  sums.k[keys] += products.dot(d_logits_ST, q[...], products.NN)
  sums.q[queries] += products.dot(d_logits_ST, k[keys], products.TN)
