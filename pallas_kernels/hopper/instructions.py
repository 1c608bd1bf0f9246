"""Arithmetic of single threads that stays where it is written.

Where registers are scarce, a kernel's order of instructions is part of its
design. LLVM moves and merges the arithmetic of `threads` as it sees fit; these
it neither moves across each other nor drops.
"""

from pallas_kernels.hopper import threads
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32


def thread() -> U32:
  """Index of this thread in its warpgroup, read anew at each use.

  What is computed from it in a loop stays in the loop, out of the registers
  that live through it.
  """
  text = "mov.u32 $0, %tid.x;"
  return U32(*threads.assembly(text, results=[threads.i32()])).bits(0, 7)


def zero() -> U32:
  """A 0 that no compiler knows, where the grid has fewer than 3 dimensions."""
  text = "mov.u32 $0, %ctaid.z;"
  return U32(*threads.assembly(text, results=[threads.i32()]))


def multiply_add(x: F32, y: F32, z: F32) -> F32:
  """Computes x y + z, rounded once."""
  return _float("fma.rn.f32 $0, $1, $2, $3;", x, y, z)


def exp2(x: F32) -> F32:
  """Computes 2^x, to about 22 bits; denormals are 0."""
  return _float("ex2.approx.ftz.f32 $0, $1;", x)


def log2(x: F32) -> F32:
  """Computes the base-2 logarithm, to about 22 bits."""
  return _float("lg2.approx.ftz.f32 $0, $1;", x)


def exchange(x: F32, distance: int) -> F32:
  """Gets the value of the lane whose index differs in this bit."""
  return _float(f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;", x)


def _float(text, *args):
  values = [x.value for x in args]
  return F32(*threads.assembly(text, values, [threads.f32()]))


def pack(low: F32, high: F32) -> U32:
  """Packs two numbers as bfloat16 into one register."""
  text = "cvt.rn.bf16x2.f32 $0, $1, $2;"
  args = [high.value, low.value]
  return U32(*threads.assembly(text, args, [threads.i32()]))


def unpack(pair: U32) -> tuple[F32, F32]:
  """Undoes `pack`."""
  return (pair << 16).float(), (pair & -(2**16)).float()
