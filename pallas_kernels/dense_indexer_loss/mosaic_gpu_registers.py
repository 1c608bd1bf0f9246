"""What a thread does with the 32-bit registers of an array, inside a kernel."""

from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import vector


def matrix(columns: int, dtype: DTypeLike) -> plgpu.ShapeDtypeStruct:
  """Type of an array of 64 rows, spread over a warpgroup as wgmma has it."""
  return plgpu.ShapeDtypeStruct(
    (64, columns), jnp.dtype(dtype), layout=plgpu.Layout.WGMMA
  )


def i32() -> ir.Type:
  """The type of a register."""
  return ir.IntegerType.get_signless(32)


def asm(instruction: str, *args: ir.Value) -> ir.Value:
  """An instruction from registers, $1 and so on, to one, $0."""
  constraints = ",".join(["=r", *"r" * len(args)])
  result = llvm.inline_asm(i32(), list(args), instruction, constraints)
  assert isinstance(result, ir.Value)
  return result


def from_pair(pair: ir.Value) -> ir.Value:
  """A register that holds two numbers of 16 bits."""
  word = vector.bitcast(ir.VectorType.get((1,), i32()), pair)
  return vector.extract(word, [], [0])


def to_pair(word: ir.Value, element: ir.Type) -> ir.Value:
  """The two numbers of 16 bits that a register holds."""
  word = vector.from_elements(ir.VectorType.get((1,), i32()), [word])
  return vector.bitcast(ir.VectorType.get((2,), element), word)
