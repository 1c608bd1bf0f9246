"""indexer_topk chooses the same keys wherever their pages lie."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.indexer_topk import fp8
from tests.kernels import hlo
from tests.kernels import indexer_topk_test as unpaged
from tests.kernels import inputs
from tests.kernels import rows

B, T, S, K = inputs.B, inputs.T, inputs.S, inputs.K
M = inputs.M
PAGED = (
  unpaged.OPS
  | {  # query tile, key tile, key block: K keys come from several blocks
    f"{bT}x{bS}x{block}": functools.partial(
      unpaged.OPS["chunked"], query_tile=bT, key_tile=bS, key_block=block
    )
    for bT, bS, block in ((64, 4, 8), (5, 12, 24), (8, 2, 4))
  }
)


@functools.cache  # tests share what they compile
def compiled(op, top_k=K):
  return jax.jit(functools.partial(PAGED[op], top_k=top_k))


def in_pages(k, page=4, spare=3, seed=0):
  """A pool with the rows' keys anywhere in it, and the table; S is padded."""
  B, S, I = k.shape
  P, rng = -(-S // page), np.random.default_rng(seed)
  pages_BP = rng.permutation(B * P + spare)[: B * P].reshape(B, P)
  pool = np.full((B * P + spare, page, I), np.nan, np.float32)
  filled = np.full((B, P * page, I), np.nan)
  filled[:, :S] = k
  pool[pages_BP] = filled.reshape(B, P, page, I)
  return jnp.asarray(pool, k.dtype), jnp.asarray(pages_BP, jnp.int32)


def within_keys(start, end):
  """The same ranges; S is not a whole number of pages, the op's S is more."""
  return start, jnp.minimum(end, S)


@pytest.mark.parametrize("kind", inputs.RANGES)
@pytest.mark.parametrize("op", PAGED)
def test_pages_may_lie_anywhere(op, kind):
  """Ties, dead rows and ranges as without pages; what is not seen is NaN."""
  q, k, w, start, end = unpaged.exact_inputs(kind)
  pool, pages = in_pages(k)
  args = q, pool, w, *within_keys(start, end)
  expected = unpaged.loops(q, k, w, start, end)
  unpaged.assert_choice(compiled(op)(*args, pages=pages), expected)
  # A page that no query of the row sees may have any number.
  first, last = (np.asarray(x) for x in within_keys(start, end))
  first, last = np.clip(first, 0, S), np.clip(last, 0, S)
  key_P4 = np.arange(pages.shape[1] * 4).reshape(-1, 4)
  seen_BTP = (
    (key_P4 >= first[..., None, None]) & (key_P4 < last[..., None, None])
  ).any(-1)
  garbage = jnp.resize(jnp.array([-1, 2**30, -(2**31), 10**6]), pages.shape)
  unseen = jnp.where(seen_BTP.any(1), pages, garbage)
  unpaged.assert_choice(compiled(op)(*args, pages=unseen), expected)


def test_rows_that_run_at_once_share_the_loops_over_blocks():
  """As on an accelerator: from the first key that any row sees to the last."""
  q, k, w, start, end = unpaged.exact_inputs("packed")
  pool, pages = in_pages(k)
  run = functools.partial(PAGED["64x4x8"], top_k=K)
  with mock.patch.object(jax, "default_backend", return_value="gpu"):
    actual = jax.jit(run)(q, pool, w, start, end, pages=pages)
  unpaged.assert_choice(actual, unpaged.loops(q, k, w, start, end))


@pytest.mark.parametrize("op", PAGED)
def test_rows_share_pages_and_see_little_of_their_tables(op):
  """Row 1 continues after row 0's first 20 keys; both end early."""
  q, k, w, _, _ = unpaged.exact_inputs()
  k = k.at[1, :20].set(k[0, :20])
  pool, pages = in_pages(k)
  pages = pages.at[1, :5].set(pages[0, :5])
  end = jnp.stack([jnp.arange(T), jnp.arange(T)[::-1]]).astype(jnp.int32) + 2
  pages = pages.at[:, 10:].set(2**30)
  args = jnp.zeros_like(end), end
  expected = unpaged.loops(q, k, w, *args)
  unpaged.assert_choice(compiled(op)(q, pool, w, *args, pages=pages), expected)


@pytest.mark.parametrize("op", ["reference", "64x4x8"])
@pytest.mark.parametrize("top_k", [1, 32, S + 7])
def test_any_number_of_keys_in_pages(op, top_k):
  """One, more than a block has, and more than there are."""
  q, k, w, start, end = unpaged.exact_inputs()
  pool, pages = in_pages(k)
  args = q, pool, w, *within_keys(start, end)
  expected = unpaged.loops(q, k, w, start, end, top_k)
  unpaged.assert_choice(compiled(op, top_k)(*args, pages=pages), expected)


@pytest.mark.parametrize(
  "scores, expected",
  [
    pytest.param([3] * 70, [0, 1, 2, 3], id="all equal"),
    pytest.param([0] * 7 + [1] * 63, [7, 8, 9, 10], id="across a border"),
    pytest.param([1] * 3 + [0] * 66 + [1], [0, 1, 2, 69], id="first and last"),
    pytest.param([1] * 8 + [2] * 3 + [1] * 59, [0, 8, 9, 10], id="pushed out"),
    pytest.param([-np.inf] * 70, [0, 1, 2, 3], id="all minus infinity"),
  ],
)
def test_ties_across_blocks_go_to_the_lowest_key(scores, expected):
  """With and without pages; blocks of 8 keys."""
  q, k, w, start, end = unpaged.inputs_of_scores(scores)
  run = compiled("64x4x8", 4)
  np.testing.assert_array_equal(run(q, k, w, start, end)[0][0, 0], expected)
  pool, pages = in_pages(k, page=2)
  indices, _ = run(q, pool, w, start, end, pages=pages)
  np.testing.assert_array_equal(indices[0, 0], expected)


def test_scores_in_8_bits_in_pages():
  q_BTMI = inputs.normal(0, B, T, M, 16)
  k_BSI = inputs.normal(1, B, S, 16)
  w_BTM, ranges = inputs.normal(2, B, T, M), inputs.ranges("any")
  pool, pages = in_pages(k_BSI)
  args = q_BTMI, pool, w_BTM, *within_keys(*ranges)
  expected = unpaged.loops(
    fp8.rounded(q_BTMI), fp8.rounded(k_BSI), w_BTM, *ranges
  )
  for op in ("reference", "64x4x8"):
    run = functools.partial(PAGED[op], top_k=K, score_dtype="float8_e4m3fn")
    indices, scores = jax.jit(run)(*args, pages=pages)
    np.testing.assert_array_equal(indices, expected[0])
    rows.assert_close(scores, expected[1], rtol=1e-6)


def decoding(S, B=2, M=64, I=128, page=64):
  """A step's program, as a user's would be compiled."""
  struct = jax.ShapeDtypeStruct
  int_BT = struct((B, 1), jnp.int32)
  args = (
    struct((B, 1, M, I), jnp.float32),
    struct((B * S // page, page, I), jnp.float32),
    *(struct((B, 1, M), jnp.float32), int_BT, int_BT),
  )
  pages = struct((B, S // page), jnp.int32)
  run = jax.jit(functools.partial(unpaged.OPS["chunked"], top_k=64))
  jax.config.update("jax_disable_most_optimizations", False)
  try:
    return run.lower(*args, pages=pages).compile()
  finally:
    jax.config.update("jax_disable_most_optimizations", True)


def test_a_decoding_step_takes_no_memory_for_keys_of_the_past():
  short, long = (hlo.temporary_bytes(decoding(S)) for S in (4096, 65536))
  assert long < 1.1 * short
