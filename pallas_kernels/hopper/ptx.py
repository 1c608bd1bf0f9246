"""Hopper instructions that Pallas does not expose, as inline PTX.

Functions are called inside a kernel of `plgpu.kernel`, by all 128 threads of a
warpgroup; those named `emit_*` inside `plgpu.inline_mgpu`, on MLIR values, by
any threads. Interpret mode cannot run them.

Barriers in shared memory (PTX: mbarrier) form an array, 8 bytes each: threads
that copy rows arrive at them individually, which Pallas's barriers do not
support.
"""

from collections.abc import Sequence

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax._src.lib.mlir.dialects import gpu
from jax._src.lib.mlir.dialects import llvm
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

SCALAR = plgpu.Layout.WG_SPLAT


def i32(value: int) -> ir.Value:
  """Makes a 32-bit constant."""
  return _constant(value, 32)


def i64(value: int) -> ir.Value:
  """Makes a 64-bit constant."""
  return _constant(value, 64)


def _constant(value, bits):
  kind = ir.IntegerType.get_signless(bits)
  return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def address(ref: ir.Value) -> ir.Value:
  """Shared-memory address of `ref`, 32 bits."""
  kind = ir.IntegerType.get_signless(32)
  return llvm.ptrtoint(kind, mgpu.memref_ptr(ref))


def thread() -> ir.Value:
  """Index of this thread in its warpgroup."""
  return arith.andi(mgpu.thread_idx(), i32(127))


def barriers_init(barriers, arrivals: Sequence[int]) -> None:
  """Initialises the barriers; every thread calls it once.

  Args:
    barriers: An int32 or float32 array in shared memory, 8 bytes a barrier.
    arrivals: Number of arrivals that complete a phase, for each barrier.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def emit(ctx, barriers):
    del ctx
    first = arith.cmpi(arith.CmpIPredicate.eq, mgpu.thread_idx(), i32(0))
    base = address(barriers)
    with mgpu.when(first):
      for i, count in enumerate(arrivals):
        mgpu.inline_ptx(
          "mbarrier.init.shared::cta.b64 [$0], $1;",
          *(arith.addi(base, i32(8 * i)), i32(count)),
          has_side_effects=True,
        )
      mgpu.inline_ptx(
        "fence.mbarrier_init.release.cluster;", has_side_effects=True
      )
    gpu.barrier()

  emit(barriers)


def emit_wait(barrier: ir.Value, parity: ir.Value) -> None:
  """Waits for the phase of this parity; `barrier` is an address."""
  mgpu.inline_ptx(
    """{
      .reg .pred done;
      again:
      mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;
      @!done bra again;
    }""",
    *(barrier, parity),
    has_side_effects=True,
  )


def emit_arrive(barrier: ir.Value) -> None:
  """Arrives at the barrier, once per thread that executes it."""
  mgpu.inline_ptx(
    "mbarrier.arrive.shared::cta.b64 _, [$0];", barrier, has_side_effects=True
  )


def barrier_wait(barriers, which: int, parity) -> None:
  """Waits, in every thread, for the phase of this parity."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
  def emit(ctx, barriers, parity):
    del ctx
    base = arith.addi(address(barriers), i32(8 * which))
    emit_wait(base, parity.registers.item())

  emit(barriers, jnp.asarray(parity, jnp.int32))


def barrier_arrive(barriers, which: int) -> None:
  """Arrives in every thread: 128 arrivals."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def emit(ctx, barriers):
    del ctx
    emit_arrive(arith.addi(address(barriers), i32(8 * which)))

  emit(barriers)


def meet(which: int, threads: int) -> None:
  """Waits until `threads` threads have arrived at barrier `which` (`bar.sync`).

  Pallas uses barriers 0 to 7.
  """

  @plgpu.inline_mgpu()
  def emit(ctx):
    del ctx
    mgpu.inline_ptx(
      f"bar.sync {which}, {threads};", has_side_effects=True, convergent=True
    )

  emit()


def announce(which: int, threads: int) -> None:
  """Arrives at a barrier of `meet` without waiting (`bar.arrive`)."""

  @plgpu.inline_mgpu()
  def emit(ctx):
    del ctx
    mgpu.inline_ptx(
      f"bar.arrive {which}, {threads};", has_side_effects=True, convergent=True
    )

  emit()


def fence_smem() -> None:
  """Makes this thread's stores visible to the tensor cores and TMA."""

  @plgpu.inline_mgpu()
  def emit(ctx):
    del ctx
    mgpu.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)

  emit()
