"""Sums rows by key in one fixed order: the deterministic gradient of kv.

A chunk of queries writes the rows to be added to each key to memory, one by
one. They are sorted by key, so that one warp sums all rows of a key in the
order of queries.
"""

from collections.abc import Callable
from collections.abc import Sequence

import jax
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Int

from pallas_kernels.ops.sparse_mla.mosaic_gpu import instructions as gpu

_WARPS = 4  # per block; each has one key at a time
_PAIRS = 9  # of adjacent columns per thread


def _sum(order, ends, rows, d_kv, block, *, width, keys):
  thread = gpu.thread()
  column = gpu.long(gpu.times(gpu.bits(thread, 0, 5), 8))
  key = gpu.add(gpu.times(block, _WARPS), gpu.bits(thread, 5, 2))
  # Warps beyond the last key: that one's rows from its end to its end.
  inside = gpu.below(key, keys)
  key = arith.select(inside, key, gpu.integer(keys - 1))
  end_place = gpu.add(gpu.pointer(ends), gpu.long(gpu.times(key, 4)))
  first, end = (gpu.load_constant(end_place, 4 * i) for i in range(2))
  first = arith.select(inside, first, end)
  source = gpu.add(gpu.pointer(rows), column)
  row_bytes = gpu.integer(4 * width, gpu.i64())
  zeros = [gpu.real(0.0)] * (2 * _PAIRS)

  def load(place):
    return [
      x
      for i in range(_PAIRS)
      for x in gpu.emit(
        f"ld.global.v2.f32 {{$0, $1}}, [$2+{256 * i}];",
        "=f,=f,l",
        [place],
        [gpu.f32()] * 2,
      )
    ]

  @utils.fori(arith.subi(end, first), zeros)
  def loop(i, total):
    at = gpu.long(gpu.times(gpu.add(first, i), 4))
    row = gpu.load_constant(gpu.add(gpu.pointer(order), at), 0)
    row = gpu.add(source, arith.muli(gpu.long(row), row_bytes))
    return [arith.addf(x, y) for x, y in zip(total, load(row), strict=True)]

  target = gpu.add(
    gpu.pointer(d_kv), column, arith.muli(gpu.long(key), row_bytes)
  )
  some = arith.cmpi(arith.CmpIPredicate.ne, first, end)
  with utils.when(some):
    before = load(target)
    after = [
      arith.addf(x, y) for x, y in zip(before, loop.results, strict=True)
    ]
    for i in range(_PAIRS):
      gpu.emit(
        f"st.global.v2.f32 [$0+{256 * i}], {{$1, $2}};",
        "l,f,f",
        [target, *after[2 * i :][:2]],
      )


def _kernel(order_ref, ends_ref, rows_ref, d_kv_ref):
  keys, width = d_kv_ref.shape[0] * d_kv_ref.shape[1], d_kv_ref.shape[2]
  plain = plgpu.RefType()

  @plgpu.inline_mgpu(arg_types=(*(plain,) * 4, plgpu.Layout.WG_SPLAT))
  def emit(_, *args):
    *refs, block = args
    _sum(*refs, block.registers.item(), width=width, keys=keys)

  emit(order_ref, ends_ref, rows_ref, d_kv_ref, lax.axis_index("block"))


def by_chunk(
  kernel: Callable[..., None],
  args: Sequence[Array],
  chunk: int,
  indices: Int[Array, "BT K"],
  queries: int,
  d_kv_ref: jax.Ref,
  outputs: Sequence[jax.ShapeDtypeStruct],
) -> list[Array]:
  """Runs `kernel` on one chunk of queries after another, and sums its rows.

  Args:
    kernel: Takes the first query, `args`, and references to rows of the chunk
      [chunk K, CR] and to each of `outputs`, of all queries.
    args: Arguments of the kernel, of all queries.
    chunk: Queries per chunk.
    indices: Selected keys.
    queries: Queries of one batch row.
    d_kv_ref: Sums of the rows, [B, S, CR], float32.
    outputs: Other outputs of the kernel.
  """
  BT, K = indices.shape
  B, S, width = d_kv_ref.shape
  chunk = min(chunk, BT)
  results = [jax.new_ref(jnp.zeros(x.shape, x.dtype)) for x in outputs]
  rows_ref = jax.new_ref(jnp.zeros((chunk * K, width), jnp.float32))
  add_up = plgpu.kernel(
    _kernel,
    out_type=(),
    grid=(-(-B * S // _WARPS),),
    grid_names=("block",),
    kernel_name="sparse_mla_key_sums",
  )

  def step(carry, first):
    kernel(first[None], *args, rows_ref, *results)
    query = first + jnp.arange(chunk, dtype=jnp.int32)
    keys = indices.at[query].get(mode="fill", fill_value=-1)
    valid = (keys >= 0) & (keys < S)
    keys = jnp.where(valid, keys + (query // queries * S)[:, None], B * S)
    keys, order = lax.sort_key_val(
      keys.reshape(-1), jnp.arange(chunk * K, dtype=jnp.int32), is_stable=True
    )
    bounds = jnp.arange(B * S + 1, dtype=jnp.int32)
    ends = jnp.searchsorted(keys, bounds, side="left").astype(jnp.int32)
    add_up(order, ends, rows_ref, d_kv_ref)
    return carry, None

  lax.scan(step, None, jnp.arange(0, BT, chunk, dtype=jnp.int32))
  return [x[...] for x in results]
