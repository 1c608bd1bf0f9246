"""The kernel for TPUs: what it chooses, simulated on a CPU; and it compiles."""

import functools

import chex
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import operands
from pallas_kernels import shapes
from pallas_kernels.ops.indexer_topk import reference
from pallas_kernels.ops.indexer_topk.mosaic_tpu import op as mosaic_tpu
from pallas_kernels.ops.indexer_topk.mosaic_tpu import select as select_lib
from pallas_kernels.tpu import chip as tpu
from tests.kernels import inputs
from tests.kernels import rows
from tests.kernels import tpu_topologies

bS = mosaic_tpu.bS
INF = np.inf


def topk(q, k, w, *args, **kwargs):
  index = operands.Index(q, k, w)
  return mosaic_tpu.indexer_topk(index, *args, **kwargs)


def topk_of_reference(q, k, w, *args, **kwargs):
  index = operands.Index(q, k, w)
  return reference.indexer_topk(index, *args, **kwargs)


def choose(scores, start, end, top_k):
  """By a stable sort."""
  row = scores[start:end] + np.float32(0)  # -0.0 is 0.0
  chosen = np.sort(np.argsort(-row, kind="stable")[:top_k]) + start
  return np.pad(chosen, (0, top_k - chosen.size), constant_values=-1)


def select(scores_QS, start, end, top_k):
  """What the kernel chooses of given scores."""
  Q, S = scores_QS.shape
  nS = -(-S // bS)
  seen = np.arange(S) >= start[:, None]
  seen &= np.arange(S) < end[:, None]
  order = select_lib.order(jnp.asarray(scores_QS))
  order = jnp.where(seen, order, select_lib.HIDDEN)
  order = jnp.pad(
    order, [(0, 0), (0, -S % bS)], constant_values=select_lib.HIDDEN
  )
  order = order.reshape(Q, nS, 128, 32).transpose(1, 3, 0, 2)
  visible = jnp.maximum(jnp.asarray(end - start, jnp.int32), 0)[:, None]

  def kernel(order_ref, visible_ref, index_ref, scratch_ref):
    scratch_ref[...] = order_ref[...]
    tiles = jnp.int32(0), jnp.int32(nS)
    select_lib.select(scratch_ref, index_ref, tiles, visible_ref[...], top_k)

  K = top_k + -top_k % 128
  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((Q, K), jnp.int32),
    scratch_shapes=[pltpu.VMEM(order.shape, jnp.int32)],
    interpret=tpu.interpret(),
  )(order, jnp.broadcast_to(visible, (Q, 128)))


def score_rows(S, K):
  """Scores by name; S of them."""
  x = np.random.default_rng(1)
  normal = x.normal(size=S)
  signs = x.choice([-1, 1], S)
  some = lambda fraction, value: np.where(x.random(S) < fraction, value, normal)
  sampled = np.arange(S) % 32 == 0  # what the first guesses are made from
  rows = {
    "normal": normal,
    "far from zero": 1000 + normal,
    "negative": -1000 + normal,
    "of every size": signs * np.exp2(100 * normal.clip(-1, 1)),
    "all tied": np.zeros(S),
    "zeros of both signs": 0.0 * signs,
    "mostly zero": np.where(x.random(S) < 0.01, normal, 0.0 * signs),
    "few values": x.integers(-3, 4, S),
    "two values": x.integers(0, 2, S) + 1e-6,
    "ascending": np.arange(S),
    "descending": -np.arange(S),
    "infinite": some(0.01, INF),
    "mostly infinite": some(0.7, INF),
    "mostly minus infinity": some(0.99, -INF),
    "better than the sample": normal + 9 * ~sampled,
    "worse than the sample": normal + 9 * sampled,
    "one tie too many": np.where(
      np.arange(S) % 50 == 7, 2.0, normal.clip(-1, 1)
    ),
    "at the end": np.where(np.arange(S) >= S - K, 1.0, -1.0) * (2 + normal**2),
  }
  return {name: row.astype(np.float32) for name, row in rows.items()}


def case(B, T, S, M, I):
  """Row 0 has few and exact scores, row 1 any; some queries see little."""
  exact = lambda seed, *shape: inputs.grid(seed, *shape, largest=1)
  q_BTMI, k_BSI, w_BTM = (
    jnp.stack([kind(seed, *shape) for kind in (exact, inputs.normal)])
    for seed, shape in enumerate(((T, M, I), (S, I), (T, M)))
  )
  w_BTM = w_BTM.at[:, 3].set(0.0)
  rng = np.random.default_rng(3)
  start_BT = rng.integers(-5, S // 2, (B, T))
  end_BT = rng.integers(S // 3, S + 5, (B, T))
  start_BT[:, :3] = [[0, 10, bS - 3]]
  end_BT[:, :3] = [[S, 200, 2**31 - 1]]
  start_BT[1, 8:16] = bS + 9  # a block of queries that sees one tile of two
  start_BT[1, 10], end_BT[1, 10] = -(2**31), 0
  end_BT[1, 16:] = 0  # one that sees nothing
  ranges = (jnp.asarray(x, jnp.int32) for x in (start_BT, end_BT))
  return q_BTMI, k_BSI, w_BTM, *ranges


def test_scores_and_ranges():
  S, K = 2 * bS + 900, 1000
  names, scores_QS = zip(*score_rows(S, K).items())
  extra = [scores_QS[0]] * 6
  scores_QS = np.stack([*scores_QS, *extra])
  start, end = np.full((2, 24), [[3], [S - 5]])
  start[18:], end[18:] = [0, S, 7, 7, 7, 31], [0, S, 8, K + 6, K + 7, K + 32]
  actual = np.asarray(select(scores_QS, start, end, K))
  for q, name in enumerate([*names, *("ranges" for _ in extra)]):
    expected = choose(scores_QS[q], start[q], end[q], K)
    np.testing.assert_array_equal(actual[q, :K], expected, name)
  np.testing.assert_array_equal(actual[:, K:], -1)


@pytest.mark.slow
def test_more_keys_than_a_sample_has():
  S, K = bS - 96, bS - 1000
  scores_QS = inputs.normal(0, 8, S)
  start = np.array([0, 0, 9, 9, S, 0, 1, 2])
  end = np.array([0, S, S, K + 9, S, K + 1, K, S])
  actual = np.asarray(select(scores_QS, start, end, K))
  for q in range(8):
    expected = choose(np.asarray(scores_QS[q]), start[q], end[q], K)
    np.testing.assert_array_equal(actual[q, :K], expected)


@pytest.mark.slow
def test_chooses_what_the_reference_chooses():
  B, T, S, M, I, K = 2, 19, bS + 400, 3, 16, 300
  args = case(B, T, S, M, I)
  run = jax.jit(functools.partial(topk, top_k=K, query_tile=8))
  indices, scores = run(*args)
  expected = topk_of_reference(*args, top_k=K)
  next_best = topk_of_reference(*args, top_k=K + 1)[1].min(-1)
  kept = expected[1].min(-1)
  assert ((kept == next_best) | (kept > next_best + 1e-5)).all()
  np.testing.assert_array_equal(indices, expected[0])
  np.testing.assert_array_equal(scores[0], expected[1][0])
  rows.assert_close(scores, expected[1], rtol=1e-6)
  chex.assert_trees_all_equal(run(*args), (indices, scores), strict=True)


def test_pages_are_put_in_order(monkeypatch):
  """What the kernel gets are the rows' keys; S is theirs, not the pool's."""
  B, T, M, I, page = 2, 3, 2, 4, 8
  k_BSI = inputs.normal(0, B, 3 * page, I)
  pages = np.array([[4, 1, 6], [1, 0, 2]])
  k_BSI = k_BSI.at[1, :page].set(k_BSI[0, page : 2 * page])
  pool = jnp.zeros((9, page, I)).at[pages].set(k_BSI.reshape(B, 3, page, I))
  q, w = inputs.normal(1, B, T, M, I), inputs.normal(2, B, T, M)
  start, end = jnp.zeros((B, T), jnp.int32), jnp.full((B, T), 99, jnp.int32)
  got = []

  def indices(q, k, w, start, end, top_k, bQ):
    del q, w, start, bQ
    got.append((k, end))
    return jnp.zeros((B, T, top_k), jnp.int32)

  monkeypatch.setattr(mosaic_tpu, "_indices", indices)
  topk(q, pool, w, start, end, 2, pages=jnp.asarray(pages))
  np.testing.assert_array_equal(got[0][0], k_BSI)
  np.testing.assert_array_equal(got[0][1], 3 * page)


@pytest.mark.parametrize(
  "kwargs, reason",
  [
    (dict(dtype=jnp.float16), "float16"),
    (dict(S=1 << 23), "vector memory"),
  ],
)
def test_refusals_name_their_reason(kwargs, reason):
  op = functools.partial(topk, top_k=2048)
  with pytest.raises(NotImplementedError, match=reason):
    jax.eval_shape(op, *structs(**kwargs))


@pytest.mark.parametrize("T, expected", [(1, 8), (8, 8), (9, 16), (4096, 32)])
def test_blocks_are_no_larger_than_there_are_queries(T, expected):
  bQ = mosaic_tpu.block_size(T, 131072, 64, 128, 2048, itemsize=2)
  assert bQ == expected


def structs(T=4096, S=131072, M=64, I=128, dtype=jnp.bfloat16):
  struct = jax.ShapeDtypeStruct
  number = struct((1, T), jnp.int32)
  return (
    struct((1, T, M, I), dtype),
    struct((1, S, I), dtype),
    struct((1, T, M), jnp.float32),
    number,
    number,
  )


def step(q, k, w, start, end):
  """With the scores and gradients, all of which are zero."""

  def op(q, k, w):
    indices, scores = topk(q, k, w, start, end, 2048)
    return jnp.sum(scores), indices

  return jax.value_and_grad(op, argnums=(0, 1, 2), has_aux=True)(q, k, w)


def choice(q, k, w, start, end):
  return topk(q, k, w, start, end, 2048)[0]


@pytest.mark.slow
def test_scores_that_nobody_reads_are_not_computed():
  S = shapes.SHAPES["128k"].S
  compiled = tpu_topologies.compile_step("tpu7x", choice, structs(S=S))
  text = str(compiled.as_text())
  assert "indexer_topk_q32" in text
  assert " gather(" not in text
  # The memory law: queries and keys once more, nothing of T x S.
  memory = compiled.memory_analysis()
  assert memory is not None and memory.temp_size_in_bytes < 256 << 20


@pytest.mark.tpus
@pytest.mark.parametrize("S", [4096, 32_768, 131_072])
@pytest.mark.parametrize("chip", tpu_topologies.TOPOLOGIES)
def test_compiles_at_real_shapes(chip, S):
  compiled = tpu_topologies.compile_step(chip, step, structs(S=S))
  assert "indexer_topk_q32" in str(compiled.as_text())


@pytest.mark.slow
@pytest.mark.parametrize(
  "kwargs",
  [
    dict(T=1, S=4097),
    dict(T=40, S=1000, M=5, I=96),
    dict(T=40, S=9000, M=6, I=32, dtype=jnp.float32),
    dict(T=9, S=1 << 20),
  ],
)
def test_compiles_at_odd_shapes(kwargs):
  compiled = tpu_topologies.compile_step("v6e", step, structs(**kwargs))
  assert "indexer_topk_q" in str(compiled.as_text())
