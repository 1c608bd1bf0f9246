"""Sparse attention's gradients on a TPU, over the same tiles as forward.

Weights are recomputed from lse, keys along sublanes, so that only dq takes a
transposed operand. Gradients of rows are summed in HBM, see `row_sums`.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import softmax
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products
from pallas_kernels.tpu import row_copies
from pallas_kernels.tpu import row_plan
from pallas_kernels.tpu import row_sums
from pallas_kernels.tpu import row_walk


def vmem_bytes(
  N: int, D: int, C: int, n_tiles: int, itemsize: int, tiles: row_plan.Tiles
) -> int:
  """Bytes of VMEM of the kernel, with double-buffered inputs and outputs."""
  bQ, bK, wide = tiles.bQ, tiles.bK, lanes.whole(D)
  rows = bQ * N
  given = itemsize * rows * (wide + C)
  given += 2 * 4 * 8 * bQ * lanes.whole(N)
  blocks = given + itemsize * rows * wide + 4 * bK * n_tiles
  row = row_copies.parts(D, itemsize) * lanes.LANES * 4
  scratch = bK * (2 * row + wide * itemsize + 2 * 4 * wide + 4 * lanes.LANES)
  scratch += given + 4 * rows * wide
  at_once = row_walk.queries_at_once(bQ, N) * N
  dots = 4 * (6 * bK * at_once + bK * wide + at_once * wide)
  return 2 * blocks + scratch + dots


def backward(
  q: Float[Array, "B T N D"],
  kv: Float[Array, "B S D"],
  walk: row_walk.Walk,
  lse: Float[Array, "B T N"],
  delta: Float[Array, "B T N"],
  d_out: Float[Array, "B T N C"],
  scale: float,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B S D"]]:
  """Computes the gradients of q and kv; kv's is float32.

  lse and delta are those of `softmax.lse_and_delta`.
  """
  (B, _, N, D), S = q.shape, kv.shape[1]
  C, bQ, bK = d_out.shape[3], walk.tiles.bQ, walk.tiles.bK
  pitch = lanes.whole(D) // lanes.LANES
  rows = row_copies.pack(kv, bK, pitch)
  sums = row_sums.zeros(rows, walk.cores)
  hbm = pl.BlockSpec(memory_space=pl.ANY)
  operands = (
    walk.lists(S, pitch),
    _Queries(q, d_out, lse[:, :, None], delta[:, :, None]),
    *(rows, sums),
  )
  d_q, sums = walk.call(
    "sparse_mla_backward",
    functools.partial(_kernel, scale=scale),
    in_specs=[
      walk.list_specs(),
      _Queries(
        q=walk.block(bQ, N, D),
        d_out=walk.block(bQ, N, C),
        lse=walk.block(bQ, 1, N),
        delta=walk.block(bQ, 1, N),
      ),
      *(hbm, hbm),
    ],
    out_specs=[walk.block(bQ, N, D), hbm],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(sums.shape, sums.dtype),
    ],
    input_output_aliases={len(jax.tree.leaves(operands)) - 1: 1},
    scratch_shapes=[
      _Scratch(
        stream=row_copies.scratch(D, kv.dtype, bK),
        queries=_Queries(
          q=pltpu.VMEM((bQ, N, D), q.dtype),
          d_out=pltpu.VMEM((bQ, N, C), q.dtype),
          lse=pltpu.VMEM((bQ, 1, N), jnp.float32),
          delta=pltpu.VMEM((bQ, 1, N), jnp.float32),
        ),
        codes=pltpu.VMEM((bK, lanes.LANES), jnp.int32),
        d_q=pltpu.VMEM((bQ, N, D), jnp.float32),
        sums=row_sums.scratch(D, bK),
      )
    ],
  )(*operands)
  return d_q, row_sums.total(sums, B, S, D)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Queries:
  """A block of queries, and what their gradients are computed from."""

  q: Any
  d_out: Any
  lse: Any
  delta: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scratch:
  """Scratch memory of the kernel."""

  stream: row_copies.Scratch
  queries: _Queries
  """Copy of the block's. The scalar unit computes a window's address, and
  products would wait for it while it starts copies. Scratch has a fixed
  address."""
  codes: Any
  """Codes of the current tile, [bK, 128], the same in all lanes."""
  d_q: Any
  sums: row_sums.Scratch


def _kernel(
  lists, queries, rows, _, d_q_ref, d_kv_ref, scratch, *, scale, interpret
):
  bQ, N, _ = d_q_ref.shape
  is_union, twice = lists.block[0, 1], lists.block[0, 2]
  stream = row_copies.Stream(lists, rows, scratch.stream, interpret)
  d_kv = row_sums.Sums(stream, d_kv_ref, pl.program_id(0), scratch.sums)
  d_rows = scratch.sums.added
  copies = jax.tree.leaves(scratch.queries)
  for source, target in zip(jax.tree.leaves(queries), copies, strict=True):
    target[...] = source[...]
  scratch.d_q[...] = jnp.zeros_like(scratch.d_q)
  stream.open()

  @pl.loop(0, stream.n_tiles)
  def _(tile):
    stream.read(tile)
    codes_1K = lists.codes[pl.ds(tile, 1)]
    scratch.codes[...] = jnp.broadcast_to(codes_1K, scratch.codes.shape[::-1]).T
    d_rows[...] = jnp.zeros_like(d_rows)
    d_kv.settle(tile)
    row_walk.visit(
      *(tile, stream, is_union, bQ, N),
      lambda _, first, n: _attend(scratch, first, n, scale),
      d_kv.start,
    )
    pl.when(twice == 1)(lambda: _share(codes_1K >> bQ, d_rows))
    d_kv.add(tile)

  d_kv.close()
  stream.close()
  d_q_ref[...] = scratch.d_q[...].astype(d_q_ref.dtype)


def _attend(scratch, first, n, scale):
  """Adds the gradients of `n` queries from `first` on, and of their keys."""
  queries, keys, d_q = scratch.queries, scratch.stream.keys, scratch.d_q
  d_rows, some = scratch.sums.added, pl.ds(first, n)
  (_, N, D), C = d_q.shape, queries.d_out.shape[2]
  q = queries.q[some].reshape(n * N, D)
  d_out = queries.d_out[some].reshape(n * N, C)
  across = lambda of: jnp.concatenate([of(i) for i in range(n)], 1)
  lse = across(lambda i: queries.lse[first + i]) * softmax.LOG2E
  delta = across(lambda i: queries.delta[first + i])
  shift = across(lambda i: jnp.full((1, N), first + i, jnp.int32))
  codes = jnp.concatenate([scratch.codes[...]] * pl.cdiv(n * N, lanes.LANES), 1)
  chosen = codes[:, : n * N] >> shift & 1
  logits = products.dot(keys[:, :D], q, products.NT)
  weights = jnp.exp2(logits * (scale * softmax.LOG2E) - lse)
  weights = jnp.where(chosen == 1, weights, 0.0)
  d_weights = products.dot(keys[:, :C], d_out, products.NT)
  d_logits = (scale * weights * (d_weights - delta)).astype(q.dtype)
  d_q[some] += products.dot(d_logits, keys[:, :D], products.TN).reshape(n, N, D)
  d_rows[:, :D] += products.dot(d_logits, q, products.NN)
  d_rows[:, :C] += products.dot(weights.astype(q.dtype), d_out, products.NN)


def _share(key_1K, d_rows):
  """Gives all entries of a key the sum over all of them, to be written."""
  bK = key_1K.shape[1]
  same = jnp.broadcast_to(key_1K, (bK, bK))
  same = (same == same.T).astype(jnp.float32)
  d_rows[...] = products.dot(same, d_rows[...], products.NN)
