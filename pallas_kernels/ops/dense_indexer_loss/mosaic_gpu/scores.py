"""Index scores and bits of active heads, for one chunk of queries.

A tile of 128 queries x 128 keys loops over the indexer's heads; the scores stay
in registers. A cluster of two blocks shares the queries. The gradients need of
a head's similarity only whether it is active, q.k > 0: one bit, saved here in
place of another multiplication.
"""

import functools
from typing import Any, Final

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import math as math_dialect
from jaxlib.mlir.dialects import vector
import numpy as np

from pallas_kernels.hopper import ping_pong
from pallas_kernels.hopper import ptx
from pallas_kernels.hopper import registers

bT: Final = 128
bS: Final = 128
HEADS: Final = 64
_STAGES: Final = 5
# Heads per word of bits; even heads are in its low half.
WORD: Final = 32


def n_tiles(chunk: int, width: int) -> tuple[int, int]:
  """Numbers of tiles of queries, and of keys, several of them per cluster."""
  return chunk // bT, width // bS


def scratch(dtype) -> tuple[Any, ...]:
  """Scratch of one block, for `tile`."""
  transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  smem = lambda shape: plgpu.SMEM(shape, dtype, transforms=transforms)
  return (
    smem((_STAGES, bT, 128)),
    smem((bS, 128)),
    plgpu.Barrier(),
    plgpu.Barrier(num_barriers=_STAGES),
    plgpu.ClusterBarrier(
      collective_axes=("cluster",), num_arrivals=2, num_barriers=_STAGES
    ),
  )


def tile(inputs, outputs, row, i_s, q_s, k_s, k_full, full, free) -> None:
  """Writes one tile; called by all warpgroups of a cluster's blocks.

  Args:
    inputs: Refs of q_index [B, T, 64, 128], k_index [B, S, 128], half of the
      head weights [B, 64, T], place: batch row and first query of the chunk,
      start and end [chunk]: the first key that a query sees, and one past the
      last.
    outputs: Refs of scores [chunk, width], -inf where a query does not see a
      key; bits of active heads [2, chunk, width], `WORD` heads to a word: bit
      h // 2 for head h if even, 16 + h // 2 if odd, 0 where a query does not
      see a key; the maximum score [nS, chunk] of each tile of keys, and the
      sum of exponentials relative to it.
    row: First query of the tile, in the chunk; the same in both blocks of a
      cluster.
    i_s: Index of the tile of keys; different in the two blocks.
    q_s: Like the arguments after it, scratch.
  """
  q, k, w, place, start, end = inputs
  scores, active, top, total = outputs
  wg = lax.axis_index("wg")
  batch, query = place[0], pl.multiple_of(place[1], bT) + row
  key = i_s * bS

  @pl.when(wg == 2)
  def _load():
    plgpu.set_max_registers(40, action="decrease")
    plgpu.copy_gmem_to_smem(k.at[batch, pl.ds(key, bS)], k_s, k_full)

    def step(i, _):
      slot = lax.rem(i, _STAGES)
      pl.when(i >= _STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))

      @pl.when(i < HEADS)
      def _():
        plgpu.copy_gmem_to_smem(
          q.at[batch, pl.ds(query, bT), _head(i)],
          q_s.at[slot],
          full.at[slot],
          collective_axes="cluster",
        )

    # A block stays until the other has sent its last signal.
    lax.fori_loop(0, HEADS + _STAGES, step, None)

  @pl.when(wg < 2)
  def _compute():
    plgpu.set_max_registers(232, action="increase")
    mine, rows = pl.ds(wg * 64, 64), pl.ds(row + wg * 64, 64)
    load_T = functools.partial(
      plgpu.load, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
    )
    over_keys = lambda x: lax.broadcast_in_dim(x, (64, bS), [0])
    zeros = lambda dtype: plgpu.layout_cast(
      jnp.zeros((64, bS), dtype), plgpu.Layout.WGMMA
    )
    ping_pong.start(wg)
    plgpu.barrier_wait(k_full)

    def head(i, carry):
      w_T = load_T(w.at[batch, _head(i), pl.ds(query + wg * 64, 64)])
      slot = lax.rem(i, _STAGES)

      def multiply(similarity):
        plgpu.barrier_wait(full.at[slot])
        ping_pong.wait(wg)
        for part in range(2):
          half = pl.ds(part * 64, 64)
          plgpu.wgmma(
            similarity,
            q_s.at[slot, mine, half],
            k_s.at[:, half].transpose((1, 0)),
          )
        # The other begins when half is done: tensor cores serve both equally.
        plgpu.wgmma_wait(1)
        ping_pong.signal(1 - wg)
        return similarity[...]

      similarity_TS = pl.run_scoped(multiply, plgpu.ACC((64, bS), jnp.float32))
      plgpu.barrier_arrive(free.at[slot])
      return _add_head(similarity_TS, over_keys(w_T), *carry)

    key_TS = key + plgpu.broadcasted_iota(
      jnp.int32, (64, bS), 1, layout=plgpu.Layout.WGMMA
    )
    visible = lambda: (
      (key_TS >= over_keys(load_T(start.at[rows])))
      & (key_TS < over_keys(load_T(end.at[rows])))
    )
    scores_TS = zeros(jnp.float32)
    for word in range(HEADS // WORD):
      bits = []
      for parity in range(2):
        i = (2 * word + parity) * WORD // 2
        scores_TS, bits_TS = lax.fori_loop(
          i, i + WORD // 2, head, (scores_TS, zeros(jnp.int16))
        )
        bits.append(bits_TS)
      active[word, rows, pl.ds(key, bS)] = jnp.where(
        visible(), _words(*bits), 0
      )

    scores_TS = jnp.where(visible(), scores_TS, -jnp.inf)
    scores[rows, pl.ds(key, bS)] = scores_TS
    top_T = scores_TS.max(1)
    top[i_s, rows] = top_T
    finite_T = jnp.where(top_T == -jnp.inf, 0.0, top_T)
    total[i_s, rows] = jnp.exp(scores_TS - over_keys(finite_T)).sum(1)


def no_tile(outputs, row, i_s) -> None:
  """Replaces `tile` where no query sees a key."""
  _, _, top, total = outputs
  wg = lax.axis_index("wg")

  @pl.when(wg < 2)
  def _():
    rows = pl.ds(row + wg * 64, 64)
    for x, ref in ((-jnp.inf, top), (0.0, total)):
      ref[i_s, rows] = plgpu.layout_cast(
        jnp.full((64,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
      )


def _head(i):
  """Head of step i: of each word the even heads, then the odd ones, the highest
  first, since each bit shifts the earlier ones to the left."""
  group, i = lax.div(i, WORD // 2), lax.rem(i, WORD // 2)
  highest = WORD - 2 + lax.rem(group, 2)
  return lax.div(group, 2) * WORD + highest - 2 * i


def _add_head(similarity_TS, half_w_TS, scores_TS, bits_TS):
  """Adds half_w (x + |x|) to the scores, shifts the bit of x > 0 into bits."""
  layout = plgpu.Layout.WGMMA

  @plgpu.inline_mgpu(
    arg_types=(layout,) * 4,
    return_type=tuple(
      registers.matrix(bS, dtype) for dtype in (jnp.float32, jnp.int16)
    ),
  )
  def add(ctx, similarity, half_w, scores, bits):
    del ctx
    new_scores = np.empty_like(scores.registers)
    new_bits = np.empty_like(bits.registers)
    one = ptx.i32(0x00010001)
    for at in np.ndindex(similarity.registers.shape):
      pair, twice = scores.registers[at], []
      for e in range(2):
        x, w, old = (
          vector.extract(y.registers[at], [], [e])
          for y in (similarity, half_w, scores)
        )
        twice.append(arith.addf(x, math_dialect.absf(x)))
        new = math_dialect.fma(w, twice[-1], old)
        pair = vector.insert(new, pair, [], [e])
      new_scores[at] = pair
      # The upper halves of two f32: positive or 0, as integers too.
      halves = registers.asm(
        "prmt.b32 $0, $1, $2, 0x7632;",
        *(arith.bitcast(registers.i32(), x) for x in twice),
      )
      bit = registers.asm("min.u16x2 $0, $1, $2;", halves, one)
      old = registers.from_pair(bits.registers[at])
      new_bits[at] = registers.to_pair(
        arith.addi(arith.addi(old, old), bit), ir.IntegerType.get_signless(16)
      )
    array = functools.partial(mgpu.FragmentedArray, _layout=scores.layout)
    return (
      array(_registers=new_scores, _is_signed=None),
      array(_registers=new_bits, _is_signed=True),
    )

  return add(similarity_TS, half_w_TS, scores_TS, bits_TS)


def _words(even_TS, odd_TS):
  """Joins the bits of even heads, low, and odd ones, high."""

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,) * 2,
    return_type=registers.matrix(bS, jnp.int32),
  )
  def join(ctx, even, odd):
    del ctx
    words = np.empty_like(even.registers)
    for at in np.ndindex(words.shape):
      halves = (
        registers.from_pair(even.registers[at]),
        registers.from_pair(odd.registers[at]),
      )
      low = registers.asm("prmt.b32 $0, $1, $2, 0x5410;", *halves)
      high = registers.asm("prmt.b32 $0, $1, $2, 0x7632;", *halves)
      words[at] = vector.from_elements(
        ir.VectorType.get((2,), registers.i32()), [low, high]
      )
    return mgpu.FragmentedArray(
      _registers=words, _layout=even.layout, _is_signed=True
    )

  return join(even_TS, odd_TS)
