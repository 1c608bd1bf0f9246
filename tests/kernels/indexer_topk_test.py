"""indexer_topk chooses exactly the keys that its contract names."""

import functools
from unittest import mock

import chex
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import operands
from pallas_kernels.ops.indexer_topk import api
from pallas_kernels.ops.indexer_topk import chunked_xla
from pallas_kernels.ops.indexer_topk import fp8
from pallas_kernels.ops.indexer_topk import reference
from tests.kernels import inputs
from tests.kernels import oracles
from tests.kernels import rows

B, T, S, K = inputs.B, inputs.T, inputs.S, inputs.K
M, I = inputs.M, inputs.I
FLT_MAX = float(np.finfo(np.float32).max)


def of_arrays(op):
  """`op` of an index's three arrays, of which tests change one or another."""
  return lambda q, k, w, *args, **kwargs: op(
    operands.Index(q, k, w), *args, **kwargs
  )


OPS = {
  "reference": of_arrays(reference.indexer_topk),
  "chunked": of_arrays(chunked_xla.indexer_topk),
}
TILED = {  # one by one, odd, larger than T and S; by default, powers of two
  f"{query_tile}x{key_tile}": functools.partial(
    OPS["chunked"], query_tile=query_tile, key_tile=key_tile
  )
  for query_tile, key_tile in ((1, 1), (5, 7), (64, 128))
}


@functools.cache  # tests share what they compile
def compiled(op, top_k=K):
  return jax.jit(functools.partial((OPS | TILED)[op], top_k=top_k))


def exact_inputs(kind="any", B=B, T=T):
  """Few and exact scores: the tie rule makes most of the choices.

  The weights of one query are 0, the heads of another cancel; those of a third
  are negative.
  """
  q_BTMI = inputs.grid(0, B, T, M, I, largest=1)
  k_BSI = inputs.grid(1, B, S, I, largest=1)
  w_BTM = inputs.grid(2, B, T, M) / 2
  w_BTM = w_BTM.at[:, 9].set(0.0)
  q_BTMI = q_BTMI.at[:, 10].set(q_BTMI[:, 10, :1])
  w_BTM = w_BTM.at[:, 10].set(jnp.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0]))
  w_BTM = w_BTM.at[:, 11].set(-1.0)
  start_BT, end_BT = (
    jnp.tile(x, (B // inputs.B, 1)) for x in inputs.ranges(kind, T)
  )
  return q_BTMI, k_BSI, w_BTM, start_BT, end_BT


def loops(q, k, w, start, end, top_k=K):
  return oracles.topk(oracles.index_scores(q, k, w), start, end, top_k)


def inputs_of_scores(scores, start=0):
  """A query with these scores: what its two heads see differs in sign."""
  k_BSI = jnp.array(scores, jnp.float32)[None, :, None]
  signs = jnp.array([1.0, -1.0])
  start_BT, end_BT = np.reshape([start, len(scores)], (2, 1, 1))
  return (
    signs[None, None, :, None],
    k_BSI,
    signs[None, None],
    jnp.asarray(start_BT, jnp.int32),
    jnp.asarray(end_BT, jnp.int32),
  )


def assert_choice(actual, expected):
  indices, scores = (np.asarray(x) for x in actual)
  assert indices.dtype == np.int32
  assert scores.dtype == np.float32
  np.testing.assert_array_equal(indices, expected[0])
  np.testing.assert_array_equal(scores, expected[1])


@pytest.mark.parametrize("op", [*OPS, *inputs.slow(TILED)])
@pytest.mark.parametrize("kind", inputs.RANGES)
def test_chooses_what_the_loops_choose(op, kind):
  args = exact_inputs(kind)
  assert_choice(compiled(op)(*args), loops(*args))


@pytest.mark.parametrize(
  "op, dtype",
  [
    *((op, dtype) for op in OPS for dtype in (jnp.float32, jnp.bfloat16)),
    *(pytest.param(op, jnp.float32, marks=pytest.mark.slow) for op in TILED),
  ],
)
def test_chooses_by_scores_that_round(op, dtype):
  q_BTMI = inputs.normal(0, B, T, M, I, dtype=dtype)
  k_BSI = inputs.normal(1, B, S, I, dtype=dtype)
  args = q_BTMI, k_BSI, inputs.normal(2, B, T, M), *inputs.ranges("any")
  # No score left out is within rounding of one kept, but for ties at 0.
  last_two_BT2 = np.sort(loops(*args, K + 1)[1])[..., :2]
  left_out_BT, kept_BT = np.moveaxis(last_two_BT2, -1, 0)
  apart = kept_BT > left_out_BT + 1e-5
  assert (apart | (kept_BT == left_out_BT)).all()
  expected = loops(*args)
  indices, scores = compiled(op)(*args)
  np.testing.assert_array_equal(indices, expected[0])
  rows.assert_close(scores, expected[1], rtol=1e-6)
  again = compiled(op)(*args)
  chex.assert_trees_all_equal(again, (indices, scores), strict=True)


@pytest.mark.parametrize("op", OPS)
def test_scores_in_8_bits(op):
  """They are those of what the rounding leaves, found by loops."""
  q_BTMI = inputs.normal(0, B, T, M, 16)
  k_BSI = inputs.normal(1, B, S, 16)
  w_BTM, ranges = inputs.normal(2, B, T, M), inputs.ranges("any")
  run = functools.partial(OPS[op], top_k=K, score_dtype="float8_e4m3fn")
  indices, scores = jax.jit(run)(q_BTMI, k_BSI, w_BTM, *ranges)
  rounded = fp8.rounded(q_BTMI), fp8.rounded(k_BSI)
  expected = loops(*rounded, w_BTM, *ranges)
  np.testing.assert_array_equal(indices, expected[0])
  rows.assert_close(scores, expected[1], rtol=1e-6)
  exact = compiled(op)(q_BTMI, k_BSI, w_BTM, *ranges)
  assert np.mean(indices == exact[0]) > 0.3
  assert not np.array_equal(indices, exact[0])


@pytest.mark.parametrize(
  "op, top_k",
  [
    ("reference", S + 7),
    *(("chunked", top_k) for top_k in (1, 32, S, S + 7)),
  ],
)
def test_any_number_of_keys(op, top_k):
  args = exact_inputs()
  assert_choice(compiled(op, top_k)(*args), loops(*args, top_k))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
  "scores, expected",
  [
    pytest.param([3] * 70, [0, 1, 2, 3], id="all equal"),
    pytest.param([0] * 70, [0, 1, 2, 3], id="all zero"),
    pytest.param([2] * 60 + [5] + [2] * 9, [0, 1, 2, 60], id="one above"),
    pytest.param([-2] * 33 + [-1] + [-2] * 36, [0, 1, 2, 33], id="negative"),
    pytest.param(
      [0] * 30 + [1] * 40, [30, 31, 32, 33], id="across words of 32 keys"
    ),
  ],
)
def test_ties_go_to_the_lowest_key(op, scores, expected):
  indices, _ = compiled(op, 4)(*inputs_of_scores(scores))
  np.testing.assert_array_equal(indices[0, 0], expected)


@pytest.mark.parametrize("op", OPS)
def test_zeros_of_both_signs_tie(op):
  """The maximum of -0.0 and 0.0, and so relu, may be either."""
  q_BTMI, w_BTM = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1))
  k_BSI = jnp.array([-1.0, 0.0] * 35)[None, :, None]
  _, _, _, start, end = inputs_of_scores([0] * 70)
  signed_relu = lambda x: jnp.where(x > 0, x, 0 * x)
  with mock.patch.object(jax.nn, "relu", signed_relu):
    run = jax.jit(functools.partial(OPS[op], top_k=4))
    indices, _ = run(q_BTMI, k_BSI, w_BTM, start, end)
  np.testing.assert_array_equal(indices[0, 0], [0, 1, 2, 3])


@pytest.mark.parametrize("op", OPS)
def test_ties_of_zeros_that_relu_makes(op):
  """All products are negative: weights of any sign score 0 or -0."""
  q_BTMI, k_BSI, w_BTM, start, end = exact_inputs()
  q_BTMI, k_BSI = -jnp.abs(q_BTMI) - 1, jnp.abs(k_BSI) + 1
  args = q_BTMI, k_BSI, w_BTM, start, end
  actual = compiled(op)(*args)
  start_BT1 = np.clip(np.asarray(start), 0, S)[..., None]
  first_BTK = start_BT1 + np.arange(K)
  expected = np.where(first_BTK < np.minimum(end, S)[..., None], first_BTK, -1)
  np.testing.assert_array_equal(actual[0], expected)
  assert_choice(actual, loops(*args))


# Six scores and the three keys to choose.
SCORES_OF_ANY_SIZE = {
  "huge": ([1, FLT_MAX, -FLT_MAX, 3e38, -3e38, 0], [0, 1, 3]),
  "huge, negative": ([-FLT_MAX, -3e38, -2e38, -1, -3.3e38, -9], [2, 3, 5]),
  "tiny": ([0, 2e-38, -2e-38, 3e-38, -1, 2.5e-38], [1, 3, 5]),
  "denormal": ([1, -1, 1e-40, 2, -1e-40, -1], [0, 2, 3]),
  # XLA takes denormals for 0 on CPUs. Then they tie with 0 everywhere.
  "flushed": ([-1, -1e-40, -2e-38, 0, -2e-40, -3e-45], [1, 3, 4]),
  "infinite": ([1, np.inf, -np.inf, 3, np.inf, -5], [1, 3, 4]),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", SCORES_OF_ANY_SIZE)
def test_scores_of_any_size(op, name):
  scores, expected = SCORES_OF_ANY_SIZE[name]
  indices, chosen = compiled(op, 3)(*inputs_of_scores(scores))
  np.testing.assert_array_equal(indices[0, 0], expected)
  assert not np.isnan(chosen).any()


@pytest.mark.parametrize("op", OPS)
def test_a_key_that_is_seen_counts_even_if_its_score_is_minus_inf(op):
  args = inputs_of_scores([1, 2, -np.inf, 3, -np.inf, -np.inf], start=1)
  np.testing.assert_array_equal(compiled(op, 3)(*args)[0][0, 0], [1, 2, 3])


@pytest.mark.parametrize("op", OPS)
def test_sees_nothing_of_other_documents(op):
  """A document chooses the same keys alone as inside a packed row."""
  q, k, w, _, _ = exact_inputs()
  first, last = 13, 45
  start = jnp.full((B, T), first, jnp.int32)
  end = jnp.full((B, T), last, jnp.int32) - jnp.arange(T, dtype=jnp.int32)[None]
  packed, packed_scores = compiled(op)(q, k, w, start, end)
  alone, scores = compiled(op)(
    q, k[:, first:last], w, start - first, end - first
  )
  np.testing.assert_array_equal(packed, jnp.where(alone < 0, -1, alone + first))
  np.testing.assert_array_equal(packed_scores, scores)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("under", ["grad", "remat", "without jit", "vmap"])
def test_same_under_jit_grad_remat_and_vmap(op, under):
  args = exact_inputs()
  q, k, w, start, end = args
  expected = loops(*args)
  run = functools.partial(OPS[op], top_k=K)

  def marks(x_BTS, q, k, w):
    indices, scores = run(q, k, w, start, end)
    chosen = jnp.take_along_axis(x_BTS, jnp.maximum(indices, 0), -1)
    return jnp.sum(jnp.where(indices < 0, 0.0, chosen)), (indices, scores)

  if under in ("grad", "remat"):
    f = jax.checkpoint(marks) if under == "remat" else marks
    x_BTS = inputs.normal(3, B, T, S)
    # The gradient to x marks the keys of the *backward* pass.
    grad = jax.jit(jax.grad(f, has_aux=True))
    actual_marks, actual = grad(x_BTS, q, k, w)
    expected_marks = np.zeros((B, T, S + 1))
    np.put_along_axis(expected_marks, expected[0], 1, -1)
    assert_choice(actual, expected)
    np.testing.assert_array_equal(actual_marks, expected_marks[..., :S])
  elif under == "without jit":
    assert_choice(run(*args), expected)
  else:
    both = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), args)
    indices, scores = jax.jit(jax.vmap(run))(*both)
    assert_choice((indices[0], scores[0]), expected)
    assert_choice((indices[1, ::-1], scores[1, ::-1]), expected)


@pytest.mark.parametrize(
  "of_queries, of_keys",
  [
    (P("x"), P("x")),  # over the batch
    (P(None, "x"), P()),  # over queries: each device has all keys
  ],
)
def test_same_when_sharded(of_queries, of_keys):
  specs = of_queries, of_keys, of_queries, of_queries, of_queries
  args = exact_inputs("packed", B=8, T=40)
  with jax.set_mesh(jax.make_mesh((8,), ("x",))):
    f = jax.shard_map(
      functools.partial(OPS["chunked"], top_k=K),
      in_specs=specs,
      out_specs=of_queries,
      check_vma=False,
    )
    actual = jax.jit(f)(*map(jax.device_put, args, specs))
  assert_choice(actual, loops(*args))


@pytest.mark.parametrize("op", OPS)
def test_has_no_gradient(op):
  q, k, w, start, end = exact_inputs("packed")

  def loss(q, k, w):
    indices, scores = OPS[op](q, k, w, start, end, K)
    return jnp.sum(jnp.where(indices < 0, 0.0, scores))

  for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, w):
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("top_k", [0, -1])
def test_refuses_to_choose_no_key(top_k):
  with pytest.raises(ValueError, match=f"{top_k=}"):
    of_arrays(api.indexer_topk)(*exact_inputs(), top_k)
