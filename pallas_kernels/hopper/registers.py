"""Operations on the 32-bit registers of an array, inside a kernel."""

from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import vector


def matrix(columns: int, dtype: DTypeLike) -> plgpu.ShapeDtypeStruct:
  """Type of an array of 64 rows in the WGMMA layout."""
  return plgpu.ShapeDtypeStruct(
    (64, columns), jnp.dtype(dtype), layout=plgpu.Layout.WGMMA
  )


def i32() -> ir.Type:
  """Type of a register."""
  return ir.IntegerType.get_signless(32)


def asm(instruction: str, *args: ir.Value) -> ir.Value:
  """Emits an instruction from registers, $1 and so on, to register $0."""
  constraints = ",".join(["=r", *"r" * len(args)])
  result = llvm.inline_asm(i32(), list(args), instruction, constraints)
  assert isinstance(result, ir.Value)
  return result


def from_pair(pair: ir.Value) -> ir.Value:
  """Packs two 16-bit numbers into a register."""
  word = vector.bitcast(ir.VectorType.get((1,), i32()), pair)
  return vector.extract(word, [], [0])


def to_pair(word: ir.Value, element: ir.Type) -> ir.Value:
  """Unpacks a register into two 16-bit numbers."""
  word = vector.from_elements(ir.VectorType.get((1,), i32()), [word])
  return vector.bitcast(ir.VectorType.get((2,), element), word)
