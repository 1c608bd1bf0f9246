"""Gathers rows for the backward kernel, and adds its gradients to rows."""

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels.ops.sparse_mla.mosaic_gpu import backward_plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu import instructions as gpu


def permuted(x):
  """Permutes the last dimension into the order of the kernel's products.

  In an accumulator a thread has columns 0, 1 and 8, 9 of 16, or 2, 3 and 10,
  11, and so on. In this order they are four neighbours of the array.
  """
  fours = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 4, 2, 2)
  return fours.swapaxes(-3, -2).reshape(x.shape)


def gather(kv, indices, kv_wide, kv_narrow, index_tile, tiles, *, plan):
  """Gathers the selected rows tile by tile into shared memory, in warpgroup 2.

  Eight threads share a row: each copies one 16-byte piece of every 128 bytes.
  """
  thread, rank = gpu.thread(), plans.rank(plan)
  group, piece = gpu.bits(thread, 3, 4), gpu.bits(thread, 0, 3)
  row8 = gpu.bits(group, 0, 3)  # of the tile, modulo 8: rows step by 16
  eight = gpu.bits(group, 3, 1)
  wide = gpu.add(
    gpu.address(kv_wide),
    gpu.times(eight, plan.eights("wide")),
    gpu.times(row8, 128),
    gpu.times(arith.xori(piece, row8), 16),
  )
  narrow_piece = arith.xori(gpu.bits(piece, 0, 2), gpu.bits(row8, 1, 2))
  narrow = gpu.add(
    gpu.address(kv_narrow),
    gpu.times(eight, plan.eights("narrow")),
    gpu.times(gpu.bits(piece, 2, 1), 512),
    gpu.times(row8, 64),
    gpu.times(narrow_piece, 16),
  )
  in_narrow = gpu.number(gpu.below(piece, plan.narrow // 8))
  full, free = (plans.barrier(index_tile, i) for i in (plans.FULL, plans.FREE))
  source = gpu.add(
    gpu.pointer(kv),
    gpu.long(gpu.add(gpu.times(piece, 16), gpu.times(rank, 2 * plan.wide))),
  )
  # From this block's first column to its first rotated one.
  rotated = arith.subi(
    gpu.integer(2 * plans.C, gpu.i64()),
    gpu.long(gpu.times(rank, 2 * (plan.wide - plan.narrow))),
  )
  first_index = gpu.pointer(indices)
  my_indices = gpu.add(first_index, gpu.long(gpu.times(group, 4)))
  copies_indices = gpu.number(gpu.below(thread, plans.KEYS // 4))
  index_place = gpu.add(gpu.address(index_tile), gpu.times(thread, 16))
  index_source = gpu.add(first_index, gpu.long(gpu.times(thread, 16)))
  zero = gpu.integer(0)

  def load_indices(tile):
    at = gpu.add(my_indices, gpu.long(gpu.times(tile, 4 * plans.KEYS)))
    return [gpu.load_constant(at, 64 * i) for i in range(4)]

  @utils.fori(tiles, load_indices(zero))
  def _(tile, rows):
    # After the last tile, the last one again.
    following = arith.minui(gpu.add(tile, 1), gpu.add(tiles, -1))
    next_rows = load_indices(following)
    gpu.wait(free, arith.andi(gpu.add(tile, 1), gpu.integer(1)))
    for i, row in enumerate(rows):
      valid = gpu.below(row, plan.keys)
      row = arith.select(valid, row, zero)
      size = arith.select(valid, gpu.integer(16), zero)  # or 16 zeros
      row = arith.muli(gpu.long(row), gpu.integer(2 * plans.D, gpu.i64()))
      at = gpu.add(source, row)
      for column in range(plan.wide // 64):
        offset = 2 * i * plan.eights("wide") + 1024 * column
        gpu.emit(
          f"cp.async.cg.shared.global.L2::256B [$0+{offset}], "
          f"[$1+{128 * column}], 16, $2;",
          "r,l,r",
          [wide, at, size],
        )
      gpu.emit_if(
        in_narrow,
        "cp.async.cg.shared.global "
        f"[$0+{2 * i * plan.eights('narrow')}], [$1], 16, $2;",
        "r,l,r",
        [narrow, gpu.add(at, rotated), size],
      )
    at = gpu.add(index_source, gpu.long(gpu.times(tile, 4 * plans.KEYS)))
    gpu.emit_if(
      copies_indices,
      "cp.async.cg.shared.global [$0], [$1], 16;",
      "r,l",
      [index_place, at],
    )
    gpu.emit("cp.async.wait_all;")
    gpu.fence_async()
    gpu.arrive(full, gpu.integer(1))
    return next_rows


def permute(ref, name, columns, *, first, row, plan):
  """Permutes columns of a row of shared memory into the order of `permuted`.

  `first`: the column of 16 where this thread begins.
  """
  swizzle = 128 if "wide" in name else 64
  row8 = gpu.bits(row, 0, 3)
  turn = row8 if swizzle == 128 else gpu.bits(row8, 1, 2)
  start = gpu.add(
    gpu.address(ref),
    gpu.times(arith.shrui(row, gpu.integer(3)), plan.eights(name)),
    gpu.times(row8, swizzle),
    gpu.times(first, 8 * 16 * 2),  # whole tiles of 32 or 64 columns
    gpu.times(turn, 16),
  )
  for i in range(columns // 16):
    tile, byte = divmod(32 * i, swizzle)
    gpu.emit(
      "{ .reg .b32 near, far, a<4>, b<4>; "
      f"add.u32 far, $0, {tile * 8 * swizzle}; xor.b32 near, far, {byte}; "
      "ld.shared.v4.b32 {a0, a1, a2, a3}, [near]; xor.b32 far, near, 16; "
      "ld.shared.v4.b32 {b0, b1, b2, b3}, [far]; "
      "st.shared.v4.b32 [near], {a0, a2, b0, b2}; "
      "st.shared.v4.b32 [far], {a1, a3, b1, b3}; }",
      "r",
      [start],
    )


def add_columns(acc, rows, place, offset, plan):
  """Adds an accumulator's columns to rows of dKV, whole 128-byte lines at once.

  A thread has 4 neighbouring columns of each 16 (see `permuted`), of two rows,
  so four threads have 64 bytes. They swap with the four that have the next
  row: then each has a piece of both rows' 128 bytes. `rows`: their keys, and
  which rows of `place` they are, as a number and what is added to it.
  """
  if plan.deterministic:
    ptx = "st.global.v4.f32"
  else:
    ptx = "red.relaxed.gpu.global.add.v4.f32"
  odd = gpu.is_equal(gpu.bits(plans.first_row(), 0, 1), 1)
  select = lambda xs, ys: [
    arith.select(odd, x, y) for x, y in zip(xs, ys, strict=True)
  ]
  for group in range(len(acc) // 16):
    for half in range(2):
      near, far = (
        [
          acc[16 * group + 8 * i + 4 * j + 2 * half + e]
          for j in range(2)
          for e in range(2)
        ]
        for i in range(2)
      )
      got = [gpu.exchange(x, 4) for x in select(near, far)]
      pieces = select(got, near), select(far, got)
      for row, values in zip(rows[2 * half :], pieces, strict=False):
        key, number, more = row
        gpu.emit(
          "{ .reg .pred valid; .reg .b32 row; .reg .b64 at; "
          f"setp.lt.u32 valid, $1, {plan.keys}; add.u32 row, $2, {more}; "
          f"mad.wide.u32 at, row, {plans.ROW}, $0; "
          f"@valid {ptx} [at+{offset + 128 * group}], {{$3, $4, $5, $6}}; }}",
          "l,r,r,f,f,f,f",
          [place, key, number, *values],
        )
