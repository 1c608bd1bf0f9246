"""Sums rows by key in one fixed order: the deterministic gradient of kv.

A chunk of queries writes the rows to be added to each key to memory, one by
one. They are sorted by key, so that one warp sums all rows of a key in the
order of queries.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Final

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import threads
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32

_WARPS: Final = 4  # per block; each has one key at a time
_PAIRS: Final = 9  # of adjacent columns per thread


def sum_rows(
  block: U32,
  order: Place,
  ends: Place,
  rows: Place,
  d_kv: Place,
  *,
  width: int,
  keys: int,
) -> None:
  """Adds to each key of a block its rows.

  Args:
    block: Its keys are those from 4 times this on.
    order: Rows by key.
    ends: Where each key's rows begin in `order`, [keys + 1].
    rows: [rows, width], float32, like `d_kv`.
    d_kv: [keys, width].
    width: 576 columns.
    keys: Of all batch rows.
  """
  thread = instructions.thread()
  column = thread.bits(0, 5) * 8
  key = block * _WARPS + thread.bits(5, 2)
  # Warps beyond the last key: that one's rows from its end to its end.
  inside = key < keys
  key = inside.where(key, keys - 1)
  bounds = ends + key * 4
  first, end = (bounds.load_constant(4 * i) for i in range(2))
  first = inside.where(first, end)
  source = rows + column

  def add(i, *total):
    row = (order + (first + i) * 4).load_constant()
    numbers = _load(source.step(row, 4 * width))
    return [x + y for x, y in zip(total, numbers, strict=True)]

  total = threads.loop(end - first, add, [F32(0.0)] * (2 * _PAIRS))
  target = (d_kv + column).step(key, 4 * width)

  @threads.when(first.differs(end))
  def _():
    before = _load(target)
    after = [x + y for x, y in zip(before, total, strict=True)]
    for i in range(_PAIRS):
      target.store(after[2 * i :][:2], 256 * i)


def _load(place: Place) -> list[F32]:
  """Loads this thread's columns of a row."""
  return [x for i in range(_PAIRS) for x in place.load_floats(2, 256 * i)]


def _kernel(order_ref, ends_ref, rows_ref, d_kv_ref):
  keys, width = d_kv_ref.shape[0] * d_kv_ref.shape[1], d_kv_ref.shape[2]

  @threads.code(*(threads.REF,) * 4, threads.NUMBER)
  def emit(*args):
    *refs, block = args
    sum_rows(block, *map(Place.of, refs), width=width, keys=keys)

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
    chunk: Queries per chunk, at most all.
    indices: Selected keys.
    queries: Queries of one batch row.
    d_kv_ref: Sums of the rows, [B, S, CR], float32.
    outputs: Other outputs of the kernel.
  """
  BT, K = indices.shape
  B, S, width = d_kv_ref.shape
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
