"""Products on tensor cores, on the registers of single threads.

Pallas's `plgpu.wgmma` serves where an accumulator is an array. Here it is a
list of registers, so that a kernel decides which of them live how long.

An accumulator of 64 rows and n columns is n / 2 floats a thread: number
4 j + 2 h + e of lane 4 g + c of warp w is row 16 w + 8 h + g, column
8 j + 2 c + e.
"""

from collections.abc import Sequence
import dataclasses

from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32

_SWIZZLES = {128: 1, 64: 2}


@dataclasses.dataclass(frozen=True)
class Operand:
  """Matrix in shared memory; distances are in bytes."""

  start: U32
  """Result of `start_of` the array."""
  offset: int
  """From the array's start."""
  leading: int
  """Between tiles along the dimension that lies within a row."""
  stride: int
  """From 8 rows to the next 8."""
  swizzle: int
  """Bytes of a row that are swizzled together, 128 or 64."""
  step: int
  """From 32 bytes of the contracted dimension to the next."""
  transposed: bool = False
  """Whether the contracted dimension is that of rows."""

  def descriptor(self, step: int, name: str, start: str) -> str:
    """Makes the 64-bit register `name` from the one that holds `start`.

    In assembly, since LLVM would hoist all descriptors of a loop's body out of
    the loop, and they do not fit into registers.
    """
    low = (self.offset + step * self.step) >> 4 | (self.leading >> 4) << 16
    high = self.stride >> 4 | _SWIZZLES[self.swizzle] << 30
    return f"add.u32 low, {start}, {low}; mov.b64 {name}, {{low, {high}}}; "


def start_of(place: Place) -> U32:
  """Address as descriptors hold it: in units of 16 bytes, modulo 2^18."""
  return U32(place.value).bits(4, 14)


def zeros(columns: int) -> list[F32]:
  """Zero accumulator of 64 rows."""
  return [F32(0.0)] * (columns // 2)


def fence(registers: Sequence[F32]) -> list[F32]:
  """Orders earlier uses of the registers before the products that follow."""
  return _through("wgmma.fence.sync.aligned;", registers)


def commit() -> None:
  """Makes a group of the products since the last."""
  threads.assembly("wgmma.commit_group.sync.aligned;")


def wait(groups: int, registers: Sequence[F32]) -> list[F32]:
  """Waits until at most `groups` committed groups are pending.

  Returns:
    The registers, so that no use of them moves to before the wait.
  """
  return _through(f"wgmma.wait_group.sync.aligned {groups};", registers)


def _through(text, registers):
  values = [x.value for x in registers]
  return [F32(x) for x in threads.assembly(text, through=values)]


def multiply(
  acc: Sequence[F32], a: Operand, b: Operand, steps: int
) -> list[F32]:
  """Starts acc += a @ b, bfloat16, over 16 * steps of the contracted
  dimension."""
  n = len(acc)
  out = ", ".join(f"${i}" for i in range(n))
  for step in range(steps):
    text = (
      "{ .reg .pred yes; .reg .b32 low; .reg .b64 a, b; "
      f"{a.descriptor(step, 'a', f'${2 * n}')}"
      f"{b.descriptor(step, 'b', f'${2 * n + 1}')}"
      "setp.eq.u32 yes, 0, 0; "
      f"wgmma.mma_async.sync.aligned.m64n{2 * n}k16.f32.bf16.bf16 "
      f"{{{out}}}, a, b, yes, 1, 1, "
      f"{int(a.transposed)}, {int(b.transposed)}; }}"
    )
    args = [a.start.value, b.start.value]
    values = [x.value for x in acc]
    acc = [F32(x) for x in threads.assembly(text, args, through=values)]
  return list(acc)
