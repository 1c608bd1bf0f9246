"""The selection kernel is exact, and the op lowers for Hopper."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import operands
from pallas_kernels.ops.indexer_topk.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.ops.indexer_topk.mosaic_gpu import select as select_lib
from pallas_kernels.ops.indexer_topk.mosaic_gpu import sources
from tests.kernels import simulated
from tests.kernels.simulated import memory
from tests.kernels.simulated import threads

S, K = 20000, 1000
INF = np.inf


def choose(scores, start, end, top_k):
  """By a stable sort."""
  row = scores[start:end] + np.float32(0)  # -0.0 is 0.0
  chosen = np.sort(np.argsort(-row, kind="stable")[:top_k]) + start
  missing = top_k - chosen.size
  return (
    np.pad(chosen, (0, missing), constant_values=-1),
    np.pad(scores[chosen], (0, missing), constant_values=-INF),
  )


def simulate(scores, start, end, top_k):
  """What the kernel's threads do with one row."""
  indices = np.full(top_k, -9, np.int32)
  chosen = np.full(top_k, np.nan, np.float32)
  scores = scores.copy()
  garbage = np.random.default_rng(0)
  n = sources.THREADS

  def shared(size):
    words = garbage.integers(0, 2**32, size, np.uint32)
    return memory.Memory(words, shared=True)

  with simulated.run_as(n, sources), simulated.run_as(n, select_lib):
    select_lib.Row(
      *(lambda x=x: memory.Memory(x) for x in (scores, indices, chosen)),
      *map(threads.U32, (start, end)),
      scratch=jax.tree.map(shared, select_lib.Scratch.sizes(top_k)),
      top_k=top_k,
    ).emit()
  return indices, chosen


def rows():
  """Scores by name; S of them."""
  x = np.random.default_rng(1)
  normal = x.normal(size=S)
  signs = x.choice([-1, 1], S)
  some = lambda fraction, value: np.where(x.random(S) < fraction, value, normal)
  # What the kernel takes for a sample of a row that is seen from 3 to S - 5.
  vectors = np.arange(1024) * ((S - 8) // 4) // 1024
  sampled = np.isin(np.arange(S) // 4, vectors)
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
    # Neighbours are alike.
    "clustered": np.repeat(normal[: S // 50], 50) + 0.01 * normal,
  }
  rows = {name: row.astype(np.float32) for name, row in rows.items()}
  tiny = x.integers(0, 9000, S).astype(np.uint32).view(np.float32)
  return rows | {"denormal": tiny}


def assert_exact(scores, start=3, end=S - 5, top_k=K):
  indices, chosen = simulate(scores, start, end, top_k)
  expected_indices, expected_scores = choose(scores, start, end, top_k)
  np.testing.assert_array_equal(indices, expected_indices)
  np.testing.assert_array_equal(chosen, expected_scores)


@pytest.mark.parametrize("name", rows())
def test_scores(name):
  assert_exact(rows()[name])


@pytest.mark.parametrize(
  "start, end",
  [
    *((0, 0), (S, S), (7, 8), (7, K + 6), (7, K + 7), (7, K + 8)),
    *((31, 4096 + 31), (31, 4096 + 32), (33, 4096 + 34), (0, S)),
  ],
)
def test_ranges(start, end):
  for name in ("normal", "few values"):
    assert_exact(rows()[name], start, end)


@pytest.mark.parametrize("top_k", [1, 2, 64, 2048, 5000, select_lib.LARGEST_K])
def test_numbers_of_keys(top_k):
  for name in ("normal", "few values"):
    assert_exact(rows()[name], top_k=top_k)


@pytest.mark.parametrize(
  "name, times",
  [
    *(("normal", 1), ("clustered", 1), ("all tied", 2)),
    *(("better than the sample", 2), ("worse than the sample", 2)),
  ],
)
def test_reads_most_rows_once(name, times):
  """A guess that is bad, or many ties, and the row is read again."""
  read = mock.Mock(wraps=select_lib.Row._row)
  row = lambda self, loads: read(self, loads)
  with mock.patch.object(select_lib.Row, "_row", row):
    assert_exact(rows()[name])
  assert read.call_count == times


def test_long_rows():
  assert_exact(np.tile(rows()["normal"], 9), end=9 * S, top_k=2048)


@pytest.mark.parametrize(
  "T, S, score_dtype",
  [
    (4096, 32768, None),
    (4096, 131072, "float8_e4m3fn"),
    (1, 4096, None),
  ],
)
def test_lowers_at_real_shapes(T, S, score_dtype):
  B, M, I = 1, 64, 128
  args = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((B, T, M, I), jnp.bfloat16),
      ((B, S, I), jnp.bfloat16),
      ((B, T, M), jnp.float32),
      ((B, T), jnp.int32),
      ((B, T), jnp.int32),
    )
  ]

  def step(q, k, w, start, end):
    def op(q, k, w):
      indices, scores = mosaic_gpu.indexer_topk(
        *(operands.Index(q, k, w), start, end, 2048), score_dtype=score_dtype
      )
      return jnp.sum(scores), indices

    return jax.value_and_grad(op, argnums=(0, 1, 2), has_aux=True)(q, k, w)

  lowered = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("score_dtype", [None, "float8_e4m3fn"])
def test_lowers_with_pages(score_dtype):
  """A decoding step of 3 rows; one row's keys are copied at a time."""
  B, M, I, page, P, pool = 3, 64, 128, 64, 32, 1000
  struct = jax.ShapeDtypeStruct
  args = [
    *(struct((B, 1, M, I), jnp.bfloat16), struct((pool, page, I), "bfloat16")),
    *(struct((B, 1, M), jnp.float32), struct((B, 1), jnp.int32)),
    struct((B, P), jnp.int32),
  ]

  def step(q, k, w, end, pages):
    return mosaic_gpu.indexer_topk(
      *(operands.Index(q, k, w), jnp.zeros_like(end), end, 2048),
      pages=pages,
      score_dtype=score_dtype,
    )

  traced = jax.jit(step).trace(*args)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in text
  assert f"tensor<{P}x{page}x{I}xbf16>" in text
  assert f"tensor<{B}x{P}x{page}x{I}xbf16>" not in text


def test_scores_the_keys_of_each_rows_pages(monkeypatch):
  """With kernels that take a key's first number for its score."""

  def scores(q, k, w, start, end, k_scale):
    del w, start, end, k_scale
    return jnp.broadcast_to(k[:, 0].astype(jnp.float32), (len(q), len(k)))

  def select(scores_TS, start, end, top_k):
    del start
    place_S = jnp.arange(scores_TS.shape[1])[None]
    seen_TS = jnp.where(place_S < end[:, None], scores_TS, -jnp.inf)
    chosen, indices = jax.lax.top_k(seen_TS, top_k)
    return indices, chosen

  monkeypatch.setattr(mosaic_gpu.scores_lib, "scores", scores)
  monkeypatch.setattr(mosaic_gpu.select_lib, "select", select)
  B, T, M, I, page = 2, 5, 8, 128, 4
  pool = jnp.arange(9 * page).reshape(9, page, 1).astype(jnp.bfloat16)
  index = operands.Index(
    jnp.ones((B, T, M, I), jnp.bfloat16),
    jnp.broadcast_to(pool, (9, page, I)),
    jnp.ones((B, T, M)),
  )
  pages = jnp.array([[7, 2, 8], [2, 0, -1]])
  end = jnp.broadcast_to(jnp.array([[10], [8]]), (B, T))
  indices, chosen = jax.jit(
    lambda *args: mosaic_gpu.indexer_topk(*args, 2, pages=pages)
  )(index, jnp.zeros_like(end), end)
  expected = [[9, 8], [3, 2]], [[33, 32], [11, 10]]
  for actual, rows in zip((indices, chosen), expected, strict=True):
    for t in range(T):
      np.testing.assert_array_equal(actual[:, t], rows)


@pytest.mark.parametrize(
  "sizes, reason",
  [
    (dict(M=72), "M=72"),
    (dict(I=96), "I=96"),
    (dict(I=64, score_dtype="float8_e4m3fn"), "I=64"),
    (dict(dtype=jnp.float32), "float32"),
    (dict(top_k=select_lib.LARGEST_K + 1), "top_k"),
  ],
)
def test_refuses_what_its_kernels_cannot_do(sizes, reason):
  with pytest.raises(NotImplementedError, match=reason):
    refused(**sizes)


def refused(M=64, I=128, dtype=jnp.bfloat16, top_k=8, score_dtype: Any = None):
  ranges = jnp.zeros((1, 8), jnp.int32)
  q_BTMI = jax.ShapeDtypeStruct((1, 8, M, I), dtype)
  k_BSI = jax.ShapeDtypeStruct((1, 9000, I), dtype)
  w_BTM = jax.ShapeDtypeStruct((1, 8, M), jnp.float32)

  def op(q, k, w):
    index = operands.Index(q, k, w)
    return mosaic_gpu.indexer_topk(
      index, ranges, ranges, top_k, score_dtype=score_dtype
    )

  jax.eval_shape(op, q_BTMI, k_BSI, w_BTM)


def test_chunks_keep_the_memory_law():
  for T, S in ((4096, 131072), (1, 1), (5000, 32768), (8192, 1000)):
    chunk = mosaic_gpu.chunk_size(T, S)
    assert 4 * chunk * S <= 256 << 20
    assert -(-T // chunk) * chunk < T + 8 * (1 + T // chunk)
