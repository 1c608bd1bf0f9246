"""Gathers and scatter-adds rows of device memory with one warpgroup.

TMA on Hopper moves boxes of neighbouring rows only. Here each thread copies, or
adds, its own few bytes of arbitrary rows.
"""

import math
from typing import Any, Final

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import memref
from jaxlib.mlir.dialects import nvvm
from jaxlib.mlir.dialects import vector
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import ptx

# Layout of bf16 tiles in shared memory for WGMMA: 8 rows of 128 bytes each form
# an atom, whose 16-byte chunks are permuted within their row.
SWIZZLED: Final = (
  plgpu.TilingTransform((8, 64)),
  plgpu.SwizzleTransform(128),
)
ROWS: Final = 64
"""Rows per tile."""
SHARED_MEMORY: Final = 224 * 1024
"""Shared memory of a block in bytes, less the compiler's share."""
_CHUNK: Final = 16
_DYNAMIC: Final = -(2**31)


def _extended(value: ir.Value) -> ir.Value:
  """Extends to 64 bits."""
  return arith.extui(ir.IntegerType.get_signless(64), value)


def _plus(pointer: ir.Value, num_bytes: ir.Value | int) -> ir.Value:
  known = isinstance(num_bytes, int)
  dynamic, static = ([], [num_bytes]) if known else ([num_bytes], [_DYNAMIC])
  return llvm.getelementptr(
    pointer.type,
    pointer,
    dynamic,
    static,
    ir.IntegerType.get_signless(8),
    llvm.GEPNoWrapFlags.none,
  )


def _global_pointer(ref: ir.Value) -> ir.Value:
  pointer = mgpu_utils.memref_ptr(ref)
  return llvm.addrspacecast(llvm.PointerType.get(1), pointer)


def _load_row_number(rows: ir.Value, i: ir.Value) -> ir.Value:
  return memref.load(rows, [arith.index_cast(ir.IndexType.get(), i)])


def tile(shape: tuple[int, ...]) -> Any:
  """Shared memory for bf16 tiles."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)


def numbers(
  indices: Int[Array, "*K"], num_rows: int, first: Int[Array, ""]
) -> Int[Array, "*K"]:
  """Row numbers of indices, counted from `first`; -1 if out of range."""
  real = (indices >= 0) & (indices < num_rows)
  return jnp.where(real, indices + first, -1)


def start_copy(
  source: Any,
  rows: Any,
  tile: Any,
  first: Int[Array, ""],
  column: int = 0,
) -> None:
  """Starts copying rows to a tile; rows of number -1 become 0.

  Args:
    source: [rows, columns] in device memory, bf16.
    rows: Numbers of rows, in shared memory, Int32.
    tile: [64, columns] in shared memory, `SWIZZLED`.
    first: Copy from `rows[first]` on.
    column: First column to copy.
  """

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.RefType(),
      plgpu.RefType(SWIZZLED),
      plgpu.Layout.WG_SPLAT,
    )
  )
  def copy(ctx, source, rows, tile, first):
    del ctx
    width = ir.MemRefType(source.type).shape[1]
    columns = math.prod(ir.MemRefType(tile.type).shape) // ROWS
    source, target = _global_pointer(source), mgpu_utils.memref_ptr(tile)
    # Neighbouring threads copy neighbouring chunks; a group of them has a row.
    chunks = 2 * columns // _CHUNK
    groups = 128 // chunks
    thread = ptx.thread()
    group = arith.divui(thread, ptx.i32(chunks))
    chunk = arith.remui(thread, ptx.i32(chunks))
    in_atom, atom = (
      arith.andi(group, ptx.i32(7)),
      arith.shrui(group, ptx.i32(3)),
    )
    atom = arith.muli(atom, ptx.i32(columns // 64))
    atom = arith.addi(atom, arith.shrui(chunk, ptx.i32(3)))
    swizzled = arith.xori(arith.andi(chunk, ptx.i32(7)), in_atom)
    place = arith.addi(
      arith.shli(atom, ptx.i32(10)),
      arith.addi(
        arith.shli(in_atom, ptx.i32(7)), arith.shli(swizzled, ptx.i32(4))
      ),
    )
    target = _plus(target, place)
    source = _plus(source, _extended(arith.shli(chunk, ptx.i32(4))))
    source = _plus(source, 2 * column)
    first = arith.addi(first.registers.item(), group)
    for i in range(0, ROWS, groups):
      row = _load_row_number(rows, arith.addi(first, ptx.i32(i)))
      real = arith.cmpi(arith.CmpIPredicate.sge, row, ptx.i32(0))
      row = arith.maxsi(row, ptx.i32(0))
      nvvm.cp_async_shared_global(
        _plus(target, 2 * columns * i),
        _plus(source, arith.muli(_extended(row), ptx.i64(2 * width))),
        _CHUNK,
        nvvm.LoadCacheModifierKind.CG,
        cp_size=arith.select(real, ptx.i32(_CHUNK), ptx.i32(0)),
      )

  copy(source, rows, tile, first)


def commit_copies() -> None:
  """Commits a group of copies, which may be empty."""

  @plgpu.inline_mgpu()
  def commit(ctx):
    del ctx
    nvvm.cp_async_commit_group()

  commit()


def wait_copies(in_flight: int) -> None:
  """Waits until at most `in_flight` groups are pending, in all threads.

  Afterwards every thread's copies are visible, also to WGMMA.
  """

  @plgpu.inline_mgpu()
  def wait(ctx):
    del ctx
    nvvm.cp_async_wait_group(in_flight)

  wait()
  plgpu.commit_smem()


def add(
  target: Any,
  rows: Any,
  tile: Float[Array, "64 columns"],
  first: Int[Array, ""],
  column: Int[Array, ""],
) -> None:
  """Adds a tile to rows in device memory; rows of number -1 are skipped.

  The order of the warpgroups' additions is not fixed.

  Args:
    target: [rows, columns] in device memory, f32.
    rows: Numbers of rows, in shared memory, Int32.
    tile: Accumulator to add, in the WGMMA layout.
    first: Add to `rows[first]` and those after it.
    column: Add to this column and those after it.
  """

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.RefType(),
      plgpu.Layout.WGMMA,
      plgpu.Layout.WG_SPLAT,
      plgpu.Layout.WG_SPLAT,
    )
  )
  def add_(ctx, target, rows, tile, first, column):
    del ctx
    columns, width = tile.shape[1], ir.MemRefType(target.type).shape[1]
    column = arith.shli(column.registers.item(), ptx.i32(2))
    target = _plus(_global_pointer(target), _extended(column))
    thread = ptx.thread()
    # For each 8 columns, four lanes hold two columns each of row `lane / 4` of
    # a warp's 16, and of the eighth row after it.
    warp, lane = (
      arith.shrui(thread, ptx.i32(5)),
      arith.andi(thread, ptx.i32(31)),
    )
    right, down = (
      arith.cmpi(
        arith.CmpIPredicate.ne, arith.andi(lane, ptx.i32(x)), ptx.i32(0)
      )
      for x in (1, 4)
    )
    # They swap until eight lanes hold 128 bytes of a row, which is the fastest
    # to add: first with the adjacent lane, to have four consecutive columns,
    # then with a lane of the row above or below.
    for bit, shift in ((1, 5), (2, 3), (4, 4)):
      part = arith.shli(arith.andi(lane, ptx.i32(bit)), ptx.i32(shift))
      target = _plus(target, _extended(part))
    row = arith.addi(
      arith.shli(warp, ptx.i32(4)),
      arith.andi(arith.shrui(lane, ptx.i32(2)), ptx.i32(6)),
    )
    row = arith.addi(row, first.registers.item())
    registers = tile.registers.reshape(columns // 8, 2)
    for half in range(2):
      pointers, wanted = [], []
      for below in range(2):
        place = arith.addi(row, ptx.i32(8 * half + below))
        number = _load_row_number(rows, place)
        wanted.append(arith.cmpi(arith.CmpIPredicate.sge, number, ptx.i32(0)))
        number = _extended(arith.maxsi(number, ptx.i32(0)))
        offset = arith.muli(number, ptx.i64(4 * width))
        pointers.append(_plus(target, offset))
      for i in range(0, columns // 8, 4):
        pairs = [_elements(x) for x in registers[i : i + 4, half]]
        left, further = (
          [value for both in _swap(x, y, right, 1) for value in both]
          for x, y in (pairs[:2], pairs[2:])
        )
        of_rows = _swap(left, further, down, 4)
        for x, pointer, is_wanted in zip(of_rows, pointers, wanted):
          _add_four(_plus(pointer, 32 * i), x, is_wanted)

  add_(target, rows, tile, first, column)


def _elements(register: ir.Value) -> list[ir.Value]:
  return [
    vector.extract(
      register,
      dynamic_position=[],
      static_position=ir.DenseI64ArrayAttr.get([i]),
    )
    for i in range(2)
  ]


def _swap(
  x: list[Any], y: list[Any], second: ir.Value, distance: int
) -> tuple[list[Any], list[Any]]:
  """Swaps between two lanes: the first gets both x, the `second` both y, in the
  order of the lanes."""
  theirs = [
    mgpu_utils.shfl_bfly(arith.select(second, a, b), distance)
    for a, b in zip(x, y, strict=True)
  ]
  first_has = [arith.select(second, a, b) for a, b in zip(theirs, x)]
  second_has = [arith.select(second, a, b) for a, b in zip(y, theirs)]
  return first_has, second_has


def _add_four(pointer: ir.Value, values: list[ir.Value], wanted: ir.Value):
  i32 = ir.IntegerType.get_signless(32)
  llvm.inline_asm(
    ir.Type.parse("!llvm.void"),
    [pointer, *values, arith.extui(i32, wanted)],
    "{ .reg .pred p; setp.ne.u32 p, $5, 0; "
    "@p red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4}; }",
    "l,f,f,f,f,r",
    has_side_effects=True,
  )
