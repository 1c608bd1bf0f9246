"""Kernels of a chunk of queries: scores, target, gradients.

Keys are the leading dimension of their arrays: per-query values (weights,
logsumexp, range) then form a row, which broadcasts over the keys for free, and
a sum over keys or heads adds whole registers. No product transposes an operand
in the kernel.

A grid is cores x tiles of keys: each core has `bT` of the chunk's queries. Only
the tiles that a query of the chunk sees are visited; the others are not
written.
"""

import dataclasses
import math
from typing import Final

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import heads

_PART: Final = 512  # keys per stretch of straight-line code
_NN: Final = ((1,), (0,)), ((), ())
_NT: Final = ((1,), (1,)), ((), ())
_f32: Final = jnp.float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Queries of a chunk, and the ranges of keys that they see.

  Attributes:
    place: Batch row, and index of the chunk.
    keys: First key that one of its queries sees, and one past the last.
    start: First key that each query sees.
    end: One past the last key.
  """

  place: Int[Array, "*n 2"]
  keys: Int[Array, "*n 2"]
  start: Int[Array, "*n 1 chunk"]
  end: Int[Array, "*n 1 chunk"]


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Tile sizes.

  Attributes:
    cores: Cores that share a chunk.
    bT: Queries per core.
    bS: Keys per tile.
    target_bS: Keys per tile in `target`, which reads them for each head.
    bN: Attention heads read at once.
  """

  cores: int
  bT: int
  bS: int
  target_bS: int
  bN: int

  @property
  def chunk(self) -> int:
    return self.cores * self.bT


def chunks(
  start: Int[Array, "B T"], end: Int[Array, "B T"], tiles: Tiles
) -> Chunk:
  """Splits the queries into chunks [B, n]; `end` must not exceed S."""
  B, T = start.shape
  start, end = (x.reshape(B, -1, 1, tiles.chunk) for x in (start, end))
  alive = start < end
  last = jnp.where(alive, end, 0).max((2, 3))
  first = jnp.where(alive, start, jnp.iinfo(start.dtype).max).min((2, 3))
  keys = jnp.stack([jnp.minimum(first, last), last], -1)
  place = jnp.stack(jnp.indices(last.shape, last.dtype), -1)
  return Chunk(place, keys, start, end)


def scores(
  q_index: Float[Array, "B M T I"],
  k_index: Float[Array, "B S I"],
  w: Float[Array, "B M T"],
  chunk: Chunk,
  tiles: Tiles,
) -> tuple[Float[Array, "S chunk"], Float[Array, "1 chunk"]]:
  """Computes index scores, -inf unseen, and logsumexp, 0 for no keys."""
  (_, M, _, I), S = q_index.shape, k_index.shape[1]
  bT, bS = tiles.bT, tiles.bS
  place, seen = _walk(chunk, bS)

  def body(place, q, k, w, start, end, scores, lse, top, total):
    @pl.when(pl.program_id(1) == 0)
    def _():
      top[...] = jnp.full_like(top, -jnp.inf)
      total[...] = jnp.zeros_like(total)

    scores[...] = jnp.zeros_like(scores)

    @pl.loop(0, M)
    def _(m):
      similarity_ST = _dot(k[0], q[0, m], _NT)
      scores[...] += jnp.maximum(similarity_ST, 0.0) * w[0, pl.ds(m, 1)]

    visible_ST = _visible(place, start, end, bS)
    scores[...] = jnp.where(visible_ST, scores[...], -jnp.inf)
    new_top = jnp.maximum(top[...], scores[...].max(0, keepdims=True))
    finite = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
    part = jnp.exp(scores[...] - finite).sum(0, keepdims=True)
    total[...] = jnp.exp(top[...] - finite) * total[...] + part
    top[...] = new_top
    lse[...] = jnp.where(total[...] > 0, finite + jnp.log(total[...]), 0.0)

  row = pl.BlockSpec((1, bT), lambda i, j, place: (0, i))
  return _kernel(
    body,
    "scores",
    f"q{bT}_k{bS}",
    (tiles.cores, seen),
    in_specs=[
      _queries((M, bT, I), tiles),
      pl.BlockSpec((1, bS, I), lambda i, j, place: (place[0], place[2] + j, 0)),
      _queries((M, bT), tiles),
      *(row, row),
    ],
    out_specs=[_pairs(bS, bT), row],
    out_shape=[
      jax.ShapeDtypeStruct((S, tiles.chunk), _f32),
      jax.ShapeDtypeStruct((1, tiles.chunk), _f32),
    ],
    scratch_shapes=[pltpu.VMEM((1, bT), _f32)] * 2,
  )(place, q_index, k_index, w, chunk.start, chunk.end)


def target(
  q: Float[Array, "B N T HR"],
  k: Float[Array, "B S lanes"],
  bias: Float[Array, "B N T"],
  chunk: Chunk,
  tiles: Tiles,
  scale: float,
  width: int,
) -> Float[Array, "width chunk"]:
  """Computes the mean over heads of exp2(scale log2(e) q.k + bias); 0 unseen.

  The heads of `k` are side by side, see `tpu.heads`.
  """
  _, N, _, HR = q.shape
  bT, bS, bN = tiles.bT, tiles.target_bS, tiles.bN
  place, seen = _walk(chunk, bS)
  part = math.gcd(bS, _PART)
  scale *= math.log2(math.e)
  lane = lambda n: pl.multiple_of(heads.place(n, HR), heads.LANES)

  def body(place, q, k, bias, start, end, target):
    group = pl.program_id(2)

    @pl.when(group == 0)
    def _():
      target[...] = jnp.zeros_like(target)

    @pl.loop(0, bN)
    def _(n):
      head = group * bN + n
      bias_1T = bias[0, pl.ds(head, 1)]
      its_lane = pl.multiple_of(lane(head) - lane(group * bN), heads.LANES)
      lanes = pl.ds(its_lane, heads.width(HR))

      @pl.loop(0, bS, step=part)
      def _(first):
        keys = pl.ds(pl.multiple_of(first, part), part)
        logits_ST = scale * _dot(k[keys, lanes], q[0, n], _NT)
        target[keys] += jnp.exp2(logits_ST + bias_1T)

    @pl.when(group == N // bN - 1)
    def _():
      visible_ST = _visible(place, start, end, bS)
      target[...] = jnp.where(visible_ST, target[...] / N, 0.0)

  row = pl.BlockSpec((1, bT), lambda i, j, n, place: (0, i))
  return _kernel(
    body,
    "target",
    f"q{bT}_k{bS}_n{bN}",
    (tiles.cores, seen, N // bN),
    in_specs=[
      pl.BlockSpec(
        (1, bN, bT, heads.width(HR)),
        lambda i, j, n, place: (place[0], n, place[1] * tiles.cores + i, 0),
      ),
      pl.BlockSpec(
        (pl.Squeezed(), pl.Element(bS), pl.Element(heads.width(HR, bN))),
        lambda i, j, n, place: (place[0], bS * (place[2] + j), lane(n * bN)),
      ),
      _queries((N, bT), tiles),
      *(row, row),
    ],
    out_specs=_pairs(bS, bT),
    out_shape=jax.ShapeDtypeStruct((width, tiles.chunk), _f32),
  )(place, heads.queries(q), k, bias, chunk.start, chunk.end)


def gradients(
  q_index: Float[Array, "B M T I"],
  weighted_q: Float[Array, "B M T I"],
  k_index: Float[Array, "B S I"],
  scores: Float[Array, "S chunk"],
  lse: Float[Array, "1 chunk"],
  target: Float[Array, "S chunk"],
  d_loss: Float[Array, "1 chunk"],
  d_k: Float[Array, "cores S I"],
  chunk: Chunk,
  tiles: Tiles,
) -> tuple[Float[Array, "M I chunk"], Float[Array, "cores S I"]]:
  """Computes the sums over keys and over queries, of active heads.

  With d scores = (exp(scores - lse) - target) d_loss, rounded as q_index is:

    the sum over keys of d scores k_index
    d_k + the sum over queries and heads of d scores weighted_q
  """
  _, M, _, I = q_index.shape
  bT, bS = tiles.bT, tiles.bS
  dtype = q_index.dtype
  place, seen = _walk(chunk, bS)

  def body(*refs):
    place, q, weighted_q, k, k_turned, scores, lse, target, d_loss = refs[:9]
    start, end, d_k_before, sums, d_k, d_scores = refs[9:]

    @pl.when(pl.program_id(1) == 0)
    def _():
      sums[...] = jnp.zeros_like(sums)

    visible_ST = _visible(place, start, end, bS)
    gap_ST = jnp.exp(scores[...] - lse[...]) - target[...]
    d_scores[...] = jnp.where(visible_ST, gap_ST * d_loss[...], 0.0)
    d_k[...] = d_k_before[...]

    @pl.loop(0, M)
    def _(m):
      similarity_ST = _dot(k[0], q[0, m], _NT)
      g_ST = jnp.where(similarity_ST > 0, d_scores[...], 0.0).astype(dtype)
      d_k[0] += _dot(g_ST, weighted_q[0, m], _NN)
      sums[m] += _dot(k_turned[0], g_ST, _NN)

  row = pl.BlockSpec((1, bT), lambda i, j, place: (0, i))
  key_sums = pl.BlockSpec((1, bS, I), lambda i, j, place: (i, place[2] + j, 0))
  return _kernel(
    body,
    "gradients",
    f"q{bT}_k{bS}",
    (tiles.cores, seen),
    in_specs=[
      *[_queries((M, bT, I), tiles, pl.Buffered(1))] * 2,
      pl.BlockSpec((1, bS, I), lambda i, j, place: (place[0], place[2] + j, 0)),
      pl.BlockSpec((1, I, bS), lambda i, j, place: (place[0], 0, place[2] + j)),
      *(_pairs(bS, bT), row, _pairs(bS, bT), row, row, row, key_sums),
    ],
    out_specs=[
      pl.BlockSpec(
        (M, I, bT),
        lambda i, j, place: (0, 0, i),
        pipeline_mode=pl.Buffered(1),
      ),
      key_sums,
    ],
    out_shape=[
      jax.ShapeDtypeStruct((M, I, tiles.chunk), _f32),
      jax.ShapeDtypeStruct(d_k.shape, _f32),
    ],
    scratch_shapes=[pltpu.VMEM((bS, bT), _f32)],
    input_output_aliases={11: 1},
  )(
    *(place, q_index, weighted_q, k_index, k_index.swapaxes(1, 2)),
    *(scores, lse, target, d_loss, chunk.start, chunk.end, d_k),
  )


def _walk(chunk, bS):
  """Batch row, chunk and first tile of keys; number of tiles that it sees."""
  first, last = chunk.keys[0] // bS, -(-chunk.keys[1] // bS)
  place = jnp.concatenate([chunk.place, first[None]])
  return place, jnp.maximum(last - first, 1)


def _kernel(
  body, name, cut, grid, *, in_specs, out_specs, scratch_shapes=(), **kwargs
):
  """Builds a kernel, named by its tiles, of a chunk's place and arrays."""
  order = pltpu.PARALLEL, *[pltpu.ARBITRARY] * (len(grid) - 1)
  return pl.pallas_call(
    body,
    name=f"dense_indexer_loss_{name}_{cut}",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch_shapes,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=order, vmem_limit_bytes=tpu.chip().vmem
    ),
    interpret=tpu.interpret(),
    **kwargs,
  )


def _queries(shape, tiles, pipeline_mode=None):
  """Block of a core's queries of an array [B, heads, T] or [B, heads, T, I]."""

  def index_map(i, j, *place):
    *_, place = place
    tail = (0,) * (len(shape) - 2)
    return place[0], 0, place[1] * tiles.cores + i, *tail

  return pl.BlockSpec((1, *shape), index_map, pipeline_mode=pipeline_mode)


def _pairs(bS, bT):
  """Block of a tile of an array [S, chunk]."""
  return pl.BlockSpec((bS, bT), lambda i, j, *place: (place[-1][2] + j, i))


def _visible(place, start, end, bS):
  """Mask [bS, bT] of the keys of this tile that each query sees."""
  first = (place[2] + pl.program_id(1)) * bS
  shape = bS, start.shape[1]
  key_ST = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return (key_ST >= start[...]) & (key_ST < end[...])


def _dot(x, y, dimensions):
  exact = x.dtype == _f32
  return jax.lax.dot_general(
    x,
    y,
    dimensions,
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=_f32,
  )
