"""The kernel of the index scores: its plan, the sums of a product's threads,
and that it lowers for CUDA.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import shapes
from pallas_kernels.ops.indexer_topk.mosaic_gpu import plan as plan_lib
from pallas_kernels.ops.indexer_topk.mosaic_gpu import scores as scores_lib
from tests.kernels import by_thread
from tests.kernels import simulated
from tests.kernels.simulated import memory
from tests.kernels.simulated import threads

bS = plan_lib.bS


def inputs(B, T, P, page=128, M=64, I=128, dtype=jnp.bfloat16, pool=3000):
  struct = jax.ShapeDtypeStruct
  scaled = dtype == jnp.float8_e4m3fn
  number = struct((B, T), jnp.int32)
  return (
    struct((B, T, M, I), dtype),
    struct((pool, page, I), dtype),
    struct((B, T, M), jnp.float32),
    number,
    number,
    struct((B, P), jnp.int32),
    struct((pool, page), jnp.float32) if scaled else None,
  )


def lower(**kwargs):
  traced = jax.jit(scores_lib.scores).trace(*inputs(**kwargs))
  return traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("heads", plan_lib.HEADS)
def test_warpgroups_share_few_queries_and_their_keys(heads):
  """Together, all of a tile's keys with all of a group's queries, once."""
  each = plan_lib.COLUMNS // heads
  for T in (1, each, each + 1, 2 * each, 2 * each + 1, 9 * each):
    plan = plan_lib.Plan.of(T, heads)
    seen = []
    for warpgroup in range(plan_lib.WARPGROUPS):
      reader = warpgroup if plan.readers > 1 else 0
      columns = plan.columns(5, reader, heads)
      assert columns.size == plan.accumulators * plan_lib.COLUMNS
      seen += [
        (column, half)
        for column in range(columns.start, columns.start + columns.size)
        for half in plan.halves(warpgroup)
      ]
    of_group = range(5 * plan.queries * heads, 6 * plan.queries * heads)
    assert sorted(seen) == [
      (column, half) for column in of_group for half in (0, 1)
    ]
    # Few queries of a row are one group, as narrow as can be.
    if T <= 2 * each:
      assert plan.readers == 1 and T <= plan.queries < T + each


def visits(shares, groups):
  """(group, tile) in the order in which each block of the kernel has them."""
  for begin, stop, first_group, last_group in np.asarray(shares):
    mine = []
    for group in range(first_group, last_group):
      before, after, shift = np.asarray(groups[group])
      positions = range(max(begin, before), min(stop, after))
      mine += [(group, i + shift) for i in positions]
    assert len(mine) == stop - begin
    yield mine


@pytest.mark.parametrize("kind", ["causal", "any", "dead", "one"])
def test_each_visible_tile_once(kind):
  bT, T, S = 8, 96, 1000
  rng = np.random.default_rng(0)
  if kind == "causal":
    start, end = np.zeros(T, int), np.arange(1, T + 1) * S // T
  else:
    start = rng.integers(0, S, T)
    end = np.minimum(start + rng.integers(-50, S, T), S)
    start[16:24], end[16:24] = 70, 60  # a group that sees nothing
  if kind == "dead":
    end[:] = start
  if kind == "one":
    end[:] = start
    start[50], end[50] = 130, 131
  seen = set()
  for t in range(T):
    if start[t] < end[t]:
      group = slice(t // bT * bT, t // bT * bT + bT)
      alive = start[group] < end[group]
      first, last = start[group][alive].min(), end[group][alive].max()
      tiles = range(first // bS, -(-last // bS))
      seen |= {(t // bT, tile) for tile in tiles}

  start, end = (jnp.asarray(x, jnp.int32) for x in (start, end))
  shares, groups = plan_lib.share_out(
    start.reshape(-1, bT), end.reshape(-1, bT)
  )
  visited = list(visits(shares, groups))
  assert sum(visited, []) == sorted(seen)
  sizes = [len(mine) for mine in visited]
  assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("heads", plan_lib.HEADS)
def test_threads_sum_over_heads(heads, scaled):
  """Of a product of 64 keys with all heads of some queries, the last of which
  does not exist."""
  keys, columns = 64, 128
  queries = columns // heads
  T, S, query, key = 9 + queries, 256, 10, 128
  x = np.random.default_rng(heads)
  product = x.normal(size=(keys, columns)).astype(np.float32)
  product[7] = -1  # no head is active
  w = x.normal(size=columns).astype(np.float32)
  w[:heads] = -np.abs(w[:heads])
  scale = np.exp2(x.integers(-3, 3, keys)).astype(np.float32)
  written = np.full((T, S), np.nan, np.float32)
  with simulated.run_as(128, scores_lib):
    scores_lib.write(
      by_thread.registers(product),
      by_thread.by_column(w),
      [by_thread.by_row(scale)] if scaled else [],
      memory.Place(written),
      threads.U32(query),
      threads.U32(T),
      threads.U32(key),
      heads,
      S,
    )
  weighted = np.maximum(product.astype(np.float64), 0) * w
  sums = weighted.reshape(keys, queries, heads).sum(2)
  expected = np.full((T, S), np.nan)
  expected[query:, key : key + keys] = (
    sums * (scale if scaled else np.ones(keys))[:, None]
  ).T[:-1]
  np.testing.assert_allclose(written, expected, rtol=2e-6, atol=1e-6)
  assert not np.signbit(written[query:, key + 7]).any()


@pytest.mark.parametrize(
  "kwargs",
  [
    *(
      dict(B=1, T=2048, P=1, page=shapes.SHAPES[name].S, pool=1)
      for name in ("32k", "128k")
    ),
    *(dict(B=64, T=T, P=1024, pool=70_000) for T in (1, 2, 4)),
    dict(B=64, T=1, P=1024, dtype=jnp.float8_e4m3fn),
    dict(B=1, T=512, P=256, dtype=jnp.float8_e4m3fn),
    dict(B=2, T=3, P=3, page=64),
    dict(B=1, T=100, P=1, page=1024, M=32),
    dict(B=3, T=1, P=8, M=16, I=64),
  ],
)
def test_lowers_for_cuda(kwargs):
  assert "mosaic_gpu" in lower(**kwargs).as_text()
