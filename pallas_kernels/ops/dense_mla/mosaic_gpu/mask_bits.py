"""Masks logits by bits, in the layout of a WGMMA accumulator.

A thread holds two rows of a tile, 8 apart, and two adjacent columns of every 8.
It reads the words of its rows from device memory and shifts them once, so that
all threads then test the same bit positions.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import vector
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels.hopper import ptx

_ROWS = 64


def _layout(n):
  return plgpu.Layout.WG_STRIDED((2 * n * 128,), n)


def load(mask_bits, row: Int[Array, ""], n: int) -> Int[Array, " threads"]:
  """Loads the mask bits of 64 rows into the threads that need them.

  Args:
    mask_bits: In device memory, int32[rows, n].
    row: The first row.
    n: Words per row, 2 or 4.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
    return_type=plgpu.ShapeDtypeStruct(
      (2 * n * 128,), jnp.dtype(jnp.int32), layout=_layout(n)
    ),
  )
  def emit(ctx, mask_bits, row):
    del ctx
    i32, i64 = (ir.IntegerType.get_signless(x) for x in (32, 64))
    thread = ptx.thread()
    # 16 rows a warp, 4 threads a row.
    warp = arith.shrui(thread, ptx.i32(5))
    mine = arith.shrui(arith.andi(thread, ptx.i32(31)), ptx.i32(2))
    mine = arith.addi(mine, arith.shli(warp, ptx.i32(4)))
    mine = arith.addi(mine, row.registers.item())
    bytes_ = arith.muli(arith.extui(i64, mine), ptx.i64(4 * n))
    base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(mask_bits))
    address = arith.addi(base, bytes_)
    outputs = ", ".join(f"${i}" for i in range(n))
    registers = np.empty(2, object)
    for half in range(2):
      loaded = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * n),
        [address],
        f"ld.global.nc.v{n}.b32 {{{outputs}}}, [${n} + {half * 8 * 4 * n}];",
        ",".join(["=r"] * n + ["l"]),
        # Not to be moved: it is a prefetch, issued before the work that hides
        # its latency.
        has_side_effects=True,
      )
      assert isinstance(loaded, ir.Value)
      registers[half] = vector.from_elements(
        ir.VectorType.get((n,), i32),
        [llvm.extractvalue(i32, loaded, [i]) for i in range(n)],
      )
    return mgpu.FragmentedArray(
      _registers=registers,
      _layout=mgpu.WGStridedFragLayout((2 * n * 128,), n),
      _is_signed=True,
    )

  return emit(mask_bits, jnp.asarray(row, jnp.int32))


def apply(
  logits: Float[Array, "64 columns"], bits: Int[Array, " threads"]
) -> Float[Array, "64 columns"]:
  """Masks logits with -inf where the bit is clear; `bits` come from `load`."""
  columns = logits.shape[1]
  n = columns // 32

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, _layout(n)),
    return_type=plgpu.ShapeDtypeStruct(
      logits.shape, jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA
    ),
  )
  def emit(ctx, logits, bits):
    del ctx
    f32 = ir.F32Type.get()
    never = arith.constant(f32, ir.FloatAttr.get(f32, -np.inf))
    shift = arith.andi(ptx.thread(), ptx.i32(3))
    shift = arith.shli(shift, ptx.i32(1))
    shifted = [
      [arith.shrui(_element(register, i), shift) for i in range(n)]
      for register in bits.registers
    ]
    registers = np.empty_like(logits.registers)
    for at, (index, pair) in enumerate(np.ndenumerate(logits.registers)):
      eight, half = divmod(at, 2)
      word = shifted[half][eight // 4]
      kept = []
      for i in range(2):
        bit = arith.andi(word, ptx.i32(1 << 8 * (eight % 4) + i))
        yes = arith.cmpi(arith.CmpIPredicate.ne, bit, ptx.i32(0))
        kept.append(arith.select(yes, _element(pair, i), never))
      registers[index] = vector.from_elements(pair.type, kept)
    return mgpu.FragmentedArray(
      _registers=registers, _layout=logits.layout, _is_signed=None
    )

  return emit(logits, bits)


def _element(x, i):
  return vector.extract(x, dynamic_position=[], static_position=[i])
