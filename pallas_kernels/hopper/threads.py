"""Per-thread code in a Mosaic GPU kernel, written as arithmetic.

Pallas has arrays that a warpgroup holds together. Counting, ranking, gathering
and everything below Pallas's operations need individual threads: in a function
decorated by `code`, each `U32` or `F32` is a register of the thread that runs
it, and each operation on it emits an instruction.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import struct
from typing import Any, Final

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import gpu
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import math as math_dialect
from jaxlib.mlir.dialects import nvvm
from jaxlib.mlir.dialects import scf

WARP: Final = 32
WARPGROUP: Final = 128
REF: Final = plgpu.RefType()
NUMBER: Final = plgpu.Layout.WG_SPLAT
MINUS_INFINITY: Final = struct.unpack("I", struct.pack("f", -float("inf")))[0]
_EVERY_LANE: Final = 2**32 - 1
_SIGN: Final = 2**31


def code(*arg_types: Any, returns: Any = None) -> Callable[..., Any]:
  """Decorates code of single threads; a kernel calls it like a function.

  Args:
    *arg_types: Of each argument (or of a list's elements): `REF`, or a
      `plgpu.RefType` with the transforms of the reference: it gets an MLIR
      value; `NUMBER`, an int32 of all threads: it gets a `U32`; the layout of
      an array: it gets a `mgpu.FragmentedArray`, see `fragments`.
    returns: `plgpu.ShapeDtypeStruct` of the results. A `U32` may be returned
      for `a_number()`.
  """

  def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
    @plgpu.inline_mgpu(arg_types=arg_types, return_type=returns)
    def emit(_, *args):
      result = body(*jax.tree.map(_unwrapped, args, is_leaf=_is_array))
      return _splat(result) if isinstance(result, U32) else result

    @functools.wraps(body)
    def call(*args):
      return emit(*map(_int32, args, arg_types))

    return call

  return decorate


def a_number() -> Any:
  """Type of a result of `code` that is a `U32`."""
  return plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=NUMBER)


def _int32(x, arg_type):
  return jnp.asarray(x, jnp.int32) if arg_type is NUMBER else x


def _is_array(x):
  return isinstance(x, mgpu.FragmentedArray)


def _unwrapped(x):
  is_number = _is_array(x) and isinstance(x.layout, mgpu.WGSplatFragLayout)
  return U32(x.registers.item()) if is_number else x


def _splat(x):
  return mgpu.FragmentedArray.splat(x.value, (), is_signed=True)


def i32() -> ir.Type:
  return ir.IntegerType.get_signless(32)


def f32() -> ir.Type:
  return ir.F32Type.get()


def assembly(
  text: str,
  args: Sequence[ir.Value] = (),
  results: Sequence[ir.Type] = (),
  through: Sequence[ir.Value] = (),
  *,
  in_order: bool = True,
  convergent: bool = False,
) -> list[ir.Value]:
  """Emits PTX. Every instruction that MLIR has no operation for comes by here.

  Args:
    text: Its registers are $0, $1 and so on: first the results, then `through`
      (twice: as they come out, and as they go in), then `args`.
    args: Registers that are read.
    results: Types of registers that are written.
    through: Registers that are read and written.
    in_order: Whether it has an effect besides its results: then it is never
      dropped, nor moved across others of its kind.
    convergent: Whether the threads of a warp must run it together.

  Returns:
    The results, then what `through` holds afterwards.
  """
  outputs = [*results, *(x.type for x in through)]
  match outputs:
    case []:
      kind = ir.Type.parse("!llvm.void")
    case [single]:
      kind = single
    case _:
      kind = llvm.StructType.get_literal(outputs)
  constraints = [f"={_constraint(x)}" for x in outputs]
  constraints += [str(len(results) + i) for i in range(len(through))]
  constraints += [_constraint(x.type) for x in args]
  out = llvm.inline_asm(
    kind,
    [*through, *args],
    text,
    ",".join(constraints),
    has_side_effects=in_order,
    convergent=convergent,
  )
  if not outputs:
    return []
  assert isinstance(out, ir.Value)
  if len(outputs) == 1:
    return [out]
  return [llvm.extractvalue(x, out, [i]) for i, x in enumerate(outputs)]


def _constraint(kind: ir.Type) -> str:
  if isinstance(kind, ir.F32Type):
    return "f"
  return {1: "b", 32: "r", 64: "l"}[ir.IntegerType(kind).width]


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
    return U32(arith.extui(i32(), self.value))

  def where(self, yes: "U32 | int", no: "U32 | int") -> "U32":
    return U32(arith.select(self.value, U32(yes).value, U32(no).value))

  def where_float(self, yes: "F32 | float", no: "F32 | float") -> "F32":
    return F32(arith.select(self.value, F32(yes).value, F32(no).value))

  def in_any_lane(self) -> "Bool":
    """Whether it holds in some thread of the warp."""
    every = U32(_EVERY_LANE).value
    return Bool(nvvm.vote_sync(every, self.value, "any"))


class U32:
  """Unsigned 32-bit number of one thread; operations wrap around."""

  value: Any  # ir.Value

  def __init__(self, value: "U32 | ir.Value | int"):
    if isinstance(value, U32):
      value = value.value
    elif isinstance(value, int):
      signed = (value + 2**31) % 2**32 - 2**31
      value = arith.constant(i32(), ir.IntegerAttr.get(i32(), signed))
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

  def __mod__(self, other: "U32 | int") -> "U32":
    return self._apply(arith.remui, other)

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

  def bits(self, low: int, width: int) -> "U32":
    """Number that these bits hold."""
    return (self >> low) & ((1 << width) - 1)

  def min(self, other: "U32 | int") -> "U32":
    return self._apply(arith.minui, other)

  def max(self, other: "U32 | int") -> "U32":
    return self._apply(arith.maxui, other)

  def signed_max(self, other: int) -> "U32":
    return self._apply(arith.maxsi, other)

  def signed_clamp(self, low: int, high: int) -> "U32":
    """Clamps the number as a signed one."""
    return self._apply(arith.minsi, high)._apply(arith.maxsi, low)

  def sign(self) -> "U32":
    """Broadcasts the highest bit: all ones if it is set, else 0."""
    return self._apply(arith.shrsi, 31)

  def float(self) -> "F32":
    """Reads the bits as a float."""
    return F32(arith.bitcast(f32(), self.value))

  def float_order(self) -> "U32":
    """Maps a float's bits to a number of the same order; -0.0 equals 0.0."""
    zero = arith.constant(f32(), 0.0)  # added to -0.0, it gives 0.0
    total = arith.addf(arith.bitcast(f32(), self.value), zero)
    bits = U32(arith.bitcast(i32(), total))
    return bits ^ (bits.sign() | _SIGN)

  def float_of_order(self) -> "U32":
    """Undoes `float_order`."""
    return self ^ (~self.sign() | _SIGN)

  def float_at_least(self, other: "U32") -> Bool:
    """Compares the bits as floats."""
    mine, others = (arith.bitcast(f32(), x.value) for x in (self, other))
    return Bool(arith.cmpf(arith.CmpFPredicate.OGE, mine, others))

  def leading_zeros(self) -> "U32":
    return self._by("clz.b32 $0, $1;")

  def bit_count(self) -> "U32":
    return self._by("popc.b32 $0, $1;")

  def opaque(self) -> "U32":
    """Returns the same number, with its origin hidden from the compiler."""
    return self._by("mov.b32 $0, $1;", in_order=True)

  def with_bit(self, bit: int, where: Bool) -> "U32":
    """Sets a bit, opaque to the compiler, which otherwise holds many registers
    of one bit each before it packs them."""
    text = f"mov.b32 $0, $1; @$2 or.b32 $0, $0, {1 << bit};"
    return self._by(text, where)

  def pick_bytes(self, other: "U32", pattern: "U32 | int") -> "U32":
    """Picks four bytes of both numbers by the digits of a hexadecimal pattern,
    the lowest byte last: 0 to 3 are this one's, 4 to 7 the other's; plus 8, all
    of a byte's bits are its sign."""
    if isinstance(pattern, int):
      return self._by(f"prmt.b32 $0, $1, $2, {pattern:#06x};", other)
    return self._by("prmt.b32 $0, $1, $2, $3;", other, pattern)

  def min_halves(self, other: "U32") -> "U32":
    """Minimum of each half, as unsigned 16-bit numbers."""
    return self._by("min.u16x2 $0, $1, $2;", other)

  def times_halves(self, other: "U32") -> "U32":
    """Product of each half, as bfloat16."""
    return self._by("mul.rn.bf16x2 $0, $1, $2;", other)

  def positive_halves(self) -> "U32":
    """All ones in each half that is positive as bfloat16, else 0."""
    return self._by(
      "{ .reg .b32 zero; mov.b32 zero, 0; set.gt.u32.bf16x2 $0, $1, zero; }"
    )

  def _by(self, text: str, *others: "U32 | Bool", in_order: bool = False):
    args = [self.value, *(x.value for x in others)]
    return U32(assembly(text, args, [i32()], in_order=in_order)[0])

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

  def differs(self, other: "U32 | int") -> Bool:
    return self._compare(arith.CmpIPredicate.ne, other)

  def is_natural(self) -> Bool:
    """Whether it is at least 0 as a signed number."""
    return self._compare(arith.CmpIPredicate.sge, 0)


class F32:
  """Float of one thread."""

  value: Any  # ir.Value

  def __init__(self, value: "F32 | ir.Value | float"):
    if isinstance(value, F32):
      value = value.value
    elif isinstance(value, int | float):
      value = arith.constant(f32(), ir.FloatAttr.get(f32(), value))
    self.value = value

  def __add__(self, other: "F32") -> "F32":
    return F32(arith.addf(self.value, other.value))

  def __sub__(self, other: "F32") -> "F32":
    return F32(arith.subf(self.value, other.value))

  def __mul__(self, other: "F32") -> "F32":
    return F32(arith.mulf(self.value, other.value))

  def __abs__(self) -> "F32":
    return F32(math_dialect.absf(self.value))

  def max(self, other: "F32 | float") -> "F32":
    return F32(arith.maximumf(self.value, F32(other).value))

  def multiply_add(self, factor: "F32", term: "F32") -> "F32":
    """Computes self * factor + term, rounded once."""
    return F32(math_dialect.fma(self.value, factor.value, term.value))

  def pack(self, high: "F32") -> U32:
    """Packs this number and another as bfloat16 into one register."""
    text, args = "cvt.rn.bf16x2.f32 $0, $1, $2;", [high.value, self.value]
    return U32(*assembly(text, args, [i32()], in_order=False))

  def differs(self, other: "F32 | float") -> Bool:
    unequal = arith.CmpFPredicate.UNE
    return Bool(arith.cmpf(unequal, self.value, F32(other).value))

  def bits(self) -> U32:
    return U32(arith.bitcast(i32(), self.value))


def thread() -> U32:
  """Index of this thread in its block."""
  return U32(mgpu_utils.thread_idx())


def thread_of_warpgroup() -> U32:
  """Index of this thread in its warpgroup."""
  return thread() & (WARPGROUP - 1)


def warp() -> U32:
  return U32(mgpu_utils.warp_idx())


def lane() -> U32:
  return thread() & (WARP - 1)


def when(condition: Bool) -> Callable[[Callable[[], None]], None]:
  """Decorates code that runs in the threads for which the condition holds."""

  def emit(body: Callable[[], None]) -> None:
    with mgpu_utils.when(condition.value):
      body()

  return emit


def change_where[T](condition: Bool, change: Callable[[T], T], x: T) -> T:
  """Returns `change(x)` where the condition holds, else x; a warp in which it
  holds nowhere skips the change. Of arrays as `code` gets them."""
  values, tree = jax.tree.flatten(x)
  types = [value.type for value in values]
  op = scf.IfOp(condition.value, types, has_else=True)
  with ir.InsertionPoint(op.then_block):
    scf.yield_(jax.tree.leaves(change(x)))
  otherwise = op.else_block
  assert otherwise is not None
  with ir.InsertionPoint(otherwise):
    scf.yield_(values)
  return jax.tree.unflatten(tree, list(op.results))


def loop(
  times: U32, body: Callable[..., Sequence[Any]], carried: Sequence[Any]
) -> list[Any]:
  """Runs `body(i, *carried)`, which returns what the next round carries: `U32`s
  and `F32`s."""
  zero, one = U32(0), U32(1)
  kinds = [type(x) for x in carried]
  op = scf.ForOp(zero.value, times.value, one.value, [x.value for x in carried])
  with ir.InsertionPoint(op.body):
    i, *inner = op.body.arguments
    inner = [kind(x) for kind, x in zip(kinds, inner, strict=True)]
    scf.yield_([x.value for x in body(U32(i), *inner)])
  return [kind(x) for kind, x in zip(kinds, op.results, strict=True)]


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


def exchange(x: F32, distance: int) -> F32:
  """Gets the value of the lane whose index differs in this bit."""
  return _shuffle(nvvm.ShflKind.bfly, x.bits(), distance, WARP - 1).float()


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
  return _reduce(x, mgpu_utils.ReductionKind.ADD)


def warp_max(x: U32) -> U32:
  return _reduce(x, mgpu_utils.ReductionKind.UMAX)


def _reduce(x: U32, kind: mgpu_utils.ReductionKind) -> U32:
  return U32(mgpu_utils.redux(x.value, U32(_EVERY_LANE).value, kind))


def barrier() -> None:
  """Synchronises all threads of the block, and their writes."""
  gpu.barrier()
