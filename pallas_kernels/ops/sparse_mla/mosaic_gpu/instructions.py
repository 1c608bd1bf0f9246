"""PTX instructions of single threads of the backward kernel, on Hopper.

Called inside `plgpu.inline_mgpu`. Numbers are MLIR values; an address in shared
memory has 32 bits, one in device memory 64. Instructions keep their order: the
assembly has side effects, so LLVM neither moves nor drops it.
"""

from collections.abc import Sequence
import dataclasses

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm

type Value = ir.Value


def i32() -> ir.Type:
  return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
  return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
  return ir.F32Type.get()


def integer(value: int, kind: ir.Type | None = None) -> Value:
  kind = kind or i32()
  return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def real(value: float) -> Value:
  return arith.constant(f32(), ir.FloatAttr.get(f32(), value))


def emit(
  ptx: str,
  constraints: str = "",
  args: Sequence[Value] = (),
  results: Sequence[ir.Type] = (),
) -> list[Value]:
  match len(results):
    case 0:
      kind = ir.Type.parse("!llvm.void")
    case 1:
      kind = results[0]
    case _:
      kind = llvm.StructType.get_literal(list(results))
  out = llvm.inline_asm(
    kind, list(args), ptx, constraints, has_side_effects=True
  )
  if not results:
    return []
  assert isinstance(out, ir.Value)
  if len(results) > 1:
    return [llvm.extractvalue(t, out, [i]) for i, t in enumerate(results)]
  return [out]


def emit_if(
  condition: Value, ptx: str, constraints: str, args: Sequence[Value]
) -> None:
  """Emits a predicated instruction; a `condition` of 0 is false."""
  emit(
    f"{{ .reg .pred yes; setp.ne.u32 yes, ${len(args)}, 0; @yes {ptx} }}",
    f"{constraints},r",
    [*args, condition],
  )


# --- whole numbers ---


def address(ref: Value) -> Value:
  """Address of an array in shared memory."""
  return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def pointer(ref: Value) -> Value:
  """Pointer to an array in device memory."""
  return llvm.ptrtoint(i64(), utils.memref_ptr(ref))


def add(x: Value, *ys: Value | int) -> Value:
  for y in ys:
    x = arith.addi(x, integer(y, x.type) if isinstance(y, int) else y)
  return x


def times(x: Value, n: int) -> Value:
  return arith.muli(x, integer(n, x.type))


def bits(x: Value, low: int, width: int) -> Value:
  return arith.andi(arith.shrui(x, integer(low)), integer((1 << width) - 1))


def long(x: Value) -> Value:
  return arith.extui(i64(), x)


def below(x: Value, n: int) -> Value:
  """Compares x < n, both unsigned, so that a negative x is not below."""
  return arith.cmpi(arith.CmpIPredicate.ult, x, integer(n))


def is_equal(x: Value, n: int) -> Value:
  return arith.cmpi(arith.CmpIPredicate.eq, x, integer(n))


def number(condition: Value) -> Value:
  """Converts a condition to 1 or 0."""
  return arith.extui(i32(), condition)


def thread() -> Value:
  """Index of this thread in its warpgroup, read anew at each use.

  What is computed from it in a loop stays in the loop, out of the registers
  that live through it.
  """
  return bits(emit("mov.u32 $0, %tid.x;", "=r", [], [i32()])[0], 0, 7)


# --- between the threads ---


def start_barrier(barrier: Value, arrivals: int, chosen: Value) -> None:
  emit_if(
    chosen, f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", "r", [barrier]
  )


def arrive(barrier: Value, chosen: Value) -> None:
  emit_if(chosen, "mbarrier.arrive.shared::cta.b64 _, [$0];", "r", [barrier])


def expect(barrier: Value, size: int, chosen: Value) -> None:
  """Arrives, and expects `size` bytes before the phase completes."""
  ptx = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};"
  emit_if(chosen, ptx, "r", [barrier])


def wait(barrier: Value, parity: Value) -> None:
  """Waits for the phase of this parity."""
  emit(
    "{ .reg .pred done; again${:uid}: "
    "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; "
    "@!done bra again${:uid}; }",
    "r,r",
    [barrier, parity],
  )


def meet(place: int, threads: int, *, stay: bool = True) -> None:
  """Arrives at a named barrier of `threads` threads; waits if `stay`."""
  emit(f"bar.{'sync' if stay else 'arrive'} {place}, {threads};")


def fence_async() -> None:
  """Makes this thread's stores visible to tensor cores and bulk copies.

  Waits for all its pending operations, additions to device memory included.
  """
  emit("fence.proxy.async.shared::cta;")


def exchange(x: Value, distance: int) -> Value:
  """Exchanges values with the lane whose index differs in this bit."""
  ptx = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
  return emit(ptx, "=f,f", [x], [f32()])[0]


# --- between the two blocks of a cluster ---


def rank() -> Value:
  return emit("mov.u32 $0, %cluster_ctarank;", "=r", [], [i32()])[0]


def there(here: Value) -> Value:
  """Same address in the other block's shared memory."""
  other = arith.xori(rank(), integer(1))
  ptx = "mapa.shared::cluster.u32 $0, $1, $2;"
  return emit(ptx, "=r,r,r", [here, other], [i32()])[0]


def arrive_there(barrier: Value, chosen: Value) -> None:
  """Arrives at the other block's barrier, without publishing stores to it."""
  ptx = "mbarrier.arrive.shared::cluster.b64 _, [$0];"
  emit_if(chosen, ptx, "r", [barrier])


def send(values: Sequence[Value], place: Value, offset: int, barrier: Value):
  """Stores four f32 in the other block; its barrier counts the bytes."""
  emit(
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
    f"[$0+{offset}], {{$1, $2, $3, $4}}, [$5];",
    "r,f,f,f,f,r",
    [place, *values, barrier],
  )


def send_bytes(
  source: Value, place: Value, size: int, barrier: Value, chosen: Value
) -> None:
  emit_if(
    chosen,
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
    f"[$0], [$1], {size}, [$2];",
    "r,r,r",
    [place, source, barrier],
  )


def meet_cluster() -> None:
  emit("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;")


# --- arithmetic and memory ---


def pack(x: Value, y: Value) -> Value:
  """Packs two f32 as bf16 in 32 bits, x in the lower half."""
  return emit("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [y, x], [i32()])[0]


def unpack(x: Value) -> tuple[Value, Value]:
  low = arith.bitcast(f32(), arith.shli(x, integer(16)))
  high = arith.bitcast(f32(), arith.andi(x, integer(-65536)))
  return low, high


def multiply_add(x: Value, y: Value, z: Value) -> Value:
  return emit("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], [f32()])[0]


def exp2(x: Value) -> Value:
  return emit("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], [f32()])[0]


def load(place: Value, offset: int, n: int = 1) -> list[Value]:
  """Loads n f32 from shared memory."""
  outs = ", ".join(f"${i}" for i in range(n))
  vector = f".v{n}" if n > 1 else ""
  outs = f"{{{outs}}}" if n > 1 else outs
  ptx = f"ld.shared{vector}.f32 {outs}, [${n}+{offset}];"
  return emit(ptx, ",".join(["=f"] * n + ["r"]), [place], [f32()] * n)


def load_integer(place: Value, offset: int) -> Value:
  ptx = f"ld.shared.b32 $0, [$1+{offset}];"
  return emit(ptx, "=r,r", [place], [i32()])[0]


def load_constant(place: Value, offset: int) -> Value:
  """Loads 32 bits of device memory that the kernel does not write."""
  ptx = f"ld.global.nc.b32 $0, [$1+{offset}];"
  return emit(ptx, "=r,l", [place], [i32()])[0]


# --- tensor cores ---


def _through(ptx: str, registers: Sequence[Value]) -> list[Value]:
  """Passes `registers` through, so that no use of them moves across."""
  n = len(registers)
  constraints = ",".join(["=f"] * n + [str(i) for i in range(n)])
  return emit(ptx, constraints, registers, [f32()] * n)


def wgmma_fence(registers: Sequence[Value]) -> list[Value]:
  return _through("wgmma.fence.sync.aligned;", registers)


def wgmma_commit() -> None:
  emit("wgmma.commit_group.sync.aligned;")


def wgmma_wait(groups: int, registers: Sequence[Value]) -> list[Value]:
  """Waits until at most `groups` committed groups are pending."""
  return _through(f"wgmma.wait_group.sync.aligned {groups};", registers)


@dataclasses.dataclass(frozen=True)
class Operand:
  """Matrix in shared memory; distances are in bytes."""

  start: Value  # address modulo 2^18 / 16
  offset: int
  leading: int
  stride: int
  swizzle: int
  step: int  # from 16 of the contracted dimension to the next 16
  transposed: bool

  def descriptor(self, step: int, name: str, start: str) -> str:
    """Makes the 64-bit register `name` from the one that holds `start`.

    In assembly, since LLVM would hoist all descriptors of a loop's body out of
    the loop, and they do not fit into registers.
    """
    low = (self.offset + step * self.step) >> 4 | (self.leading >> 4) << 16
    high = self.stride >> 4 | {128: 1, 64: 2}[self.swizzle] << 30
    return f"add.u32 low, {start}, {low}; mov.b64 {name}, {{low, {high}}}; "


def wgmma(
  acc: Sequence[Value], a: Operand, b: Operand, steps: int
) -> list[Value]:
  """Computes acc += a @ b over 16 * steps of the contracted dimension.

  acc[4 j + 2 h + e] of lane 4 g + c of warp w is row 16 w + 8 h + g, column
  8 j + 2 c + e.
  """
  n = len(acc)
  names = ", ".join(f"${i}" for i in range(n))
  constraints = ",".join(["=f"] * n + [str(i) for i in range(n)] + ["r", "r"])
  for step in range(steps):
    ptx = (
      "{ .reg .pred yes; .reg .b32 low; .reg .b64 a, b; "
      f"{a.descriptor(step, 'a', f'${2 * n}')}"
      f"{b.descriptor(step, 'b', f'${2 * n + 1}')}"
      "setp.eq.u32 yes, 0, 0; "
      f"wgmma.mma_async.sync.aligned.m64n{2 * n}k16.f32.bf16.bf16 "
      f"{{{names}}}, a, b, yes, 1, 1, "
      f"{int(a.transposed)}, {int(b.transposed)}; }}"
    )
    acc = emit(ptx, constraints, [*acc, a.start, b.start], [f32()] * n)
  return list(acc)


def zeros(columns: int) -> list[Value]:
  """Zero accumulator of 64 rows."""
  return [real(0.0)] * (columns // 2)
