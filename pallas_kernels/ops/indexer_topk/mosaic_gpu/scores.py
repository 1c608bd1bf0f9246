"""Index scores of a chunk of queries, on Hopper.

A warpgroup multiplies a tile of 64 keys by 128 columns, all heads of some
queries: a row of its accumulator is a key, so a thread holds a quarter of the
heads of two keys and sums relu(x) w in its registers; the four threads that
share a key then add their sums.

Each of two warpgroups has two such accumulators: while the tensor cores fill
one, it reduces the other, across tiles too. Both read the same keys, each for
its own queries, which stay in shared memory; a third warpgroup prefetches keys.

All visible tiles of (queries, keys) are split evenly over the blocks: each has
one contiguous range of them, ordered by queries, then keys.
"""

import functools
from typing import Final

import jax
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax._src.lib.mlir.dialects import llvm
from jax._src.lib.mlir.dialects import math as math_dialect
from jax._src.lib.mlir.dialects import nvvm
from jax._src.lib.mlir.dialects import vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

bS: Final = 128  # keys per tile
_ROWS: Final = 64  # of an accumulator: keys
_COLUMNS: Final = 128  # of an accumulator: queries x heads
_ACCUMULATORS: Final = 2  # of a warpgroup
_WARPGROUPS: Final = 2  # that multiply
_HEADS: Final = (8, 16, 32, 64)
_BLOCKS: Final = 132  # multiprocessors of an H100 or H200
_STAGES: Final = 3  # tiles of keys in shared memory
_ATOM: Final = 128  # bytes of a row that are swizzled together
_BY_ROW: Final = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN: Final = plgpu.Layout.WGMMA.reduce(0)
_PRODUCT: Final = plgpu.ShapeDtypeStruct(
  (_ROWS, _COLUMNS), jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA
)


def scores(
  q: Float[Array, "T M I"],
  k: Float[Array, "S I"],
  w: Float[Array, "T M"],
  start: Int[Array, " T"],
  end: Int[Array, " T"],
  k_scale: Float[Array, " S"] | None = None,
) -> Float[Array, "T paddedS"]:
  """Computes `k_scale[s] sum_j w[t, j] relu(q[t, j] . k[s])` in float32.

  Scores outside [start, end) are undefined. Each score is independent of the
  tiling of queries and keys, and never -0.0.

  Args:
    q: Index queries, bfloat16 or float8_e4m3fn.
    k: Index keys, of the same dtype.
    w: Head weights.
    start: First key that each query sees.
    end: One past the last key.
    k_scale: Scales of the keys, if these are in 8 bits.

  Returns:
    The scores, S padded to a multiple of `bS`.

  Raises:
    NotImplementedError: These heads, widths or dtypes are not supported.
  """
  _check(q, k, k_scale)
  T, M, I = q.shape
  S = k.shape[0]
  paddedS = -(-S // bS) * bS
  bT = _WARPGROUPS * _ACCUMULATORS * _COLUMNS // M
  start, end = (
    jnp.pad(jnp.clip(x, 0, S).astype(jnp.int32), (0, -T % bT))
    for x in (start, end)
  )
  k = jnp.pad(k, [(0, paddedS - S), (0, 0)])
  w = jnp.pad(w.astype(jnp.float32), [(0, -T % bT), (0, 0)])
  shares, groups = share_out(start, end, bT)
  scales = () if k_scale is None else (jnp.pad(k_scale, (0, paddedS - S)),)

  swizzled = (
    plgpu.TilingTransform((8, _ATOM // q.dtype.itemsize)),
    plgpu.SwizzleTransform(_ATOM),
  )
  smem = lambda shape: plgpu.SMEM(shape, q.dtype, transforms=swizzled)
  return plgpu.kernel(
    functools.partial(_block, heads=M, swizzled=swizzled),
    out_type=jax.ShapeDtypeStruct((T, paddedS), jnp.float32),
    grid=(_BLOCKS,),
    grid_names=("block",),
    num_threads=_WARPGROUPS + 1,
    thread_name="warpgroup",
    scratch_types=(
      smem((_WARPGROUPS, _ACCUMULATORS * _COLUMNS, I)),
      smem((_STAGES, bS, I)),
      plgpu.Barrier(num_barriers=_WARPGROUPS),
      plgpu.Barrier(num_barriers=_WARPGROUPS),
      plgpu.Barrier(num_barriers=_STAGES),
      plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
    ),
  )(q.reshape(-1, I), k, w.reshape(-1), shares.ravel(), groups.ravel(), *scales)


def _check(q, k, k_scale) -> None:
  M, I = q.shape[1:]
  if q.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn) or q.dtype != k.dtype:
    raise NotImplementedError(
      f"scores: {q.dtype=} and {k.dtype=} must both be bfloat16 or "
      "float8_e4m3fn."
    )
  if (k_scale is not None) != (q.dtype == jnp.float8_e4m3fn):
    raise NotImplementedError("scores: 8-bit keys, and no others, have scales.")
  if M not in _HEADS:
    raise NotImplementedError(f"scores: {M=} index heads is none of {_HEADS}.")
  if I * q.dtype.itemsize not in (_ATOM, 2 * _ATOM):
    raise NotImplementedError(
      f"scores: index heads of {I=} {q.dtype.name} are not {_ATOM} or "
      f"{2 * _ATOM} bytes wide."
    )


def share_out(
  start: Int[Array, " T"], end: Int[Array, " T"], bT: int, blocks: int = _BLOCKS
) -> tuple[Int[Array, "blocks 4"], Int[Array, "nT 3"]]:
  """Splits the visible tiles of `bT` queries x `bS` keys over the blocks.

  All of them form one sequence, group of queries by group of queries.

  Returns:
    For each block its range of the sequence, first and one past the last, and
    the range of its groups. For each group its range of the sequence, and the
    offset from a position in it to the index of the tile of keys.
  """
  start, end = start.reshape(-1, bT), end.reshape(-1, bT)
  alive = start < end
  first = jnp.min(jnp.where(alive, start, jnp.iinfo(jnp.int32).max), 1) // bS
  last = -(-jnp.max(jnp.where(alive, end, 0), 1) // bS)
  tiles = jnp.maximum(last - first, 0)
  after = jnp.cumsum(tiles)
  before = after - tiles
  groups = jnp.stack([before, after, first - before], 1)

  block, total = jnp.arange(blocks + 1, dtype=jnp.int32), after[-1]
  bound = block * (total // blocks) + jnp.minimum(block, total % blocks)
  begin, stop = bound[:-1], bound[1:]
  # Groups that end before a position: comparing all takes one pass.
  ended = lambda x: jnp.sum(after[None] <= x[:, None], 1, dtype=jnp.int32)
  first_group = ended(begin)
  last_group = jnp.where(begin < stop, ended(stop - 1) + 1, first_group)
  return jnp.stack([begin, stop, first_group, last_group], 1), groups


def _block(q, k, w, shares, groups, *refs, heads, swizzled):
  *k_scale, scores, q_s, k_s, q_full, q_free, full, free = refs
  wg = lax.axis_index("warpgroup")
  share = 4 * lax.axis_index("block")
  begin, stop, *my_groups = (shares[share + i] for i in range(4))
  slot = lambda i: lax.rem(i - begin, _STAGES)

  def stretch(group):
    """Range of the group's tiles in this block, and their keys."""
    before, after, shift = (groups[3 * group + i] for i in range(3))
    first, last = jnp.maximum(begin, before), jnp.minimum(stop, after)
    return first, last, lambda i: pl.ds((i + shift) * bS, bS)

  @pl.when(wg == _WARPGROUPS)
  def _copy():
    plgpu.set_max_registers(40, action="decrease")

    def copy_group(group, _):
      for i in range(_WARPGROUPS):
        # Bound now: `pl.when` calls it at once.
        wait = functools.partial(plgpu.barrier_wait, q_free.at[i])
        pl.when(group > my_groups[0])(wait)
        plgpu.copy_gmem_to_smem(
          q.at[_columns(group, i)], q_s.at[i], q_full.at[i]
        )
      first, last, keys = stretch(group)

      def copy_keys(i, _):
        at = slot(i)
        pl.when(i - begin >= _STAGES)(lambda: plgpu.barrier_wait(free.at[at]))
        plgpu.copy_gmem_to_smem(k.at[keys(i)], k_s.at[at], full.at[at])

      lax.fori_loop(first, last, copy_keys, None)

    lax.fori_loop(*my_groups, copy_group, None)

  @pl.when(wg < _WARPGROUPS)
  def _compute():
    plgpu.set_max_registers(232, action="increase")

    def compute_group(group, _):
      columns = _columns(group, wg)
      w_N = [
        plgpu.load(w.at[x], layout=_BY_COLUMN, optimized=False)
        for x in _parts(columns, _COLUMNS)
      ]
      first, last, keys = stretch(group)
      plgpu.barrier_wait(q_full.at[wg])

      def compute_tile(i, _):
        at = slot(i)
        rows = _parts(keys(i), _ROWS)
        scales = [
          [
            plgpu.load(x.at[y], layout=_BY_ROW, optimized=False)
            for x in k_scale
          ]
          for y in rows
        ]
        plgpu.barrier_wait(full.at[at])

        def reduce(x_SN, row, column):
          query = lax.div(columns.start + column * _COLUMNS, heads)
          key = rows[row].start
          args = w_N[column], scales[row], scores, query, key, heads
          _reduce(x_SN, *args)

        products = list(np.ndindex(bS // _ROWS, _ACCUMULATORS))
        x_SN = None
        for i, (row, column) in enumerate(products):
          k_part = k_s.at[at, pl.ds(row * _ROWS, _ROWS)]
          q_part = q_s.at[wg, pl.ds(column * _COLUMNS, _COLUMNS)]
          ready, x_SN = _multiply(k_part, q_part, x_SN, swizzled)
          if i:
            reduce(ready, *products[i - 1])
        x_SN = _wait(x_SN)
        plgpu.barrier_arrive(free.at[at])
        reduce(x_SN, *products[-1])

      lax.fori_loop(first, last, compute_tile, None)
      plgpu.barrier_arrive(q_free.at[wg])

    lax.fori_loop(*my_groups, compute_group, None)


def _columns(group, wg):
  """Slice of a warpgroup's queries in all queries x heads."""
  n = _ACCUMULATORS * _COLUMNS
  return pl.ds((group * _WARPGROUPS + wg) * n, n)


def _parts(whole: pl.Slice, size: int) -> list[pl.Slice]:
  return [pl.ds(whole.start + i, size) for i in range(0, whole.size, size)]


def _multiply(k_s, q_s, before, swizzled):
  """Starts k qᵀ; waits for the product `before` it, if there is one.

  Returns:
    The finished product, and the new one, which must not be read before the
    next one has been started or `_wait` has waited for it.
  """
  swizzled = plgpu.RefType(swizzled)
  before = [] if before is None else [before]

  @plgpu.inline_mgpu(
    arg_types=(swizzled, swizzled, [_PRODUCT.layout] * len(before)),
    return_type=[_PRODUCT] * (len(before) + 1),
  )
  def emit(ctx, k_s, q_s, before):
    del ctx
    memref = ir.MemRefType(k_s.type)
    is_8_bit = isinstance(memref.element_type, ir.Float8E4M3FNType)
    atoms = memref.shape[1]  # [rows / 8, atoms, 8, _ATOM bytes]
    return _assembly(
      _multiplication(atoms, is_8_bit, bool(before)),
      *([_descriptor(x, atoms) for x in (k_s, q_s)], before),
      writes=True,
    )

  *ready, started = emit(k_s, q_s, before)
  return ready[0] if ready else None, started


def _wait(product):
  """Waits for the last product."""

  @plgpu.inline_mgpu(arg_types=(_PRODUCT.layout,), return_type=_PRODUCT)
  def emit(ctx, product):
    del ctx
    text = "wgmma.wait_group.sync.aligned 0;"
    [ready] = _assembly(text, [], [product], writes=False)
    return ready

  return emit(product)


def _assembly(text, operands, products, *, writes):
  """Emits PTX that waits for products, and may start a new one.

  Its registers, $0 and so on: the new product, the products, those again as
  operands, and 64-bit operands. Returns the products and the new one.
  """
  old = [x for product in products for x in _elements(product)]
  new, f32 = _ROWS * _COLUMNS // 128 * writes, ir.F32Type.get()
  n = new + len(old)
  ties = [str(new + i) for i in range(len(old))]
  results = llvm.inline_asm(
    llvm.StructType.get_literal([f32] * n),
    [*old, *operands],
    text,
    ",".join(["=f"] * n + ties + ["l"] * len(operands)),
    has_side_effects=True,
  )
  assert isinstance(results, ir.Value)
  results = [llvm.extractvalue(f32, results, [i]) for i in range(n)]
  return [_accumulator(x) for x in (results[new:], results[:new]) if x]


def _descriptor(ref, atoms):
  """Descriptor of a matrix in shared memory, at its first atom."""
  address = llvm.ptrtoint(_integer(32), mgpu_utils.memref_ptr(ref))
  place = arith.shrui(arith.extui(_integer(64), address), _constant(4, 64))
  swizzle = 1 << 62  # 128 bytes
  eight_rows = (8 * _ATOM * atoms >> 4) << 32
  return arith.ori(place, _constant(swizzle | eight_rows | 1 << 16, 64))


def _multiplication(atoms, is_8_bit, waits) -> str:
  """PTX of a product for `_assembly`.

  One piece of assembly, so that nothing touches the registers before they are
  ready, and the first product needs no zeros to accumulate into.
  """
  n = _ROWS * _COLUMNS // 128
  out = "{" + ",".join(f"${i}" for i in range(n)) + "}"
  left, right = (f"${n + 2 * n * waits + i}" for i in range(2))
  kind = "k32.f32.e4m3.e4m3" if is_8_bit else "k16.f32.bf16.bf16"
  options = "1, 1" if is_8_bit else "1, 1, 0, 0"
  lines = [
    ".reg .pred add; .reg .b64 left, right;",
    "wgmma.fence.sync.aligned;",
  ]
  for i in range(4 * atoms):  # 32 bytes of each row at a time
    # Descriptors count in 16 bytes.
    offset = i // 4 * (8 * _ATOM >> 4) + i % 4 * 2
    lines += [
      f"setp.ne.b32 add, {min(i, 1)}, 0;",
      f"add.s64 left, {left}, {offset};",
      f"add.s64 right, {right}, {offset};",
      f"wgmma.mma_async.sync.aligned.m64n{_COLUMNS}{kind} {out}, left, right, "
      f"add, {options};",
    ]
  lines.append("wgmma.commit_group.sync.aligned;")
  if waits:
    lines.append("wgmma.wait_group.sync.aligned 1;")
  return "{\n" + "\n".join(lines) + "\n}"


def _accumulator(registers) -> mgpu.FragmentedArray:
  """Array of pairs of adjacent columns, row by row, the next row 8 below."""
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  layout = mgpu.WGMMA_LAYOUT
  pairs = np.empty(len(registers) // 2, object)
  for i in range(len(pairs)):
    pairs[i] = vector.from_elements(pair, registers[2 * i : 2 * i + 2])
  return mgpu.FragmentedArray(
    _registers=pairs.reshape(layout.registers_shape((_ROWS, _COLUMNS))),
    _layout=layout,
    _is_signed=None,
  )


def _reduce(x_SN, w_N, scale_S, scores, query, key, heads) -> None:
  """Writes the scores of an accumulator's queries, from `query` on."""
  splat = plgpu.Layout.WG_SPLAT

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.Layout.WGMMA,
      _BY_COLUMN,
      [_BY_ROW] * len(scale_S),
      plgpu.RefType(),
      splat,
      splat,
    )
  )
  def emit(ctx, x, w, scale, out, query, key):
    del ctx
    x, w = _elements(x), _elements(w)
    query, key = (a.registers.item() for a in (query, key))
    thread = mgpu_utils.thread_idx()
    bits = lambda low, n: arith.andi(
      arith.shrui(thread, _constant(low)), _constant((1 << n) - 1)
    )
    # Of two queries and two keys, each of the four lanes keeps one score.
    query_bit, key_bit = bits(0, 1), bits(1, 1)
    query = arith.addi(query, query_bit)
    for term, times in ((bits(5, 2), 16), (key_bit, 8), (bits(2, 3), 1)):
      key = arith.addi(key, arith.muli(term, _constant(times)))
    is_odd, is_low = (
      arith.cmpi(arith.CmpIPredicate.ne, bit, _constant(0))
      for bit in (query_bit, key_bit)
    )
    for i in range(0, _COLUMNS // heads, 2):
      upper, lower = (
        _fold(*(_weighted(x, w, low, i + j, heads) for j in (0, 1)), is_odd, 1)
        for low in (0, 1)
      )
      total = _fold(upper, lower, is_low, 2)
      for s in scale:
        total = arith.mulf(total, arith.select(is_low, *_elements(s)[::-1]))
      address, exists = _place(out, arith.addi(query, _constant(i)), key)
      mgpu_utils.inline_ptx(
        "st.global.f32 [$0], $1;",
        *(address, total),
        predicate=exists,
        has_side_effects=True,
      )
    # Free of cost; without it ptxas delays sums and runs out of registers.
    mgpu_utils.inline_ptx(
      "bar.warp.sync 0xffffffff;", has_side_effects=True, convergent=True
    )

  emit(x_SN, w_N, scale_S, scores, query, key)


def _elements(array: mgpu.FragmentedArray) -> list[ir.Value]:
  """Elements of this thread, in order."""
  return [
    vector.extract(register, [], [i])
    for register in array.registers.flat
    for i in range(ir.VectorType(register.type).shape[0])
  ]


def _weighted(x, w, low, query, heads):
  """Sum of relu(x) w over this thread's quarter of a query's heads."""
  zero = arith.constant(ir.F32Type.get(), 0.0)
  total, quarter = zero, heads // 4  # from 0.0, so that it is never -0.0
  for i in range(query * quarter, (query + 1) * quarter):
    # x: pair of columns, key, column of the pair.
    active = arith.maximumf(x[i // 2 * 4 + low * 2 + i % 2], zero)
    total = math_dialect.fma(w[i], active, total)
  return total


def _fold(a, b, takes_b, distance):
  """Adds two lanes' values: `b` in the lane with `takes_b`, else `a`."""
  kept, sent = arith.select(takes_b, b, a), arith.select(takes_b, a, b)
  received = nvvm.shfl_sync(
    _constant(-1),
    arith.bitcast(_integer(32), sent),
    _constant(distance),
    _constant(31),
    nvvm.ShflKind.bfly,
  )
  return arith.addf(kept, arith.bitcast(ir.F32Type.get(), received))


def _place(scores, query, key):
  """Address of scores[query, key], and whether the query exists."""
  i64 = _integer(64)
  T, paddedS = ir.MemRefType(scores.type).shape
  exists = arith.cmpi(arith.CmpIPredicate.ult, query, _constant(T))
  row = arith.muli(arith.extui(i64, query), _constant(paddedS, 64))
  at = arith.addi(row, arith.extui(i64, key))
  pointer = mgpu_utils.memref_ptr(scores)
  base = llvm.ptrtoint(
    i64, llvm.addrspacecast(llvm.PointerType.get(1), pointer)
  )
  return arith.addi(base, arith.muli(at, _constant(4, 64))), exists


def _integer(width: int) -> ir.Type:
  return ir.IntegerType.get_signless(width)


def _constant(x: int, width: int = 32) -> ir.Value:
  return arith.constant(_integer(width), ir.IntegerAttr.get(_integer(width), x))
