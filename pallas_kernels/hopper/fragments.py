"""Registers of arrays that a warpgroup holds together, in the WGMMA layout.

Of a matrix with 64 rows, a thread holds rows r and r + 8 of its warp's 16, and
of every 8 columns the pair from 2 c on, for r = lane // 4 and c = lane % 4. Its
registers are ordered by eights of columns; for each, row r comes first, then
row r + 8. A register is a pair of adjacent columns; of 16-bit numbers it has 32
bits.
"""

from collections.abc import Sequence

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector
import numpy as np

from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32


def matrix(columns: int, dtype: DTypeLike) -> plgpu.ShapeDtypeStruct:
  """Type of a matrix of 64 rows that `threads.code` returns."""
  return plgpu.ShapeDtypeStruct(
    (tiles.ROWS, columns), jnp.dtype(dtype), layout=tiles.MATRIX
  )


def numbers(n: int) -> plgpu.ShapeDtypeStruct:
  """Type of n int32 numbers of each thread, in an array of no other meaning."""
  return plgpu.ShapeDtypeStruct(
    (n * threads.WARPGROUP,),
    jnp.dtype(jnp.int32),
    layout=plgpu.Layout.WG_STRIDED((n * threads.WARPGROUP,), n),
  )


def place() -> tuple[U32, U32, U32]:
  """Warp in the warpgroup, r, and c of this thread."""
  thread = threads.thread_of_warpgroup()
  lane = thread & (threads.WARP - 1)
  return thread >> 5, lane >> 2, lane & 3


def floats(array: mgpu.FragmentedArray) -> list[F32]:
  """Numbers of this thread in a float32 array, in order; of any layout."""
  return [
    F32(vector.extract(register, [], [i]))
    for register in array.registers.flat
    for i in range(ir.VectorType(register.type).shape[0])
  ]


def words(array: mgpu.FragmentedArray) -> list[U32]:
  """Registers of a bfloat16 or int16 array, and numbers of an int32 one."""
  return [U32(x) for register in array.registers.flat for x in _words(register)]


def _words(register):
  kind = ir.VectorType(register.type)
  n = kind.shape[0]
  if mgpu.utils.bitwidth(kind.element_type) == 16:
    n //= 2
    register = vector.bitcast(ir.VectorType.get((n,), threads.i32()), register)
  return [vector.extract(register, [], [i]) for i in range(n)]


def of_floats(numbers: Sequence[F32]) -> mgpu.FragmentedArray:
  """Matrix of float32, of this thread's numbers in order."""
  return _of_pairs(numbers, threads.f32(), None)


def of_integers(numbers: Sequence[U32]) -> mgpu.FragmentedArray:
  """Matrix of int32."""
  return _of_pairs(numbers, threads.i32(), True)


def of_numbers(numbers: Sequence[U32]) -> mgpu.FragmentedArray:
  """Array of the type `numbers`."""
  n = len(numbers)
  kind = ir.VectorType.get((n,), threads.i32())
  register = vector.from_elements(kind, [x.value for x in numbers])
  layout = mgpu.WGStridedFragLayout((n * threads.WARPGROUP,), n)
  return mgpu.FragmentedArray(
    _registers=np.array([register], object), _layout=layout, _is_signed=True
  )


def _of_pairs(numbers, element, is_signed):
  pair = ir.VectorType.get((2,), element)
  values = [x.value for x in numbers]
  starts = range(0, len(values), 2)
  registers = [vector.from_elements(pair, values[i : i + 2]) for i in starts]
  return _array(registers, is_signed)


def of_words(
  numbers: Sequence[U32], dtype: DTypeLike = jnp.bfloat16
) -> mgpu.FragmentedArray:
  """Matrix of bfloat16 or int16, two numbers a word."""
  is_signed = True if jnp.issubdtype(dtype, jnp.integer) else None
  element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
  one = ir.VectorType.get((1,), threads.i32())
  pair = ir.VectorType.get((2,), element)
  words = [vector.from_elements(one, [x.value]) for x in numbers]
  return _array([vector.bitcast(pair, x) for x in words], is_signed)


def _array(registers, is_signed):
  layout = mgpu.WGMMA_LAYOUT
  # Two registers for every 8 columns.
  shape = layout.registers_shape((tiles.ROWS, 4 * len(registers)))
  array = np.empty(len(registers), object)
  array[:] = registers
  return mgpu.FragmentedArray(
    _registers=array.reshape(shape), _layout=layout, _is_signed=is_signed
  )
