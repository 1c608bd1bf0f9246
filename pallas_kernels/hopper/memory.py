"""Places in shared and device memory, as single threads address them."""

from collections.abc import Sequence
import copy
import dataclasses

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import vector

from pallas_kernels.hopper import threads
from pallas_kernels.hopper.threads import Bool
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32


class Place:
  """Address of a byte: 32 bits in shared memory, 64 in device memory."""

  value: ir.Value
  is_shared: bool
  in_cluster: bool
  """Whether it may be in the shared memory of another block of the cluster."""

  def __init__(
    self, value: ir.Value, is_shared: bool, in_cluster: bool = False
  ):
    self.value, self.is_shared = value, is_shared
    self.in_cluster = in_cluster

  @classmethod
  def of(cls, ref: ir.Value) -> "Place":
    """First byte of an array."""
    pointer = mgpu_utils.memref_ptr(ref)
    is_shared = mgpu_utils.is_smem_ref(ref)
    if not is_shared:
      pointer = llvm.addrspacecast(llvm.PointerType.get(1), pointer)
    kind = ir.IntegerType.get_signless(32 if is_shared else 64)
    return cls(llvm.ptrtoint(kind, pointer), is_shared)

  @property
  def space(self) -> str:
    """Name in PTX."""
    if not self.is_shared:
      return "global"
    return "shared::cluster" if self.in_cluster else "shared"

  def in_block(self, block: U32) -> "Place":
    """Same place in the shared memory of this block of the cluster."""
    text = "mapa.shared::cluster.u32 $0, $1, $2;"
    args = [self.value, block.value]
    [value] = threads.assembly(text, args, [threads.i32()])
    return Place(value, is_shared=True, in_cluster=True)

  def __add__(self, offset: U32 | int) -> "Place":
    """Place so many bytes further on, at least 0."""
    return self._further(self._wide(offset))

  def step(self, index: U32, stride: int) -> "Place":
    """Place `index * stride` bytes further on; the product has 64 bits in
    device memory."""
    return self._further(arith.muli(self._wide(index), self._constant(stride)))

  def _further(self, offset: ir.Value) -> "Place":
    value = arith.addi(self.value, offset)
    return Place(value, self.is_shared, self.in_cluster)

  def _wide(self, offset: U32 | int) -> ir.Value:
    if isinstance(offset, int):
      return self._constant(offset)
    if self.is_shared:
      return offset.value
    return arith.extui(self.value.type, offset.value)

  def _constant(self, x: int) -> ir.Value:
    kind = self.value.type
    return arith.constant(kind, ir.IntegerAttr.get(kind, x))

  # Here and below, an offset in bytes is a constant of the instruction. So is
  # `turn`, for swizzled arrays in shared memory: the address is xor'd with it.

  def load(self, offset: int = 0) -> U32:
    [word] = self.load_words(1, offset)
    return word

  def load_words(self, n: int, offset: int = 0, turn: int = 0) -> list[U32]:
    """Loads 1, 2 or 4 neighbouring words at once."""
    kinds = [threads.i32()] * n
    return [U32(x) for x in self._get(".b32", kinds, offset, turn)]

  def load_floats(self, n: int, offset: int = 0, turn: int = 0) -> list[F32]:
    """Loads 1, 2 or 4 neighbouring floats at once."""
    kinds = [threads.f32()] * n
    return [F32(x) for x in self._get(".f32", kinds, offset, turn)]

  def _get(self, kind, kinds, offset, turn):
    n = len(kinds)
    outs = ", ".join(f"${i}" for i in range(n))
    vector, outs = (f".v{n}", f"{{{outs}}}") if n > 1 else ("", outs)
    text = f"ld.{self.space}{vector}{kind} {outs}, [${n}+{offset}];"
    return threads.assembly(_turned(text, n, turn), [self.value], kinds)

  def load_constant(self, offset: int = 0) -> U32:
    """Loads a word of device memory that the kernel does not write."""
    text = f"ld.global.nc.b32 $0, [$1+{offset}];"
    return U32(*threads.assembly(text, [self.value], [threads.i32()]))

  def load_constants(self, n: int, offset: int = 0) -> list[U32]:
    """Loads 2 or 4 neighbouring words that the kernel does not write."""
    outs = ", ".join(f"${i}" for i in range(n))
    text = f"ld.global.nc.v{n}.b32 {{{outs}}}, [${n} + {offset}];"
    kinds = [threads.i32()] * n
    return [U32(x) for x in threads.assembly(text, [self.value], kinds)]

  def prefetch(self, offset: int, where: Bool) -> None:
    """Brings the line of device memory to L2."""
    text = f"@$1 prefetch.global.L2 [$0+{offset}];"
    threads.assembly(text, [self.value, where.value])

  def store(
    self,
    values: Sequence[F32 | U32],
    offset: int = 0,
    where: Bool | None = None,
    turn: int = 0,
  ) -> None:
    """Stores 1, 2 or 4 neighbours at once."""
    kind = ".f32" if isinstance(values[0], F32) else ".b32"
    self._put(f"st.{self.space}", kind, values, offset, where, turn)

  def add(
    self, values: Sequence[F32], offset: int = 0, where: Bool | None = None
  ) -> None:
    """Adds 4 neighbours in device memory, in no order with other threads'."""
    self._put("red.relaxed.gpu.global.add", ".f32", values, offset, where)

  def _put(self, action, kind, values, offset, where, turn=0):
    n = len(values)
    ins = ", ".join(f"${1 + i}" for i in range(n))
    vector, ins = (f".v{n}", f"{{{ins}}}") if n > 1 else ("", ins)
    text = f"{action}{vector}{kind} [$0+{offset}], {ins};"
    args = [self.value, *(x.value for x in values)]
    if where is not None:
      text = f"@${1 + n} {text}"
      args.append(where.value)
    threads.assembly(_turned(text, 0, turn), args)


def _turned(text, address, turn):
  if not turn:
    return text
  text = text.replace(f"[${address}+", "[at+")
  return f"{{ .reg .b32 at; xor.b32 at, ${address}, {turn}; {text} }}"


@dataclasses.dataclass(frozen=True)
class LazyRow:
  """Row of an array in device memory, whose address each use computes anew.

  LLVM would hold the addresses of several `Place`s in registers, and whether
  they are to be written.
  """

  array: Place
  """Place in the array's first row."""
  size: int
  """Bytes of a row."""
  number: U32
  further: int
  """Added to `number`."""
  key: U32
  keys: int
  """Nothing is written unless `key` < `keys`."""

  def store(self, values: Sequence[F32], offset: int) -> None:
    """Stores 4 neighbours at once."""
    self._put("st.global", values, offset)

  def add(self, values: Sequence[F32], offset: int) -> None:
    """Adds 4 neighbours, in no order with other threads'."""
    self._put("red.relaxed.gpu.global.add", values, offset)

  def _put(self, action, values, offset):
    args = [self.array, self.key, self.number, *values]
    threads.assembly(
      "{ .reg .pred valid; .reg .b32 row; .reg .b64 at; "
      f"setp.lt.u32 valid, $1, {self.keys}; add.u32 row, $2, {self.further}; "
      f"mad.wide.u32 at, row, {self.size}, $0; "
      f"@valid {action}.v4.f32 [at+{offset}], {{$3, $4, $5, $6}}; }}",
      [x.value for x in args],
    )


class Memory:
  """Consecutive words of shared memory, or of one row of a global array."""

  def __init__(self, ref: ir.Value, row: U32 | None = None):
    self._place = Place.of(ref)
    if row is not None:
      *_, words = ir.MemRefType(ref.type).shape
      self._place = self._place.step(row, 4 * words)

  def in_block(self, block: U32) -> "Memory":
    """The same words of shared memory of this block of the cluster."""
    there = copy.copy(self)
    there._place = self._place.in_block(block)
    return there

  def _address(self, i: U32 | int) -> ir.Value:
    return self._place.step(U32(i), 4).value

  def load(self, i: U32 | int) -> U32:
    [[word]] = self._load([U32(i)], 1)
    return word

  def load4s(self, starts: Sequence[U32]) -> Sequence[Sequence[U32]]:
    """Loads four neighbours from each start, a multiple of four.

    All loads are issued before any is waited for.
    """
    return self._load(starts, 4)

  def _load(self, starts: Sequence[U32], n: int) -> list[list[U32]]:
    text, kind = "", "v4.b32" if n == 4 else "b32"
    space = self._place.space
    for j in range(len(starts)):
      words = ", ".join(f"${j * n + e}" for e in range(n))
      text += f"ld.{space}.{kind} {{{words}}}, [${n * len(starts) + j}];"
    addresses = [self._address(i) for i in starts]
    kinds = [threads.i32()] * (n * len(starts))
    words = [U32(x) for x in threads.assembly(text, addresses, kinds)]
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
    stores = "".join(
      f"@p st.shared.b32 [$1 + {4 * stride * i}], ${3 + i};"
      for i in range(len(words))
    )
    text = (
      "{ .reg .pred p; .reg .b32 t;"
      f"and.b32 t, $2, {1 << bit}; setp.ne.u32 p, t, 0;"
      f"{stores} mov.b32 $0, $1; @p add.u32 $0, $0, 4; }}"
    )
    args = [x.value for x in (cursor, flags, *words)]
    return U32(*threads.assembly(text, args, [threads.i32()]))

  def cursor(self, i: U32) -> U32:
    return U32(self._address(i))

  def _update(self, what: str, i: U32 | int, word: U32 | int, where):
    suffix = "add.u32" if what == "red" else "b32"
    text = f"{what}.{self._place.space}.{suffix} [$0], $1;"
    args = [self._address(i), U32(word).value]
    if where is not None:
      text = f"@$2 {text}"
      args.append(where.value)
    threads.assembly(text, args)


class Array:
  """Array of 16- or 32-bit numbers whose loads the compiler may move.

  Those of `Place` and `Memory` stay where they are written.
  """

  def __init__(self, ref: ir.Value):
    self._ref = ref
    self._kind = ir.MemRefType(ref.type).element_type
    self._bits = mgpu_utils.bitwidth(self._kind)

  def load(self, *at: U32 | int) -> U32:
    """Loads the number at these indices; one of 16 bits has zeros above."""
    kind = ir.IntegerType.get_signless(self._bits)
    number = vector.extract(self._load(1, kind, 1, at), [], [0])
    if self._bits < 32:
      number = arith.extui(threads.i32(), number)
    return U32(number)

  def load_words(self, n: int, *at: U32 | int) -> list[U32]:
    """Loads n neighbouring words, the first of which begins at these indices;
    16-bit numbers are two to a word."""
    words = self._load(n * 32 // self._bits, threads.i32(), n, at)
    return [U32(vector.extract(words, [], [i])) for i in range(n)]

  def _load(self, size, kind, n, at):
    index = ir.IndexType.get()
    at = [arith.index_cast(index, U32(x).value) for x in at]
    numbers = vector.load(ir.VectorType.get((size,), self._kind), self._ref, at)
    return vector.bitcast(ir.VectorType.get((n,), kind), numbers)
