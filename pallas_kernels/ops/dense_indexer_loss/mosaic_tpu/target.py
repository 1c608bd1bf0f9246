"""Target of a chunk of queries on TPUs: the mean of the attention's weights."""

import dataclasses
import functools
import math
from typing import Any, Final

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import softmax
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import (
  chunks as chunks_lib,
)
from pallas_kernels.tpu import heads
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products

_PART: Final = 512  # keys per stretch of straight-line code


def vmem_bytes(tiles: chunks_lib.Tiles, N: int, HR: int, itemsize: int) -> int:
  """Bytes of VMEM of the kernel."""
  bT, bS = tiles.bT, tiles.target_bS
  of_queries = tiles.bN * bT * heads.width(HR)
  of_keys = bS * heads.width(HR, tiles.bN)
  given = 2 * itemsize * (of_queries + of_keys) + 2 * 4 * N * bT
  given += products.exact_bytes((bT + _PART) * heads.width(HR), itemsize)
  return given + 2 * 4 * bS * bT + 2 * 4 * tiles.bS * bT


def target(
  q: Float[Array, "B N T HR"],
  k: Float[Array, "B S lanes"],
  bias: Float[Array, "B N T"],
  chunk: chunks_lib.Chunk,
  tiles: chunks_lib.Tiles,
  scale: float,
  width: int,
) -> Float[Array, "width chunk"]:
  """Computes the mean over heads of exp2(scale log2(e) q.k + bias); 0 unseen.

  The heads of `k` are side by side, see `tpu.heads`.
  """
  _, N, _, HR = q.shape
  bT, bS, bN = tiles.bT, tiles.target_bS, tiles.bN
  place, seen = chunk.walk(bS)
  return chunks_lib.call(
    f"target_q{bT}_k{bS}_n{bN}",
    functools.partial(_kernel, scale=scale * softmax.LOG2E, HR=HR),
    (tiles.cores, seen, N // bN),
    in_specs=[
      _Inputs(
        q=pl.BlockSpec(
          (1, bN, bT, heads.width(HR)),
          lambda i, j, n, place: (place[0], n, place[1] * tiles.cores + i, 0),
        ),
        k=pl.BlockSpec(
          (pl.Squeezed(), pl.Element(bS), pl.Element(heads.width(HR, bN))),
          lambda i, j, n, place: (
            *(place[0], bS * (place[2] + j)),
            _first_lane(n * bN, HR),
          ),
        ),
        bias=tiles.queries(N, bT),
        start=tiles.row(),
        end=tiles.row(),
      )
    ],
    out_specs=tiles.pairs(bS),
    out_shape=jax.ShapeDtypeStruct((width, tiles.chunk), jnp.float32),
  )(place, _Inputs(heads.queries(q), k, bias, chunk.start, chunk.end))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
  """What a step of the grid reads."""

  q: Any
  k: Any
  bias: Any
  start: Any
  end: Any


def _first_lane(head, HR):
  return pl.multiple_of(heads.place(head, HR), lanes.LANES)


def _kernel(place, given, target, *, scale, HR):
  """Adds some heads to a tile's target; after the last ones, masks it."""
  (_, bN, _, _), N, bS = given.q.shape, given.bias.shape[1], target.shape[0]
  part = math.gcd(bS, _PART)
  group = pl.program_id(2)

  @pl.when(group == 0)
  def _():
    target[...] = jnp.zeros_like(target)

  @pl.loop(0, bN)
  def _(n):
    head = group * bN + n
    bias_1T = given.bias[0, pl.ds(head, 1)]
    lane = _first_lane(head, HR) - _first_lane(group * bN, HR)
    window = pl.ds(pl.multiple_of(lane, lanes.LANES), heads.width(HR))

    @pl.loop(0, bS, step=part)
    def _(first):
      keys = pl.ds(pl.multiple_of(first, part), part)
      k, q = given.k[keys, window], given.q[0, n]
      logits_ST = scale * products.dot(k, q, products.NT)
      target[keys] += jnp.exp2(logits_ST + bias_1T)

  @pl.when(group == N // bN - 1)
  def _():
    visible_ST = chunks_lib.visible(place, given.start, given.end, bS)
    target[...] = jnp.where(visible_ST, target[...] / N, 0.0)
