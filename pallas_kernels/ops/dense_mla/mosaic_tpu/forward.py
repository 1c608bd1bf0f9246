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

import dataclasses
import functools
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax
from pallas_kernels.ops.dense_mla.mosaic_tpu import visible as visible_lib
from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import heads
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products

_NEVER: Final = -1e30  # initial maximum; finite, since -inf would give NaN


def forward(
  q: Float[Array, "B N paddedT HR"],
  k: Float[Array, "B paddedS lanes"],
  v: Float[Array, "B N paddedS U"],
  visible: visible_lib.Visible,
  bounds: Int[Array, "B nT 4"],
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
    visible: Keys that each query sees; mask bits [B, nW, paddedT, 128].
    bounds: Bounds of each tile of queries.
    scale: Scale of the logits; positive.
    bS: Keys per tile.
    chunk: Keys per chunk; a divisor of bS.
  """
  (B, N, T, HR), U, nT = q.shape, v.shape[-1], bounds.shape[1]
  bT = T // nT
  bounds = bounds.reshape(-1)
  queries = lambda width: pl.BlockSpec(
    (None, None, bT, width), lambda b, n, i, *_: (b, n, i, 0)
  )
  sums: Any = _Sums(
    out=pltpu.VMEM((bT, U), jnp.float32),
    top=pltpu.VMEM((bT, lanes.LANES), jnp.float32),
    total=pltpu.VMEM((bT, lanes.LANES), jnp.float32),
  )
  inputs = _Inputs(heads.queries(q), k, v, visible)
  steps = jnp.max(pl.cdiv(bounds[3::4], bS) - bounds[::4] // bS)
  masked = "" if visible.is_range else "masked_"
  return pl.pallas_call(
    functools.partial(_kernel, scale=scale, nT=nT, chunk=chunk),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, N, nT, jnp.maximum(steps, 1)),
      in_specs=[_blocks(inputs, queries, HR, bS, nT)],
      out_specs=[
        queries(U),
        pl.BlockSpec((None, None, 1, bT), lambda b, n, i, *_: (b, n, 0, i)),
      ],
      scratch_shapes=[sums],
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
    name=f"dense_mla_{masked}forward_q{bT}_k{bS}_c{chunk}",
  )(bounds, inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
  """A tile of queries of one head, and a tile of its keys."""

  q: Any
  k: Any
  v: Any
  visible: visible_lib.Visible


def _blocks(inputs, queries, HR, bS, nT):
  """Blocks of the inputs, of which `queries` makes those of queries."""
  U, window = inputs.v.shape[-1], inputs.q.shape[-1]
  bT = inputs.q.shape[2] // nT

  def keys(b, i, j, bounds):
    """Tile of step j; past the last, the first tile of the next queries."""
    at, following = (4 * (b * nT + x) for x in (i, lax.rem(i + 1, nT)))
    tile = bounds[at] // bS + j
    is_walked = tile * bS < bounds[at + 3]
    return jnp.where(is_walked, tile, bounds[following] // bS)

  def first_number(b, n, i, j, bounds):
    row = bS * keys(b, i, j, bounds)
    return b, row, pl.multiple_of(heads.place(n, HR), lanes.LANES)

  def words(b, n, i, j, bounds):
    tiles_per_word = 32 * lanes.LANES // bS
    return b, keys(b, i, j, bounds) // tiles_per_word, i, 0

  return _Inputs(
    q=queries(window),
    k=pl.BlockSpec(
      (pl.Squeezed(), pl.Element(bS), pl.Element(window)), first_number
    ),
    v=pl.BlockSpec(
      (None, None, bS, U),
      lambda b, n, i, j, bounds: (b, n, keys(b, i, j, bounds), 0),
    ),
    visible=inputs.visible.blocks(
      pl.BlockSpec((None, 1, bT), lambda b, n, i, *_: (b, 0, i)),
      pl.BlockSpec((None, None, bT, lanes.LANES), words),
    ),
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
  """Running sums of the softmax, and its running maximum in all lanes."""

  out: Any
  top: Any
  total: Any
  """Sums over every 128th key."""


def _kernel(bounds, tiles, out, lse, sums, *, scale, nT, chunk):
  bS = tiles.k.shape[0]
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  least_start, largest_start, least_end, largest_end = (
    bounds[4 * (b * nT + i) + x] for x in range(4)
  )
  tile_key = (least_start // bS + j) * bS

  @pl.when(j == 0)
  def _():
    sums.out[...] = jnp.zeros_like(sums.out)
    sums.top[...] = jnp.full_like(sums.top, _NEVER)
    sums.total[...] = jnp.zeros_like(sums.total)

  stretch = min(2 * chunk, bS)

  @pl.loop(
    jnp.maximum(least_start - tile_key, 0) // stretch,
    pl.cdiv(jnp.clip(largest_end - tile_key, 0, bS), stretch),
  )
  def _(x):
    first = pl.multiple_of(x * stretch, stretch)

    def walk(masked):
      for at in range(0, stretch, chunk):
        keys = pl.ds(first + at, chunk)
        _add(tiles, sums, keys, tile_key, scale, masked)

    if tiles.visible.is_range:
      whole = (largest_start <= tile_key + first) & (
        least_end >= tile_key + first + stretch
      )
      pl.when(whole)(lambda: walk(masked=False))
      pl.when(~whole)(lambda: walk(masked=True))
    else:
      walk(masked=True)

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    _write(out, lse, sums, scale)


def _add(tiles, sums, keys, tile_key, scale, masked):
  """Adds a chunk of keys, whose place in the tile is `keys`."""
  chunk, base2 = keys.size, scale * softmax.LOG2E
  logits = products.dot(tiles.q[...], tiles.k[keys], products.NT)
  if masked:
    seen = tiles.visible.by_query(tile_key + keys.start, chunk)
    logits = jnp.where(seen, logits, -jnp.inf)
  old_top = sums.top[...]
  new_top = jnp.maximum(old_top, jnp.max(logits, 1, keepdims=True))
  keep = jnp.exp2((old_top - new_top) * base2)
  weights = jnp.exp2((logits - _wide(new_top, chunk)) * base2)
  sums.total[...] = sums.total[...] * keep + sum(
    jnp.split(weights, chunk // lanes.LANES, 1)
  )
  sums.top[...] = new_top
  weights = weights.astype(tiles.v.dtype)
  part = products.dot(weights, tiles.v[keys], products.NN)
  sums.out[...] = sums.out[...] * _wide(keep, part.shape[1]) + part


def _write(out, lse, sums, scale):
  """Writes the results of the queries."""
  sum_T1 = jnp.sum(sums.total[...], 1, keepdims=True)
  alive = sum_T1 > 0
  inverse = jnp.where(alive, 1 / jnp.where(alive, sum_T1, 1.0), 0.0)
  out[...] = (sums.out[...] * inverse).astype(out.dtype)
  lse_TL = jnp.where(alive, sums.top[...] * scale + jnp.log(sum_T1), -jnp.inf)
  lse[...] = lse_TL.T[:1]


def _wide(x: jax.Array, width: int) -> jax.Array:
  """[bT, 128], equal in all lanes -> [bT, width]."""
  return jnp.concatenate([x] * (width // lanes.LANES), 1)
