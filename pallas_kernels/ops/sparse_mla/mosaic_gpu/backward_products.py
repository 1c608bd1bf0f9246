"""Products of the backward kernel, by warpgroup."""

import dataclasses
import functools

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels.ops.sparse_mla.mosaic_gpu import backward_plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu import backward_rows as rows_lib
from pallas_kernels.ops.sparse_mla.mosaic_gpu import instructions as gpu


def multiply(
  q_wide,
  q_narrow,
  do_wide,
  kv_wide,
  kv_narrow,
  p_tile,
  ds_tile,
  index_tile,
  per_head,
  d_kv,
  d_q,
  p,
  tiles,
  slot,
  *,
  which,
  plan,
):
  """Runs warpgroup `which` of the two that multiply; `slot` is the first key's.

  Registers are scarce: only dQ's live through the loop, and values that depend
  on the thread are computed where they are used.
  """
  pair = plan.blocks == 2
  barrier = functools.partial(plans.barrier, index_tile)
  starts = {
    name: gpu.bits(gpu.address(ref), 4, 14)
    for name, ref in (
      ("q_wide", q_wide),
      ("q_narrow", q_narrow),
      ("do_wide", do_wide),
      ("kv_wide", kv_wide),
      ("kv_narrow", kv_narrow),
      ("p", p_tile),
      ("ds", ds_tile),
    )
  }

  def along_columns(name, column=0, half=0):
    """A [rows, columns] or B [columns, rows]; contracted over columns.

    From a column of 64 (narrow: 32), and from row 64 half.
    """
    swizzle = 64 if "narrow" in name else 128
    stride = plan.eights(name)
    return gpu.Operand(
      starts[name],
      offset=column * 8 * swizzle + half * 8 * stride,
      leading=0,
      stride=stride,
      swizzle=swizzle,
      step=32,
      transposed=False,
    )

  def along_rows(name, column=0, half=0):
    """A [columns, rows] or B [rows, columns]; contracted over rows."""
    operand = along_columns(name, column, half)
    return dataclasses.replace(
      operand,
      leading=8 * operand.swizzle,
      step=2 * operand.stride,
      transposed=True,
    )

  def leads():
    return gpu.number(gpu.is_equal(gpu.thread(), 0))

  def leads_warp():
    return gpu.number(gpu.is_equal(gpu.bits(gpu.thread(), 0, 5), 0))

  def weights_place(ref):
    """Swizzled address of this thread's [row, 8 j + 2 quad]: xor with 16 j."""
    row, quad = plans.first_row(), plans.quad()
    turn = gpu.times(gpu.bits(row, 0, 3), 16)
    return gpu.add(
      gpu.address(ref), gpu.times(row, 128), turn, gpu.times(quad, 4)
    )

  def head_place():
    heads = gpu.address(per_head)
    return gpu.add(heads, 4 * plans.HEADS * which, gpu.times(plans.quad(), 8))

  def d_kv_place():
    """Address of this thread's piece of 128 bytes; see `add_columns`."""
    return gpu.add(
      gpu.pointer(d_kv),
      gpu.long(
        gpu.add(
          gpu.times(gpu.bits(plans.first_row(), 0, 1), 64),
          gpu.times(plans.quad(), 16),
        )
      ),
    )

  def alone():
    """Synchronises this warpgroup."""
    gpu.meet(plans.ALONE + which, 128)

  def products(by):
    """Multiplies K by Q or V by dO: this block's own 64 heads, and others."""
    acc = gpu.wgmma_fence(gpu.zeros(plan.blocks * plans.HEADS))
    for column in range(plan.wide // 64):
      a, b = along_columns("kv_wide", column), along_columns(by, column)
      acc = gpu.wgmma(acc, a, b, 4)
    for column in range(plan.narrow // 32 if by == "q_wide" else 0):
      a = along_columns("kv_narrow", column)
      acc = gpu.wgmma(acc, a, along_columns("q_narrow", column), 2)
    gpu.wgmma_commit()
    acc = gpu.wgmma_wait(0, acc)
    return acc[: plans.HEADS // 2], acc[plans.HEADS // 2 :]

  def completed(acc, others, buffer, here, parity):
    """Sums both blocks' products."""
    mine = gpu.add(buffer, gpu.times(gpu.thread(), 16))
    place, signal = gpu.there(mine), gpu.there(barrier(here))
    for i in range(8):
      gpu.send(others[4 * i :][:4], place, 2048 * i, signal)
    gpu.expect(barrier(here), 4 * plans.KEYS * plans.HEADS, leads())
    gpu.wait(barrier(here), parity)
    got = [x for i in range(8) for x in gpu.load(mine, 2048 * i, 4)]
    return [arith.addf(x, y) for x, y in zip(acc, got, strict=True)]

  def store_weights(place, packed):
    for i, x in enumerate(packed):
      gpu.emit(
        f"{{ .reg .b32 at; xor.b32 at, $0, {16 * (i // 2)}; "
        f"st.shared.b32 [at+{1024 * (i % 2)}], $1; }}",
        "r,r",
        [place, x],
      )
    gpu.fence_async()

  def send_weights(tile_ref, here):
    """Sends weights to the other block, which does not own their heads."""
    source, leader = gpu.address(tile_ref), leads()
    gpu.expect(barrier(here), plans.TILE_BYTES, leader)
    gpu.send_bytes(
      source,
      gpu.there(gpu.add(source, plans.TILE_BYTES)),
      plans.TILE_BYTES,
      gpu.there(barrier(here)),
      leader,
    )

  def weights(tile, parity, valid):
    """Writes P^T to shared memory, and its sums over heads to device memory."""
    acc, others = products("q_wide")
    # The previous weights are no longer read.
    gpu.meet(plans.P_FREE, plans.BOTH)
    if pair:
      behind = gpu.add(gpu.address(per_head), 8 * plans.HEADS)
      acc = completed(acc, others, behind, plans.S_HERE, parity)
    factor, zero = gpu.real(plan.scale * plans.LOG2E), gpu.real(0.0)
    sums = [zero, zero]
    packed = []
    place = head_place()
    for j in range(plans.HEADS // 8):
      lses = gpu.load(place, 32 * j, 2)
      for half in range(2):
        two = []
        for s, lse in zip(acc[4 * j + 2 * half :][:2], lses, strict=True):
          x = gpu.exp2(gpu.multiply_add(s, factor, lse))
          x = arith.select(valid[half], x, zero)
          sums[half] = arith.addf(sums[half], x)
          two.append(x)
        packed.append(gpu.pack(*two))
    store_weights(weights_place(p_tile), packed)
    gpu.meet(plans.P_FULL, plans.BOTH, stay=False)
    if pair:
      alone()
      send_weights(p_tile, plans.P_HERE)
    for distance in (1, 2):
      sums = [arith.addf(x, gpu.exchange(x, distance)) for x in sums]
    store_sums(tile, sums)

  def store_sums(tile, sums):
    at = gpu.long(
      gpu.times(gpu.add(gpu.times(tile, plans.KEYS), plans.first_row()), 4)
    )
    at = gpu.add(gpu.pointer(p), at)
    leads_quad = gpu.number(gpu.is_equal(plans.quad(), 0))
    for half in range(2):
      ptx = f"st.global.f32 [$0+{32 * half}], $1;"
      gpu.emit_if(leads_quad, ptx, "l,f", [at, sums[half]])

  def gradients(parity):
    """Writes dS^T to shared memory."""
    acc, others = products("do_wide")
    gpu.meet(plans.DS_FREE, plans.BOTH)
    if pair:
      # The tile of dS receives the products before it receives dS.
      gpu.wait(barrier(plans.DONE), arith.xori(parity, gpu.integer(1)))
      acc = completed(acc, others, gpu.address(ds_tile), plans.DP_HERE, parity)
    factor = gpu.real(plan.scale)
    scaled = []
    place = head_place()
    for j in range(plans.HEADS // 8):
      deltas = gpu.load(place, 32 * j, 2)
      for half in range(2):
        scaled += [
          gpu.multiply_add(x, factor, d)
          for x, d in zip(acc[4 * j + 2 * half :][:2], deltas, strict=True)
        ]
    if pair:
      gpu.emit("bar.warp.sync -1;")
      gpu.arrive_there(gpu.there(barrier(plans.READ)), leads_warp())
      alone()
    gpu.meet(plans.P_FULL, plans.BOTH)
    packed = []
    place = weights_place(p_tile)
    for i in range(plans.HEADS // 4):
      ptx = (
        f"{{ .reg .b32 at; xor.b32 at, $1, {16 * (i // 2)}; "
        f"ld.shared.b32 $0, [at+{1024 * (i % 2)}]; }}"
      )
      two = gpu.unpack(gpu.emit(ptx, "=r,r", [place], [gpu.i32()])[0])
      packed.append(
        gpu.pack(*(arith.mulf(x, scaled[2 * i + e]) for e, x in enumerate(two)))
      )
    store_weights(weights_place(ds_tile), packed)
    if pair:
      alone()
      gpu.wait(barrier(plans.READ), parity)
      send_weights(ds_tile, plans.DS_HERE)

  threads_a_row = 128 // (plan.blocks * plans.HEADS)
  thread = gpu.thread()
  at_row = arith.divui(thread, gpu.integer(threads_a_row))
  share = arith.remui(thread, gpu.integer(threads_a_row))
  for ref, name in (
    [(do_wide, "wide")] if which else [(q_wide, "wide"), (q_narrow, "narrow")]
  ):
    columns = (plan.wide if name == "wide" else plan.narrow) // threads_a_row
    first = gpu.times(share, columns // 16)
    rows_lib.permute(ref, name, columns, first=first, row=at_row, plan=plan)
  gpu.fence_async()
  gpu.meet(plans.DS_FULL, plans.BOTH)

  # Columns of dKV, the rotated ones last: they are less work and fall to the
  # warpgroup that arrives earlier.
  wide = [
    ("wide", plan.wide // 128 * which + i) for i in range(plan.wide // 128)
  ]
  chunks = [*wide, *([] if pair and which else [("narrow", which)])]
  # And of dQ: its first, in an array of each width.
  dq_wide_column, dq_narrow_column = (0, 0) if pair else (4 * which, which)

  def multiply_columns(kind, column):
    acc = gpu.wgmma_fence(gpu.zeros(64 if kind == "wide" else 32))
    for half in range(plan.blocks):
      ds = along_columns("ds", half=half)
      if kind == "wide":
        p = along_columns("p", half=half)
        acc = gpu.wgmma(acc, p, along_rows("do_wide", column, half), 4)
      acc = gpu.wgmma(acc, ds, along_rows(f"q_{kind}", column, half), 4)
    gpu.wgmma_commit()
    return acc

  # The writer of weights waits until the other has read the previous ones.
  mine_free, other_free = (
    (plans.DS_FREE, plans.P_FREE) if which else (plans.P_FREE, plans.DS_FREE)
  )
  gpu.meet(other_free, plans.BOTH, stay=False)

  @utils.fori(tiles, (gpu.zeros(256), gpu.zeros(32)))
  def loop(tile, dq):
    dq_wide, dq_narrow = dq
    parity = arith.andi(tile, gpu.integer(1))
    gpu.wait(barrier(plans.FULL), parity)
    of_thread = 0, 1, 8, 9  # from its even row
    even_row = arith.andi(plans.first_row(), gpu.integer(~1))
    place = gpu.add(gpu.address(index_tile), gpu.times(even_row, 4))
    rows = [gpu.load_integer(place, 4 * i) for i in of_thread]
    if which:
      gradients(parity)
    else:
      odd = gpu.is_equal(gpu.bits(plans.first_row(), 0, 1), 1)
      valid = [
        gpu.below(arith.select(odd, rows[i + 1], rows[i]), plan.keys)
        for i in (0, 2)
      ]
      weights(tile, parity, valid)
    gpu.meet(plans.DS_FULL, plans.BOTH)
    if pair:
      gpu.wait(barrier(plans.P_HERE), parity)
      gpu.wait(barrier(plans.DS_HERE), parity)

    dq_wide, dq_narrow = gpu.wgmma_fence(dq_wide), gpu.wgmma_fence(dq_narrow)
    ds = along_rows("ds", half=which if pair else 0)
    dq_wide = gpu.wgmma(dq_wide, ds, along_rows("kv_wide", dq_wide_column), 4)
    dq_narrow = gpu.wgmma(
      dq_narrow, ds, along_rows("kv_narrow", dq_narrow_column), 4
    )
    gpu.wgmma_commit()

    acc = multiply_columns(*chunks[0])
    n = len(dq_wide)
    dq = gpu.wgmma_wait(1, [*dq_wide, *dq_narrow])
    dq_wide, dq_narrow = dq[:n], dq[n:]
    gpu.arrive(barrier(plans.FREE), leads_warp())
    if plan.deterministic:
      even_row = arith.andi(plans.first_row(), gpu.integer(~1))
      at = gpu.add(slot, gpu.times(tile, plans.KEYS), even_row)
      targets = [(key, at, i) for key, i in zip(rows, of_thread, strict=True)]
    else:
      targets = [(key, key, 0) for key in rows]
    place = d_kv_place()
    for i, (kind, column) in enumerate(chunks):
      last = i + 1 == len(chunks)
      following = None if last else multiply_columns(*chunks[i + 1])
      acc = gpu.wgmma_wait(int(not last), acc)
      if last:
        gpu.meet(other_free, plans.BOTH, stay=False)
        if pair:
          gpu.arrive_there(gpu.there(barrier(plans.DONE)), leads_warp())
      if kind == "wide":
        block, offset = gpu.times(plans.rank(plan), 4 * plan.wide), 256 * column
      else:
        block, offset = (
          gpu.times(plans.rank(plan), 4 * plan.narrow),
          4 * plans.C + 128 * column,
        )
      rows_lib.add_columns(
        acc, targets, gpu.add(place, gpu.long(block)), offset, plan
      )
      acc = following
    return dq_wide, dq_narrow

  gpu.meet(mine_free, plans.BOTH)
  dq_wide, dq_narrow = loop.results
  if not which:
    rest = arith.subi(gpu.integer(plan.tiles), tiles)

    @utils.fori(rest, [])
    def _(i, _):
      store_sums(gpu.add(tiles, i), [gpu.real(0.0)] * 2)
      return []

  head, rank = plans.first_row(), plans.rank(plan)
  if pair:
    other = arith.xori(rank, gpu.integer(which))
    head = gpu.add(head, gpu.times(other, plans.HEADS))
  at = gpu.add(
    gpu.pointer(d_q),
    gpu.long(gpu.add(gpu.times(head, 2 * plans.D), gpu.times(plans.quad(), 8))),
  )
  part = rank if pair else gpu.integer(which)
  for acc, column in (
    (dq_wide, gpu.times(part, plans.C)),
    (dq_narrow, gpu.add(gpu.times(part, plans.R), 2 * plans.C)),
  ):
    start = gpu.add(at, gpu.long(column))
    for j in range(len(acc) // 8):
      for half in range(2):
        two = [gpu.pack(*acc[8 * j + 4 * i + 2 * half :][:2]) for i in range(2)]
        offset = 32 * j + half * 8 * 2 * plans.D
        gpu.emit(
          f"st.global.v2.b32 [$0+{offset}], {{$1, $2}};", "l,r,r", [start, *two]
        )
  if pair:
    gpu.meet_cluster()
