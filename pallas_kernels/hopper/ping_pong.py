"""Ping-pong barrier of two warpgroups: one multiplies while the other reduces.

Implemented with the block's named barriers, which cost less than barriers in
shared memory. Pallas uses the lower-numbered ones.
"""

from typing import Final

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Int

_FIRST: Final = 8
_THREADS: Final = 256


def start(wg: Int[Array, ""]) -> None:
  """Lets warpgroup 0 go first; both warpgroups call it."""
  pl.when(wg == 1)(lambda: signal(0))


def wait(wg: Int[Array, ""]) -> None:
  """Waits, as warpgroup `wg`, until the other has signalled it."""
  _barrier("bar.sync", wg)


def signal(wg: Int[Array, ""] | int) -> None:
  """Signals that `wg` may proceed, without waiting."""
  _barrier("bar.arrive", wg)


def _barrier(instruction, wg):
  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
  def emit(ctx, number):
    del ctx
    llvm.inline_asm(
      ir.Type.parse("!llvm.void"),
      [number.registers.item()],
      f"{instruction} $0, {_THREADS};",
      "r",
      has_side_effects=True,
    )

  emit(jnp.asarray(wg + _FIRST, jnp.int32))
