"""The selection kernel is exact, and the op lowers for Hopper."""

import dataclasses
import re
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


def simulate(scores, start, end, top_k, parts=1):
  """What the threads of a row's blocks do."""
  indices = np.full(top_k, -9, np.int32)
  chosen = np.full(top_k, np.nan, np.float32)
  scores = scores.copy()
  garbage = np.random.default_rng(0)
  n = sources.THREADS

  def shared(size):
    words = garbage.integers(0, 2**32, size, np.uint32)
    return memory.Memory(words, shared=True)

  scratch = [
    jax.tree.map(shared, select_lib.Scratch.sizes(top_k)) for _ in range(parts)
  ]
  for field in dataclasses.fields(select_lib.Scratch):
    of_blocks = [getattr(block, field.name) for block in scratch]
    for words in of_blocks:
      words.blocks = of_blocks
  with (
    simulated.run_as(n, sources),
    simulated.run_as(n, select_lib),
    mock.patch.object(select_lib, "cluster", mock.Mock()) as cluster,
  ):
    rows = []
    for part in range(parts):
      cluster.rank.return_value = threads.U32(part)
      row = select_lib.Row(
        *(lambda x=x: memory.Memory(x) for x in (scores, indices, chosen)),
        *map(threads.U32, (start, end)),
        scratch=scratch[part],
        top_k=top_k,
        parts=parts,
      )
      rows.append(row)
    phases = [select_lib.Row.list_part, select_lib.Row.send]
    for phase in (*phases[: 1 + (parts > 1)], select_lib.Row.finish):
      for row in rows:
        phase(row)
      threads.barrier()
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


def assert_exact(scores, start=3, end=S - 5, top_k=K, parts=1):
  indices, chosen = simulate(scores, start, end, top_k, parts)
  expected_indices, expected_scores = choose(scores, start, end, top_k)
  np.testing.assert_array_equal(indices, expected_indices)
  np.testing.assert_array_equal(chosen, expected_scores)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", rows())
def test_scores(name, parts):
  assert_exact(rows()[name], parts=parts)


@pytest.mark.parametrize(
  "start, end",
  [
    *((0, 0), (S, S), (7, 8), (7, K + 6), (7, K + 7), (7, K + 8)),
    *((31, 4096 + 31), (31, 4096 + 32), (33, 4096 + 34), (0, S)),
  ],
)
def test_ranges(start, end):
  for name in ("normal", "few values"):
    for parts in (1, 8):
      assert_exact(rows()[name], start, end, parts=parts)


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
  row = lambda self, *args: read(self, *args)
  with mock.patch.object(select_lib.Row, "_row", row):
    assert_exact(rows()[name])
  assert read.call_count == times


def test_blocks_share_few_and_long_rows():
  parts = {T: select_lib.num_parts(T, 131072) for T in (1, 15, 16, 64, 67)}
  assert parts == {1: 8, 15: 8, 16: 6, 64: 2, 67: 1}
  sizes = 100, 32767, 32768, 65536, 131072, 10**6
  parts = [select_lib.num_parts(1, size) for size in sizes]
  assert parts == [1, 1, 2, 4, 8, 8]


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


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("B, T", [(64, 1), (3, 2), (1, 512)])
def test_lowers_with_pages(B, T, eight):
  """No key is copied, and as many rows as fit are scored at once."""
  M, I, page, P, pool = 64, 128, 64, 500, 1000
  struct = jax.ShapeDtypeStruct
  k_dtype = jnp.float8_e4m3fn if eight else jnp.bfloat16
  args = [
    *(struct((B, T, M, I), jnp.bfloat16), struct((pool, page, I), k_dtype)),
    *(struct((B, T, M), jnp.float32), struct((B, T), jnp.int32)),
    struct((B, P), jnp.int32),
    struct((pool, page), jnp.float32) if eight else None,
  ]

  def step(q, k, w, end, pages, k_scale):
    return mosaic_gpu.indexer_topk(
      *(operands.Index(q, k, w, k_scale), jnp.zeros_like(end), end, 2048),
      pages=pages,
    )

  traced = jax.jit(step).trace(*args)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 2
  name = "f8E4M3FN" if eight else "bf16"
  keys = rf"tensor<(?:{B}x)?{P}x{page}x{I}x{name}>"
  assert not re.search(keys, text)


@pytest.mark.parametrize("chunk_bytes", [1 << 28, 6 * 4 * 256, 1])
@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("eight", [False, True])
def test_scores_the_keys_of_each_rows_pages(eight, T, chunk_bytes, monkeypatch):
  """With kernels that take a key's number in the pool for its score, and the
  first weight of a query with it; in chunks of some rows, or of one row's
  queries."""
  B, M, I, page, K = 5, 8, 128, 64, 2
  number = np.arange(9 * page).reshape(9, page)

  def scores(q, k, w, start, end, pages, k_scale):
    del start, end
    assert q.dtype == k.dtype
    k_first, k_second = k[..., 0].astype(jnp.float32), k[..., 1]
    number = k_first * page + k_second if k_scale is None else k_scale
    number_B1S = number[pages].reshape(len(q), 1, -1)
    return jnp.pad(number_B1S + w[:, :, :1], [(0, 0), (0, 0), (0, page)])

  def select(scores_TS, start, end, top_k):
    del start
    place_S = jnp.arange(scores_TS.shape[1])[None]
    seen_TS = jnp.where(place_S < end[:, None], scores_TS, -jnp.inf)
    chosen, indices = jax.lax.top_k(seen_TS, top_k)
    return indices, chosen

  monkeypatch.setattr(mosaic_gpu.scores_lib, "scores", scores)
  monkeypatch.setattr(mosaic_gpu.select_lib, "select", select)
  monkeypatch.setattr(mosaic_gpu, "_CHUNK_BYTES", chunk_bytes)
  rng = np.random.default_rng(0)
  k = np.zeros((9, page, I), np.float32)
  k[..., 0], k[..., 1] = number // page, number % page
  w = rng.integers(0, 1000, (B, T, M)).astype(np.float32)
  dtype = jnp.float8_e4m3fn if eight else jnp.bfloat16
  index = operands.Index(
    jnp.ones((B, T, M, I), jnp.bfloat16),
    jnp.asarray(k, dtype),
    jnp.asarray(w),
    jnp.asarray(number, jnp.float32) if eight else None,
  )
  pages = rng.integers(0, 9, (B, 3)).astype(np.int32)
  end = rng.integers(K, 3 * page, (B, T)).astype(np.int32)
  indices, chosen = jax.jit(
    lambda *args: mosaic_gpu.indexer_topk(*args, K, pages=jnp.asarray(pages))
  )(index, jnp.zeros(end.shape, jnp.int32), jnp.asarray(end))
  # Of queries of ones the rotation leaves one number, of a known scale.
  scale = 2.0**-5 if eight else 1.0
  for b, t in np.ndindex(B, T):
    row = number[pages[b]].reshape(-1)[: end[b, t]]
    best = np.argsort(-row, kind="stable")[:K]
    np.testing.assert_array_equal(indices[b, t], best)
    np.testing.assert_array_equal(chosen[b, t], row[best] + scale * w[b, t, 0])


@pytest.mark.parametrize(
  "sizes, reason",
  [
    (dict(M=72), "M=72"),
    (dict(I=96), "I=96"),
    (dict(I=64, score_dtype="float8_e4m3fn"), "I=64"),
    (dict(dtype=jnp.float32), "float32"),
    (dict(top_k=select_lib.LARGEST_K + 1), "top_k"),
    (dict(page=96), "96 keys"),
    (dict(page=64, score_dtype="float8_e4m3fn"), "k_scale"),
  ],
)
def test_refuses_what_its_kernels_cannot_do(sizes, reason):
  with pytest.raises(NotImplementedError, match=reason):
    refused(**sizes)


def refused(
  M=64, I=128, dtype=jnp.bfloat16, top_k=8, score_dtype: Any = None, page=None
):
  ranges = jnp.zeros((1, 8), jnp.int32)
  q_BTMI = jax.ShapeDtypeStruct((1, 8, M, I), dtype)
  keys = (1, 9000) if page is None else (30, page)
  k_BSI = jax.ShapeDtypeStruct((*keys, I), dtype)
  w_BTM = jax.ShapeDtypeStruct((1, 8, M), jnp.float32)

  def op(q, k, w):
    index = operands.Index(q, k, w)
    return mosaic_gpu.indexer_topk(
      *(index, ranges, ranges, top_k),
      pages=None if page is None else ranges,
      score_dtype=score_dtype,
    )

  jax.eval_shape(op, q_BTMI, k_BSI, w_BTM)


def test_chunks_keep_the_memory_law():
  sizes = (1, 4096, 131072), (64, 1, 131072), (900, 2, 131072), (1, 1, 1)
  for B, T, S in (*sizes, (3, 5000, 32768), (2, 8192, 1000)):
    rows, chunk = mosaic_gpu.chunk_size(B, T, S)
    assert 4 * rows * chunk * S <= 256 << 20
    assert 1 <= rows <= B and (rows == 1 or chunk == T)
    assert T <= -(-T // chunk) * chunk < T + 8 * (1 + T // chunk)
