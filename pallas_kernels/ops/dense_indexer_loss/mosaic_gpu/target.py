"""Target of the dense loss: attention weights summed over heads, per chunk.

  p[t, s] = sum_n exp(scale q[t, n].k[s, n] - lse[t, n])

A thread block computes a tile of 128 queries x 192 keys. It loops over the
heads; the tile's sum stays in registers, queries and keys stream through shared
memory. A cluster of two blocks takes 256 queries and shares the keys. Two
warpgroups of 64 queries each ping-pong: one multiplies while the other computes
exponentials.
"""

import math
from typing import Any, Final

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.hopper import ping_pong

bT: Final = 128
bS: Final = 192
# Part of a head's width H + R that a pipeline stage holds.
_WIDTH: Final = 64
_STAGES: Final = 5
_LOG2E: Final = math.log2(math.e)


def n_tiles(chunk: int, width: int) -> tuple[int, int]:
  """Numbers of tiles of queries and of keys; the last may exceed the width."""
  return chunk // bT, pl.cdiv(width, bS)


def scratch(dtype) -> tuple[Any, ...]:
  """Scratch of one block, for `tile`."""
  transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  smem = lambda shape: plgpu.SMEM(shape, dtype, transforms=transforms)
  return (
    smem((_STAGES, bT, _WIDTH)),
    smem((_STAGES, bS, _WIDTH)),
    plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
    plgpu.ClusterBarrier(
      collective_axes=("cluster",), num_arrivals=2, num_barriers=_STAGES
    ),
  )


def tile(inputs, target, row, key, scale, q_s, k_s, full, free) -> None:
  """Writes one tile; called by all warpgroups of a cluster's blocks.

  Args:
    inputs: Refs of q [B, T, N, HR], k [B, S, N, HR], bias [B, N, T], which is
      -lse in base 2, and place: batch row and first query of the chunk.
    target: Ref of the sums [chunk, width].
    row: First query of the tile, in the chunk; different in the two blocks of a
      cluster.
    key: First key of the tile; the same in both blocks.
    scale: Scale of the logits.
    q_s: Like the arguments after it, scratch.
  """
  q, k, bias, place = inputs
  N, parts = q.shape[2], q.shape[3] // _WIDTH
  wg = lax.axis_index("wg")
  batch, query = place[0], pl.multiple_of(place[1], bT) + row

  @pl.when(wg == 2)
  def _load():
    plgpu.set_max_registers(40, action="decrease")

    def step(i, _):
      slot = lax.rem(i, _STAGES)
      pl.when(i >= _STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))

      @pl.when(i < N * parts)
      def _():
        n = lax.div(i, parts)
        part = pl.ds(lax.rem(i, parts) * _WIDTH, _WIDTH)
        plgpu.copy_gmem_to_smem(
          q.at[batch, pl.ds(query, bT), n, part], q_s.at[slot], full.at[slot]
        )
        plgpu.copy_gmem_to_smem(
          k.at[batch, pl.ds(key, bS), n, part],
          k_s.at[slot],
          full.at[slot],
          collective_axes="cluster",
        )

    # A block stays until the other has sent its last signal.
    lax.fori_loop(0, N * parts + _STAGES, step, None)

  @pl.when(wg < 2)
  def _compute():
    plgpu.set_max_registers(232, action="increase")
    mine = pl.ds(wg * 64, 64)
    ping_pong.start(wg)

    def head(n, sum_TS):
      bias_T = plgpu.load(
        bias.at[batch, n, pl.ds(query + wg * 64, 64)],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
      )

      def multiply(logits):
        ping_pong.wait(wg)
        for part in range(parts):
          slot = lax.rem(n * parts + part, _STAGES)
          plgpu.barrier_wait(full.at[slot])
          plgpu.wgmma(
            logits, q_s.at[slot, mine], k_s.at[slot].transpose((1, 0))
          )
          if part:
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(
              free.at[lax.rem(n * parts + part - 1, _STAGES)]
            )
        ping_pong.signal(1 - wg)
        return logits[...]

      logits_TS = pl.run_scoped(multiply, plgpu.ACC((64, bS), jnp.float32))
      plgpu.barrier_arrive(free.at[lax.rem(n * parts + parts - 1, _STAGES)])
      bias_TS = lax.broadcast_in_dim(bias_T, (64, bS), [0])
      return sum_TS + jnp.exp2(logits_TS * (scale * _LOG2E) + bias_TS)

    zeros_TS = plgpu.layout_cast(
      jnp.zeros((64, bS), jnp.float32), plgpu.Layout.WGMMA
    )
    sum_TS = lax.fori_loop(0, N, head, zeros_TS)
    target[pl.ds(row + wg * 64, 64), pl.ds(key, bS)] = sum_TS
