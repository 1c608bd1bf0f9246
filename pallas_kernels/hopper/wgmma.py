"""Products on tensor cores, on the registers of single threads.

Pallas's `plgpu.wgmma` serves where an accumulator is an array. Here it is a
list of registers, so that a kernel decides which of them live how long.

An accumulator of 64 rows and n columns is n / 2 floats a thread: number
4 j + 2 h + e of lane 4 g + c of warp w is row 16 w + 8 h + g, column
8 j + 2 c + e.
"""

from collections.abc import Sequence
import dataclasses
from typing import Final

from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32

_SWIZZLES = {128: 1, 64: 2}
_FENCE: Final = "wgmma.fence.sync.aligned;"
_COMMIT: Final = "wgmma.commit_group.sync.aligned;"


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

  def tile(self, i: int) -> "Operand":
    """The same matrix, from its i-th tile within the rows on."""
    return dataclasses.replace(self, offset=self.offset + 8 * self.swizzle * i)


def start_of(place: Place) -> U32:
  """Address as descriptors hold it: in units of 16 bytes, modulo 2^18."""
  return U32(place.value).bits(4, 14)


def zeros(columns: int) -> list[F32]:
  """Zero accumulator of 64 rows."""
  return [F32(0.0)] * (columns // 2)


def fence(registers: Sequence[F32]) -> list[F32]:
  """Orders earlier uses of the registers before the products that follow."""
  return _through(_FENCE, registers)


def commit() -> None:
  """Makes a group of the products since the last."""
  threads.assembly(_COMMIT)


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
  starts = f"${2 * n}", f"${2 * n + 1}"
  for step in range(steps):
    text = _product(a, b, step, starts, 2 * n)
    args = [a.start.value, b.start.value]
    values = [x.value for x in acc]
    acc = [F32(x) for x in threads.assembly(text, args, through=values)]
  return list(acc)


def multiply_next(
  a: Operand,
  b: Operand,
  before: Sequence[F32],
  *,
  columns: int,
  tiles: int,
  is_8_bit: bool,
) -> tuple[list[F32], list[F32]]:
  """Starts a @ b, and waits for the product `before` it.

  One piece of assembly, so that nothing touches the registers before they are
  ready, and the product needs no zeros to accumulate into.

  Args:
    a: 64 rows. The contracted dimension lies within rows.
    b: Likewise, `columns` rows.
    before: Product that the last call started; empty if there is none.
    columns: Columns of the product.
    tiles: Tiles of the contracted dimension, of `swizzle` bytes.
    is_8_bit: Whether the numbers are float8_e4m3fn rather than bfloat16.

  Returns:
    `before`, complete; and the new product, which must not be read before the
    next one has been started or `wait` has waited for it.
  """
  n = columns // 2
  starts = [f"${n + 2 * len(before) + i}" for i in range(2)]
  steps = a.swizzle // 32
  products = [
    _product(
      *(a.tile(i // steps), b.tile(i // steps), i % steps, starts, columns),
      accumulates=i > 0,
      is_8_bit=is_8_bit,
    )
    for i in range(tiles * steps)
  ]
  wait = ["wgmma.wait_group.sync.aligned 1;"] if before else []
  registers = threads.assembly(
    "\n".join([_FENCE, *products, _COMMIT, *wait]),
    [a.start.value, b.start.value],
    [threads.f32()] * n,
    [x.value for x in before],
  )
  registers = [F32(x) for x in registers]
  return registers[n:], registers[:n]


def _product(
  a, b, step, starts, columns, *, accumulates=True, is_8_bit=False
) -> str:
  """PTX of a product over 32 bytes of the contracted dimension.

  Its registers from $0 on are the accumulator; `starts` are the operands'.
  """
  out = ", ".join(f"${i}" for i in range(columns // 2))
  kind = "k32.f32.e4m3.e4m3" if is_8_bit else "k16.f32.bf16.bf16"
  order = "" if is_8_bit else f", {int(a.transposed)}, {int(b.transposed)}"
  return (
    "{ .reg .pred yes; .reg .b32 low; .reg .b64 a, b; "
    f"{a.descriptor(step, 'a', starts[0])}"
    f"{b.descriptor(step, 'b', starts[1])}"
    f"setp.eq.u32 yes, 0, {int(not accumulates)}; "
    f"wgmma.mma_async.sync.aligned.m64n{columns}{kind} "
    f"{{{out}}}, a, b, yes, 1, 1{order}; }}"
  )
