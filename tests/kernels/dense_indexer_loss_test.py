"""dense_indexer_loss against loops, its implementations against each other."""

import functools

import chex
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import operands
from pallas_kernels.ops.dense_indexer_loss import chunked_xla
from pallas_kernels.ops.dense_indexer_loss import reference
from tests.kernels import heads
from tests.kernels import inputs
from tests.kernels import oracles
from tests.kernels import rows

B, T, S = inputs.B, inputs.T, inputs.S
N, H, R, M, I = inputs.N, inputs.H, inputs.R, inputs.M, inputs.I
SCALE = inputs.SCALE

OPS = {
  "reference": reference.dense_indexer_loss,
  "chunked": chunked_xla.dense_indexer_loss,
}
TILED = {  # one by one, odd, larger than T and S; by default, powers of two
  f"tiles {bT} x {bS}": functools.partial(
    chunked_xla.dense_indexer_loss, query_tile=bT, key_tile=bS
  )
  for bT, bS in ((1, 7), (5, 1), (64, 64), (8, 13))
}


def value_and_vjp(
  op, q_index, k_index, w, start, end, q, k, lse, d_loss, measure=True
):
  """The loss, and the gradients to q_index, k_index, w, and to q, k, lse."""
  loss, pullback = jax.vjp(
    lambda index, attended: op(
      index, attended, start, end, SCALE, measure=measure
    ),
    operands.Index(q_index, k_index, w),
    operands.Attended(q, k, lse),
  )
  return loss, *jax.tree.leaves(pullback(d_loss))


@functools.cache  # tests share what they compile
def compiled(op):
  return jax.jit(functools.partial(value_and_vjp, (OPS | TILED)[op]))


def attended(q, k, start, end):
  """lse of the attention, as `dense_mla` returns it."""
  v, d_out = np.zeros((B, S, N, 1)), np.zeros((*q.shape[:3], 1))
  _, lse, *_ = oracles.dense_mla(
    q, k, v, start, end, SCALE, d_out, d_out[..., 0]
  )
  return jnp.asarray(lse, jnp.float32)


@functools.cache
def make_inputs(kind="any", dtype=jnp.float32, width=H + R):
  start, end = inputs.ranges(kind)
  q = inputs.normal(0, B, T, N, width, dtype=dtype)
  k = inputs.normal(1, B, S, N, width, dtype=dtype)
  return (
    inputs.normal(2, B, T, M, I, dtype=dtype),
    inputs.normal(3, B, S, I, dtype=dtype),
    inputs.normal(4, B, T, M) / M,
    *(start, end, q, k),
    attended(q, k, start, end),
    inputs.normal(5, B, T),
  )


@functools.cache
def loops(kind="any", dtype=jnp.float32):
  q_index, k_index, w, start, end, q, k, lse, d_loss = make_inputs(kind, dtype)
  return oracles.dense_indexer_loss(
    q_index, k_index, w, start, end, q, k, lse, SCALE, d_loss
  )


def alive(kind="any"):
  start, end = make_inputs(kind)[3:5]
  return np.maximum(start, 0) < np.minimum(end, S)


def assert_close(actual, expected, rtol=3e-6, atol=3e-6):
  """Row by row; `atol` is for terms of size one that cancel."""
  np.testing.assert_allclose(actual[0], expected[0], rtol, atol)
  names = "d_q_index", "d_k_index", "d_w"
  for name, x, y in zip(names, actual[1:], expected[1:]):
    rows.assert_close(x, y, rtol, atol, name)


@pytest.mark.parametrize("kind", inputs.RANGES)
@pytest.mark.parametrize("op", [*OPS, *inputs.slow(TILED)])
def test_is_what_the_loops_compute(kind, op):
  actual = compiled(op)(*make_inputs(kind))
  assert_close(actual, loops(kind))
  again = compiled(op)(*make_inputs(kind))
  chex.assert_trees_all_equal(again, actual, strict=True)
  assert jnp.min(actual[0]) > -1e-6
  assert np.asarray(actual[0])[alive(kind)].mean() > 0.1


@pytest.mark.parametrize("op", OPS)
def test_bfloat16(op):
  args = make_inputs(dtype=jnp.bfloat16)
  loss, *gradients = compiled(op)(*args)
  expected_loss, *expected = loops(dtype=jnp.bfloat16)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected_loss, 3e-6, 3e-6)
  for x, y, like in zip(gradients, expected, args):
    assert x.dtype == like.dtype
    rows.assert_close(x, y, 2**-6, 2**-8)


@pytest.mark.parametrize("op", OPS)
def test_sends_nothing_to_the_attention(op):
  *_, d_q, d_k, d_lse = compiled(op)(*make_inputs())
  for gradient in (d_q, d_k, d_lse):
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("op", OPS)
def test_no_key_no_loss(op):
  q_index, k_index, w, start, end, q, k, lse, d_loss = make_inputs()
  dead_BT = ~alive()
  assert dead_BT.sum() > 4
  expected = compiled(op)(*make_inputs())
  # Padded queries may hold anything finite.
  q_index = jnp.where(dead_BT[..., None, None], 1e4, q_index)
  q = jnp.where(dead_BT[..., None, None], -1e4, q)
  w = jnp.where(dead_BT[..., None], 1e4, w)
  d_loss = jnp.where(dead_BT, 1e4, d_loss)
  actual = compiled(op)(q_index, k_index, w, start, end, q, k, lse, d_loss)
  loss, d_q, _, d_w, *_ = actual
  for x in (loss, d_q, d_w):
    np.testing.assert_array_equal(x[dead_BT], 0)
  chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_all_rows_dead(op):
  q_index, k_index, w, start, _, q, k, _, d_loss = make_inputs()
  lse = jnp.full((B, T, N), -jnp.inf)
  results = compiled(op)(q_index, k_index, w, start, start, q, k, lse, d_loss)
  for x in results:
    np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("op", OPS)
def test_only_visible_keys_count(op):
  q_index, k_index, w, _, _, q, k, _, d_loss = make_inputs()
  start = jnp.full((B, T), 3)
  end = jnp.broadcast_to(20 + jnp.arange(T) % 5, (B, T))
  lse = attended(q, k, start, end)
  expected = compiled(op)(q_index, k_index, w, start, end, q, k, lse, d_loss)
  seen = (jnp.arange(S) >= 3) & (jnp.arange(S) < 24)
  k_index = jnp.where(seen[None, :, None], k_index, 1e4)
  k = jnp.where(seen[None, :, None, None], k, 1e4)
  actual = compiled(op)(q_index, k_index, w, start, end, q, k, lse, d_loss)
  chex.assert_trees_all_equal(actual, expected)
  np.testing.assert_array_equal(actual[2][:, ~seen], 0)


@pytest.mark.parametrize("op", OPS)
def test_nothing_to_learn_where_the_indexer_is_right(op):
  """Index scores equal to the logits of all heads: no loss, no gradient."""
  _, _, _, start, end, q, k, _, _ = make_inputs()
  q = q.at[..., I - 1 :].set(0.0)
  q = jnp.broadcast_to(q[:, :, :1], q.shape)
  k = jnp.broadcast_to(k[:, :, :1], k.shape)
  high = 8.0  # so that relu lets all logits pass; a softmax ignores it
  q_index = (SCALE * q[:, :, :1, :I]).at[..., -1].set(high)
  q_index = jnp.broadcast_to(q_index, (B, T, M, I))
  k_index = k[:, :, 0, :I].at[..., -1].set(1.0)
  w = jnp.full((B, T, M), 1 / M, jnp.float32)
  lse, d_loss = attended(q, k, start, end), jnp.ones((B, T))
  loss, d_q, d_k, d_w, *_ = compiled(op)(
    q_index, k_index, w, start, end, q, k, lse, d_loss
  )
  np.testing.assert_allclose(loss, 0, atol=2e-5)
  for gradient in (d_q, d_k, d_w / high):
    np.testing.assert_allclose(gradient, 0, atol=2e-5)


@pytest.mark.parametrize("op", OPS)
def test_the_gradient_to_the_scores(op):
  """One index head and q.k = the scores: their gradient is (t - p) d_loss."""
  _, _, _, start, end, q, k, lse, d_loss = make_inputs("causal")
  scores_BTS = 3 + jnp.abs(inputs.normal(7, B, T, S))  # relu lets all pass
  q_index = scores_BTS[:, :, None, :]
  k_index = jnp.broadcast_to(jnp.eye(S), (B, S, S))
  w = jnp.ones((B, T, 1), jnp.float32)
  d_scores_BTS = compiled(op)(
    q_index, k_index, w, start, end, q, k, lse, d_loss
  )[1][:, :, 0]
  seen_BTS = np.arange(S) < np.asarray(end)[..., None]
  softmax = np.where(seen_BTS, np.exp(np.asarray(scores_BTS, np.float64)), 0)
  softmax /= softmax.sum(-1, keepdims=True)
  logits = SCALE * np.einsum("btnd,bsnd->btns", q, k).astype(np.float64)
  p = np.exp(logits - np.asarray(lse)[..., None]).mean(2) * seen_BTS
  expected = (softmax - p) * np.asarray(d_loss)[..., None]
  np.testing.assert_allclose(d_scores_BTS, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_large_scores_and_logits(op):
  """Both softmaxes put all on one key: no overflow, no log of 0."""
  q_index, k_index, w, start, end, q, k, _, d_loss = make_inputs()
  q_index, q = 300 * q_index, 300 * q
  lse = attended(q, k, start, end)
  args = q_index, k_index, w, start, end, q, k, lse
  expected = oracles.dense_indexer_loss(*args, SCALE, d_loss)
  assert_close(compiled(op)(*args, d_loss), expected, 1e-3, 0.1)


@pytest.mark.parametrize("op", OPS)
def test_measured_only_when_asked(op):
  args = make_inputs()
  loss, *gradients = compiled(op)(*args, measure=jnp.bool(False))
  expected_loss, *expected = compiled(op)(*args, measure=jnp.bool(True))
  np.testing.assert_array_equal(loss, 0)
  assert expected_loss.sum() > 1
  chex.assert_trees_all_equal(gradients, expected)


@pytest.mark.parametrize(
  "op, axes", [("reference", "a"), ("chunked", ("a", "b"))]
)
def test_heads_may_be_sharded(op, axes):
  *args, d_loss = make_inputs()
  of_heads = P(None, None, axes)
  specs = P(), P(), P(), P(), P(), of_heads, of_heads, of_heads
  mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    sharded = heads.sharded(OPS[op], axes)
    run = jax.jit(functools.partial(value_and_vjp, sharded))
    actual = run(*map(jax.device_put, args, specs), d_loss)
  assert_close(actual, compiled(op)(*args, d_loss))


def test_same_when_sharded_over_the_batch():
  args = make_inputs()
  mesh = jax.make_mesh((B,), ("x",), devices=jax.devices()[:B])
  with jax.set_mesh(mesh):
    f = jax.shard_map(
      functools.partial(value_and_vjp, OPS["chunked"]),
      in_specs=P("x"),
      out_specs=P("x"),
      check_vma=False,
    )
    actual = jax.jit(f)(*jax.device_put(args, P("x")))
  assert_close(actual, compiled("chunked")(*args))
