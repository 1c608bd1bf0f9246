"""Attention to a range of keys on TPUs, forward.

A grid step has bT queries of one head and a tile of keys, and walks over the
chunks of this tile that at least one of its queries sees: logits, online
softmax, out += P V. Chunks that all of them see in full need no mask. Tiles of
keys are fetched from the first to the last that is seen; the grid is as long as
the longest such walk, and the idle steps of a shorter one prefetch for the
next.

Two chunks of keys are unrolled into straight-line code, in which the compiler
hides the softmax of some rows behind the products of others.
"""

import functools
import math
from typing import Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ops.dense_mla.mosaic_tpu import mask_bits as mask_bits_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import heads

LANES: Final = 128
_NEVER: Final = -1e30  # initial maximum; finite, since -inf would give NaN
_LEAST: Final = jnp.iinfo(jnp.int32).min
_LOG2E: Final = math.log2(math.e)


def forward(
  q: Float[Array, "B N paddedT HR"],
  k: Float[Array, "B paddedS lanes"],
  v: Float[Array, "B N paddedS U"],
  start: Int[Array, "B 1 paddedT"],
  end: Int[Array, "B 1 paddedT"],
  bounds: Int[Array, "B nT 4"],
  mask_bits: Int[Array, "B nW paddedT 128"] | None,
  scale: float,
  *,
  bS: int,
  chunk: int,
) -> tuple[Float[Array, "B N paddedT U"], Float[Array, "B N 1 paddedT"]]:
  """Computes the output and the logsumexp.

  Args:
    q: Queries, padded to whole tiles.
    k: Keys, padded to whole tiles of bS, heads side by side; see
      `tpu.heads`.
    v: Values.
    start: First key of each query.
    end: One past the last key.
    bounds: For each tile of queries: keys in [first, fourth) are seen by some,
      keys in [second, third) by all.
    mask_bits: If given, the mask, in place of start and end; see
      `mask_bits_lib`.
    scale: Scale of the logits; positive.
    bS: Keys per tile.
    chunk: Keys per chunk; a divisor of bS.
  """
  (B, N, T, HR), U, nT = q.shape, v.shape[-1], bounds.shape[1]
  bT = T // nT
  bounds = bounds.reshape(-1)

  def keys(b, i, j, bounds):
    """Tile of step j; past the last, the first tile of the next queries."""
    at, following = (4 * (b * nT + x) for x in (i, lax.rem(i + 1, nT)))
    tile = bounds[at] // bS + j
    is_walked = tile * bS < bounds[at + 3]
    return jnp.where(is_walked, tile, bounds[following] // bS)

  queries = lambda width: pl.BlockSpec(
    (None, None, bT, width), lambda b, n, i, j, bounds: (b, n, i, 0)
  )
  k_spec = pl.BlockSpec(
    (pl.Squeezed(), pl.Element(bS), pl.Element(heads.width(HR))),
    lambda b, n, i, j, bounds: (
      *(b, bS * keys(b, i, j, bounds)),
      pl.multiple_of(heads.place(n, HR), LANES),
    ),
  )
  v_spec = pl.BlockSpec(
    (None, None, bS, U),
    lambda b, n, i, j, bounds: (b, n, keys(b, i, j, bounds), 0),
  )
  bound = pl.BlockSpec((None, 1, bT), lambda b, n, i, j, bounds: (b, 0, i))
  in_specs = [queries(heads.width(HR)), k_spec, v_spec]
  operands = [heads.queries(q), k, v]
  if mask_bits is None:
    in_specs += [bound, bound]
    operands += [start, end]
  else:
    per_word = 32 * LANES // bS
    in_specs.append(
      pl.BlockSpec(
        (None, None, bT, LANES),
        lambda b, n, i, j, bounds: (b, keys(b, i, j, bounds) // per_word, i, 0),
      )
    )
    operands.append(mask_bits)
  steps = jnp.max(pl.cdiv(bounds[3::4], bS) - bounds[::4] // bS)
  return pl.pallas_call(
    functools.partial(
      _kernel, scale=scale, nT=nT, chunk=chunk, has_mask=mask_bits is not None
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, N, nT, jnp.maximum(steps, 1)),
      in_specs=in_specs,
      out_specs=[
        queries(U),
        pl.BlockSpec(
          (None, None, 1, bT), lambda b, n, i, j, bounds: (b, n, 0, i)
        ),
      ],
      scratch_shapes=[
        pltpu.VMEM((bT, U), jnp.float32),
        pltpu.VMEM((bT, LANES), jnp.float32),
        pltpu.VMEM((bT, LANES), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((B, N, T, U), q.dtype),
      jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=tpu.chip().vmem,
    ),
    interpret=tpu.interpret(),
    name=f"dense_mla_{'masked_' * (mask_bits is not None)}forward"
    f"_q{bT}_k{bS}_c{chunk}",
  )(bounds, *operands)


def dot(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
  """Contracts one axis of each; float32 operands are not rounded."""
  return lax.dot_general(
    x, y, ((contracted[:1], contracted[1:]), ((), ())),
    precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )  # fmt: skip


def _to_rows(x: jax.Array) -> jax.Array:
  """[1, bT] -> [bT, 128]: broadcasts the number of lane i over row i."""
  return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def _wide(x: jax.Array, width: int) -> jax.Array:
  """[bT, 128], equal in all lanes -> [bT, width]."""
  return jnp.concatenate([x] * (width // LANES), 1)


def _kernel(bounds, q, k, v, *refs, scale, nT, chunk, has_mask):
  if has_mask:
    mask_bits, *refs = refs
  else:
    start, end, *refs = refs
  out, lse, total_out, top, total = refs
  bT, U = out.shape
  bS = k.shape[0]
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  least_start, largest_start, least_end, largest_end = (
    bounds[4 * (b * nT + i) + x] for x in range(4)
  )
  tile_key = (least_start // bS + j) * bS

  @pl.when(j == 0)
  def _():
    total_out[...] = jnp.zeros_like(total_out)
    top[...] = jnp.full_like(top, _NEVER)
    total[...] = jnp.zeros_like(total)

  def seen(at):
    """bool[bT, chunk]"""
    first_key = tile_key + at
    if has_mask:
      return mask_bits_lib.unpack(mask_bits[...], first_key, chunk, axis=1)
    before = _to_rows(start[...] - first_key)
    length = _to_rows(jnp.maximum(end[...] - start[...], 0))
    lane = lax.broadcasted_iota(jnp.int32, (bT, LANES), 1)
    # Compared as unsigned: keys before the start exceed any length.
    keys = lane - before + _LEAST
    parts = [keys + x < length + _LEAST for x in range(0, chunk, LANES)]
    return jnp.concatenate(parts, 1)

  def add(at, masked):
    """Adds the chunk of keys that begins at offset `at` of the tile."""
    keys = pl.ds(at, chunk)
    logits = dot(q[...], k[keys], (1, 1))
    if masked:
      logits = jnp.where(seen(at), logits, -jnp.inf)
    old_top = top[...]
    new_top = jnp.maximum(old_top, jnp.max(logits, 1, keepdims=True))
    keep = jnp.exp2((old_top - new_top) * (scale * _LOG2E))
    weights = jnp.exp2((logits - _wide(new_top, chunk)) * (scale * _LOG2E))
    # Sums over every 128th key; lanes are reduced at the end.
    total[...] = total[...] * keep + sum(jnp.split(weights, chunk // LANES, 1))
    top[...] = new_top
    part = dot(weights.astype(v.dtype), v[keys], (1, 0))
    total_out[...] = total_out[...] * _wide(keep, U) + part

  stretch = min(2 * chunk, bS)

  @pl.loop(
    jnp.maximum(least_start - tile_key, 0) // stretch,
    pl.cdiv(jnp.clip(largest_end - tile_key, 0, bS), stretch),
  )
  def _(x):
    first = pl.multiple_of(x * stretch, stretch)

    def walk(masked):
      for at in range(0, stretch, chunk):
        add(first + at, masked)

    if has_mask:
      walk(masked=True)
    else:
      whole = (largest_start <= tile_key + first) & (
        least_end >= tile_key + first + stretch
      )
      pl.when(whole)(lambda: walk(masked=False))
      pl.when(~whole)(lambda: walk(masked=True))

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    sum_T1 = jnp.sum(total[...], 1, keepdims=True)
    alive = sum_T1 > 0
    inverse = jnp.where(alive, 1 / jnp.where(alive, sum_T1, 1.0), 0.0)
    out[...] = (total_out[...] * inverse).astype(out.dtype)
    lse_TL = jnp.where(alive, top[...] * scale + jnp.log(sum_T1), -jnp.inf)
    lse[...] = lse_TL.T[:1]
