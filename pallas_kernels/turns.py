"""Two warpgroups that take turns: while one multiplies, the other reduces.

The order is kept by named barriers of the block, which cost less than those in
shared memory. Pallas uses the lower ones.
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
  """Gives warpgroup 0 the first turn; called by both."""
  pl.when(wg == 1)(lambda: give(0))


def take(wg: Int[Array, ""]) -> None:
  """Waits until the other warpgroup has given the turn to `wg`."""
  _barrier("bar.sync", wg)


def give(wg: Int[Array, ""] | int) -> None:
  """Gives the turn to `wg`, and goes on."""
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
