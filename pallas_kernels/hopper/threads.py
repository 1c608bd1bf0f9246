"""Per-thread code in a Mosaic GPU kernel, written as arithmetic.

Pallas has arrays that a warpgroup holds together. Counting, ranking and
appending need individual threads: inside `plgpu.inline_mgpu`, each `U32`
here is a register of the thread that runs the code, and each operation on it
emits an instruction.
"""

from collections.abc import Callable
from collections.abc import Sequence
import struct
from typing import Any, Final

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import gpu
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import nvvm
from jaxlib.mlir.dialects import scf

WARP: Final = 32
_EVERY_LANE: Final = 2**32 - 1
_SIGN: Final = 2**31
MINUS_INFINITY: Final = struct.unpack("I", struct.pack("f", -float("inf")))[0]


def _i32() -> ir.Type:
  return ir.IntegerType.get_signless(32)


class Bool:
  """Predicate of one thread."""

  value: Any  # ir.Value

  def __init__(self, value: ir.Value):
    self.value = value

  def __and__(self, other: "Bool") -> "Bool":
    return Bool(arith.andi(self.value, other.value))

  def __or__(self, other: "Bool") -> "Bool":
    return Bool(arith.ori(self.value, other.value))

  def __invert__(self) -> "Bool":
    true = arith.constant(self.value.type, 1)
    return Bool(arith.xori(self.value, true))

  def number(self) -> "U32":
    return U32(arith.extui(_i32(), self.value))

  def where(self, yes: "U32 | int", no: "U32 | int") -> "U32":
    return U32(arith.select(self.value, U32(yes).value, U32(no).value))


class U32:
  """Unsigned 32-bit number of one thread; operations wrap around."""

  value: Any  # ir.Value

  def __init__(self, value: "U32 | ir.Value | int"):
    if isinstance(value, U32):
      value = value.value
    elif isinstance(value, int):
      signed = (value + 2**31) % 2**32 - 2**31
      value = arith.constant(_i32(), ir.IntegerAttr.get(_i32(), signed))
    self.value = value

  def _apply(self, op: Callable[..., Any], other: "U32 | int") -> "U32":
    return U32(op(self.value, U32(other).value))

  def __add__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.addi, other)

  __radd__ = __add__

  def __sub__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.subi, other)

  def __rsub__(self, other: int) -> "U32":
    return U32(other) - self

  def __floordiv__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.divui, other)

  def __mul__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.muli, other)

  def __and__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.andi, other)

  def __or__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.ori, other)

  def __xor__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.xori, other)

  def __invert__(self) -> "U32":
    return self ^ -1

  def __lshift__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.shli, other)

  def __rshift__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.shrui, other)

  def min(self, other: "U32 | int") -> "U32":
    return self._apply(arith.minui, other)

  def max(self, other: "U32 | int") -> "U32":
    return self._apply(arith.maxui, other)

  def signed_clamp(self, low: int, high: int) -> "U32":
    """Clamps the number as a signed one."""
    return self._apply(arith.minsi, high)._apply(arith.maxsi, low)

  def sign(self) -> "U32":
    """Broadcasts the highest bit: all ones if it is set, else 0."""
    return self._apply(arith.shrsi, 31)

  def float_order(self) -> "U32":
    """Maps a float's bits to a number of the same order; -0.0 equals 0.0."""
    f32 = ir.F32Type.get()
    zero = arith.constant(f32, 0.0)  # added to -0.0, it gives 0.0
    total = arith.addf(arith.bitcast(f32, self.value), zero)
    bits = U32(arith.bitcast(_i32(), total))
    return bits ^ (bits.sign() | _SIGN)

  def float_of_order(self) -> "U32":
    """Undoes `float_order`."""
    return self ^ (~self.sign() | _SIGN)

  def float_at_least(self, other: "U32") -> Bool:
    """Compares the bits as floats."""
    f32 = ir.F32Type.get()
    mine, others = (arith.bitcast(f32, x.value) for x in (self, other))
    return Bool(arith.cmpf(arith.CmpFPredicate.OGE, mine, others))

  def leading_zeros(self) -> "U32":
    return U32(
      mgpu_utils.inline_ptx("clz.b32 $0, $1;", self.value, result_types=_i32())
    )

  def bit_count(self) -> "U32":
    return U32(
      mgpu_utils.inline_ptx("popc.b32 $0, $1;", self.value, result_types=_i32())
    )

  def opaque(self) -> "U32":
    """Returns the same number, with its origin hidden from the compiler."""
    return U32(
      mgpu_utils.inline_ptx(
        "mov.b32 $0, $1;",
        self.value,
        result_types=_i32(),
        has_side_effects=True,
      )
    )

  def with_bit(self, bit: int, where: Bool) -> "U32":
    """Sets a bit, opaque to the compiler, which otherwise holds many registers
    of one bit each before it packs them."""
    return U32(
      mgpu_utils.inline_ptx(
        f"mov.b32 $0, $1; @$2 or.b32 $0, $0, {1 << bit};",
        *(self.value, where.value),
        result_types=_i32(),
      )
    )

  def _compare(self, predicate: arith.CmpIPredicate, other: "U32 | int"):
    return Bool(arith.cmpi(predicate, self.value, U32(other).value))

  def __lt__(self, other: "U32 | int") -> Bool:
    return self._compare(arith.CmpIPredicate.ult, other)

  def __le__(self, other: "U32 | int") -> Bool:
    return self._compare(arith.CmpIPredicate.ule, other)

  def __gt__(self, other: "U32 | int") -> Bool:
    return self._compare(arith.CmpIPredicate.ugt, other)

  def __ge__(self, other: "U32 | int") -> Bool:
    return self._compare(arith.CmpIPredicate.uge, other)

  def equals(self, other: "U32 | int") -> Bool:
    return self._compare(arith.CmpIPredicate.eq, other)


class Memory:
  """Consecutive words of shared memory, or of one row of a global array."""

  def __init__(self, ref: ir.Value, row: U32 | None = None):
    pointer = mgpu_utils.memref_ptr(ref)
    if mgpu_utils.is_smem_ref(ref):
      self._space, self._address_type = "shared", _i32()
    else:
      self._space = "global"
      self._address_type = ir.IntegerType.get_signless(64)
      pointer = llvm.addrspacecast(llvm.PointerType.get(1), pointer)
    self._base = llvm.ptrtoint(self._address_type, pointer)
    if row is not None:
      *_, words = ir.MemRefType(ref.type).shape
      self._base = self._at(self._base, row, 4 * words)

  def _at(self, base: ir.Value, index: U32, stride: int) -> ir.Value:
    offset = index.value
    if self._space == "global":
      offset = arith.extui(self._address_type, offset)
    offset = arith.muli(offset, arith.constant(self._address_type, stride))
    return arith.addi(base, offset)

  def _address(self, i: U32 | int) -> ir.Value:
    return self._at(self._base, U32(i), 4)

  def load(self, i: U32 | int) -> U32:
    [[word]] = self._load([U32(i)], 1)
    return word

  def load4s(self, starts: Sequence[U32]) -> Sequence[Sequence[U32]]:
    """Loads four neighbours from each start, a multiple of four.

    All loads are issued before any is waited for.
    """
    return self._load(starts, 4)

  def _load(self, starts: Sequence[U32], n: int) -> list[list[U32]]:
    code, type_ = "", "v4.b32" if n == 4 else "b32"
    for j in range(len(starts)):
      words = ", ".join(f"${j * n + e}" for e in range(n))
      code += f"ld.{self._space}.{type_} {{{words}}}, [${n * len(starts) + j}];"
    words = mgpu_utils.inline_ptx(
      code,
      *(self._address(i) for i in starts),
      result_types=[_i32()] * (n * len(starts)),
      has_side_effects=True,
    )
    words = [U32(word) for word in words]
    return [words[j * n :][:n] for j in range(len(starts))]

  def store(self, i: U32 | int, word: U32 | int, where: Bool | None = None):
    self._update("st", i, word, where)

  def add(self, i: U32 | int, word: U32 | int, where: Bool | None = None):
    """Adds atomically to a word."""
    self._update("red", i, word, where)

  def append(
    self, cursor: U32, words: Sequence[U32], flags: U32, bit: int, stride: int
  ) -> U32:
    """Stores the words at the cursor, `stride` words apart, where the bit is
    set, and advances the cursor. Shared memory only.

    A cursor is the result of `cursor` for an index.
    """
    n = len(words)
    stores = "".join(
      f"@p st.shared.b32 [$1 + {4 * stride * i}], ${3 + i};" for i in range(n)
    )
    return U32(
      mgpu_utils.inline_ptx(
        "{ .reg .pred p; .reg .b32 t;"
        f"and.b32 t, $2, {1 << bit}; setp.ne.u32 p, t, 0;"
        f"{stores} mov.b32 $0, $1; @p add.u32 $0, $0, 4; }}",
        *(x.value for x in (cursor, flags, *words)),
        result_types=_i32(),
        has_side_effects=True,
      )
    )

  def cursor(self, i: U32) -> U32:
    return U32(self._address(i))

  def _update(self, what: str, i: U32 | int, word: U32 | int, where):
    suffix = "add.u32" if what == "red" else "b32"
    mgpu_utils.inline_ptx(
      f"{what}.{self._space}.{suffix} [$0], $1;",
      self._address(i),
      U32(word).value,
      predicate=where.value if where is not None else None,
      has_side_effects=True,
    )


def thread() -> U32:
  """Index of this thread in its block."""
  return U32(mgpu_utils.thread_idx())


def warp() -> U32:
  return U32(mgpu_utils.warp_idx())


def lane() -> U32:
  return thread() & (WARP - 1)


def barrier() -> None:
  """Synchronises all threads of the block, and their writes."""
  gpu.barrier()


def when(condition: Bool) -> Callable[[Callable[[], None]], None]:
  """Decorates code that runs in the threads for which the condition holds."""

  def emit(body: Callable[[], None]) -> None:
    with mgpu_utils.when(condition.value):
      body()

  return emit


def loop(
  times: U32, body: Callable[..., Sequence[U32]], carried: Sequence[U32]
) -> list[U32]:
  """Runs `body(i, *carried)`, which returns what the next round carries."""
  zero, one = U32(0), U32(1)
  op = scf.ForOp(zero.value, times.value, one.value, [x.value for x in carried])
  with ir.InsertionPoint(op.body):
    i, *inner = (U32(x) for x in op.body.arguments)
    scf.yield_([x.value for x in body(i, *inner)])
  return [U32(x) for x in op.results]


def loop_while(
  condition: Callable[..., Bool],
  body: Callable[..., Sequence[U32]],
  carried: Sequence[U32],
) -> list[U32]:
  types = [x.value.type for x in carried]
  op = scf.WhileOp(types, [x.value for x in carried])
  before, after = (region.blocks.append(*types) for region in op.regions)
  with ir.InsertionPoint(before):
    scf.condition(
      condition(*map(U32, before.arguments)).value, before.arguments
    )
  with ir.InsertionPoint(after):
    scf.yield_([x.value for x in body(*map(U32, after.arguments))])
  return [U32(x) for x in op.results]


def _shuffle(kind: nvvm.ShflKind, x: U32, lane: int, clamp: int) -> U32:
  every, other, last = (U32(n).value for n in (_EVERY_LANE, lane, clamp))
  return U32(nvvm.shfl_sync(every, x.value, other, last, kind))


def last_lane(x: U32) -> U32:
  """Broadcasts the value of the warp's last lane."""
  return _shuffle(nvvm.ShflKind.idx, x, WARP - 1, WARP - 1)


def warp_sums(x: U32) -> U32:
  """Prefix sum over the lanes up to this one."""
  for distance in (1, 2, 4, 8, 16):
    before = _shuffle(nvvm.ShflKind.up, x, distance, 0)
    x = x + (lane() >= distance).where(before, 0)
  return x


def warp_sum(x: U32) -> U32:
  return U32(
    mgpu_utils.redux(
      x.value, U32(_EVERY_LANE).value, mgpu_utils.ReductionKind.ADD
    )
  )
