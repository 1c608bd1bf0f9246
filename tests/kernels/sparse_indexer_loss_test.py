"""sparse_indexer_loss against loops, its implementations against each other."""

import functools

import chex
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import operands
from pallas_kernels.ops.sparse_indexer_loss import chunked_xla
from pallas_kernels.ops.sparse_indexer_loss import reference
from tests.kernels import heads
from tests.kernels import inputs
from tests.kernels import oracles
from tests.kernels import rows

B, T, S, K = inputs.B, inputs.T, inputs.S, inputs.K
N, C, R, M, I = inputs.N, inputs.C, inputs.R, inputs.M, inputs.I
SCALE = inputs.SCALE
CHOICES = ("plain", "packed", "invalid")

OPS = {
  "reference": reference.sparse_indexer_loss,
  "chunked": chunked_xla.sparse_indexer_loss,
}
TILED = {  # one by one, odd, larger than T; by default, a power of two
  f"tile {tile}": functools.partial(
    chunked_xla.sparse_indexer_loss, query_tile=tile
  )
  for tile in (1, 5, 64)
}


def value_and_vjp(
  op, q_index, k_index, w, indices, q, kv, lse, d_loss, measure=True
):
  """The loss, and the gradients to q_index, k_index, w, and to q, kv, lse."""
  loss, pullback = jax.vjp(
    lambda index, attended: op(
      index, attended, indices, SCALE, measure=measure
    ),
    operands.Index(q_index, k_index, w),
    operands.Attended(q, kv, lse),
  )
  return loss, *jax.tree.leaves(pullback(d_loss))


@functools.cache  # tests share what they compile
def compiled(op):
  return jax.jit(functools.partial(value_and_vjp, (OPS | TILED)[op]))


def attended(q, kv, indices):
  """lse of the main attention, as `sparse_mla` returns it."""
  no_values = np.zeros((*q.shape[:3], 1)), np.zeros(q.shape[:3])
  _, lse, _, _ = oracles.sparse_mla(q, kv, indices, 1, SCALE, *no_values)
  return jnp.asarray(lse, jnp.float32)


def make_inputs(kind="invalid", dtype=jnp.float32):
  indices = inputs.choices(kind)
  q = inputs.normal(0, B, T, N, C + R, dtype=dtype)
  kv = inputs.normal(1, B, S, C + R, dtype=dtype)
  return (
    inputs.normal(2, B, T, M, I, dtype=dtype),
    inputs.normal(3, B, S, I, dtype=dtype),
    inputs.normal(4, B, T, M) / M,
    indices,
    q,
    kv,
    attended(q, kv, indices),
    inputs.normal(5, B, T),
  )


def loops(q_index, k_index, w, indices, q, kv, lse, d_loss):
  return oracles.sparse_indexer_loss(
    q_index, k_index, w, indices, q, kv, lse, SCALE, d_loss
  )


def assert_close(actual, expected, rtol=2e-6, atol=2e-6):
  """Row by row; `atol` is for terms of size one that cancel."""
  np.testing.assert_allclose(actual[0], expected[0], rtol, atol)
  names = "d_q_index", "d_k_index", "d_w"
  for name, x, y in zip(names, actual[1:], expected[1:]):
    rows.assert_close(x, y, rtol, atol, name)


@pytest.mark.parametrize("kind", CHOICES)
def test_reference_is_what_the_loops_compute(kind):
  args = make_inputs(kind)
  actual = compiled("reference")(*args)
  assert_close(actual, loops(*args))
  assert jnp.min(actual[0]) > -1e-6


@pytest.mark.parametrize("op", ["chunked", *inputs.slow(TILED)])
@pytest.mark.parametrize("kind", CHOICES)
def test_matches_reference(op, kind):
  args = make_inputs(kind)
  expected = compiled("reference")(*args)
  actual = compiled(op)(*args)
  assert_close(actual, expected)
  chex.assert_trees_all_equal(compiled(op)(*args), actual, strict=True)


@pytest.mark.parametrize("op", OPS)
def test_bfloat16(op):
  """The loss is as exact as in float32: products and sums do not round."""
  args = make_inputs(dtype=jnp.bfloat16)
  loss, *gradients = compiled(op)(*args)
  expected_loss, *expected = loops(*args)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected_loss, 2e-6, 2e-6)
  for x, y, like in zip(gradients, expected, args):
    assert x.dtype == like.dtype
    rows.assert_close(x, y, 2**-6, 2**-8)


@pytest.mark.parametrize("op", ["reference", "tile 1"])
def test_adds_up_the_gradient_of_a_key_in_float32(op):
  """A sum over many queries would lose what is below 2^-9 of it."""
  T, S, K = 768, 5, 3
  q, kv = inputs.normal(0, B, T, N, C + R), inputs.normal(1, B, S, C + R)
  q_index = jnp.abs(inputs.normal(2, B, T, M, I)).astype(jnp.bfloat16)
  k_index = jnp.abs(inputs.normal(3, B, S, I)).astype(jnp.bfloat16)
  w = jnp.ones((B, T, M), jnp.float32) / M
  indices = inputs.choices("plain", T, S, K)
  lse, d_loss = attended(q, kv, indices), jnp.ones((B, T))
  args = q_index, k_index, w, indices, q, kv, lse, d_loss
  _, _, d_k, *_ = compiled(op)(*args)
  _, _, expected, _ = loops(*args)
  rows.assert_close(d_k, expected, 2**-6)


@pytest.mark.parametrize("op", OPS)
def test_sends_nothing_to_the_attention(op):
  *_, d_q, d_kv, d_lse = compiled(op)(*make_inputs())
  for gradient in (d_q, d_kv, d_lse):
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("op", OPS)
def test_no_key_no_loss(op):
  q_index, k_index, w, indices, q, kv, lse, d_loss = make_inputs()
  dead_BT = ~((indices >= 0) & (indices < S)).any(-1)
  assert dead_BT.sum() > 4
  expected = compiled(op)(q_index, k_index, w, indices, q, kv, lse, d_loss)
  # Padded queries may hold anything finite.
  q_index = jnp.where(dead_BT[..., None, None], 1e4, q_index)
  q = jnp.where(dead_BT[..., None, None], -1e4, q)
  w = jnp.where(dead_BT[..., None], 1e4, w)
  d_loss = jnp.where(dead_BT, 1e4, d_loss)
  actual = compiled(op)(q_index, k_index, w, indices, q, kv, lse, d_loss)
  loss, d_q, _, d_w, *_ = actual
  for x in (loss, d_q, d_w):
    np.testing.assert_array_equal(x[dead_BT], 0)
  chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_only_the_chosen_keys_count(op):
  q_index, k_index, w, indices, q, kv, lse, d_loss = make_inputs()
  indices = jnp.where(indices % 3 == 0, -1, indices)
  expected = compiled(op)(q_index, k_index, w, indices, q, kv, lse, d_loss)
  other = (jnp.arange(S) % 3 == 0)[None, :, None]
  k_index, kv = (jnp.where(other, 1e4, x) for x in (k_index, kv))
  actual = compiled(op)(q_index, k_index, w, indices, q, kv, lse, d_loss)
  chex.assert_trees_all_equal(actual, expected)
  np.testing.assert_array_equal(actual[2][:, ::3], 0)


@pytest.mark.parametrize("op", OPS)
def test_the_target_is_what_lse_leaves_of_it(op):
  """Heads weigh by their mass on the chosen keys: exp(logits - lse)."""
  *args, lse, d_loss = make_inputs()
  args = *args, lse + jnp.abs(inputs.normal(6, B, T, N)), d_loss
  assert_close(compiled(op)(*args), loops(*args))


@pytest.mark.parametrize("op", OPS)
def test_nothing_to_learn_where_the_indexer_is_right(op):
  """Index scores equal to the logits of all heads: no loss, no gradient."""
  _, _, _, indices, q, kv, _, _ = make_inputs()
  q, kv = (x.at[..., I - 1 :].set(0.0) for x in (q, kv))
  q = jnp.broadcast_to(q[:, :, :1], q.shape)
  high = 8.0  # so that relu lets all logits pass; a softmax ignores it
  q_index = (SCALE * q[:, :, :1, :I]).at[..., -1].set(high)
  q_index = jnp.broadcast_to(q_index, (B, T, M, I))
  k_index = kv[..., :I].at[..., -1].set(1.0)
  w = jnp.full((B, T, M), 1 / M, jnp.float32)
  lse = attended(q, kv, indices)
  args = q_index, k_index, w, indices, q, kv, lse, jnp.ones((B, T))
  loss, d_q, d_k, d_w, *_ = compiled(op)(*args)
  np.testing.assert_allclose(loss, 0, atol=2e-5)
  for gradient in (d_q, d_k, d_w / high):
    np.testing.assert_allclose(gradient, 0, atol=2e-5)


@pytest.mark.parametrize("op", OPS)
def test_large_scores_and_logits(op):
  """Both softmaxes put all on one key: no overflow, no log of 0."""
  q_index, k_index, w, indices, q, kv, _, d_loss = make_inputs()
  q_index, q = 300 * q_index, 300 * q
  lse = attended(q, kv, indices)
  args = q_index, k_index, w, indices, q, kv, lse, d_loss
  assert_close(compiled(op)(*args), loops(*args), 1e-3, 0.1)


@pytest.mark.parametrize("op", OPS)
def test_the_gradient_to_the_scores(op):
  """One index head and q.k = the scores: their gradient is (t - p) d_loss."""
  _, _, _, indices, q, kv, lse, d_loss = make_inputs("packed")
  scores_BTS = 3 + jnp.abs(inputs.normal(7, B, T, S))  # relu lets all pass
  args = scores_BTS[:, :, None, :], jnp.broadcast_to(jnp.eye(S), (B, S, S))
  w = jnp.ones((B, T, 1), jnp.float32)
  _, d_scores_BTS, *_ = compiled(op)(*args, w, indices, q, kv, lse, d_loss)
  chosen_BTS = (np.asarray(indices)[..., None] == np.arange(S)).any(2)
  softmax = np.where(chosen_BTS, np.exp(np.asarray(scores_BTS, np.float64)), 0)
  softmax /= np.maximum(softmax.sum(-1, keepdims=True), 1e-30)
  logits = SCALE * np.einsum("btnd,bsd->btns", q, kv).astype(np.float64)
  finite_lse = np.where(np.isfinite(lse), lse, 0)
  p = np.exp(logits - finite_lse[..., None]).mean(2) * chosen_BTS
  expected = (softmax - p) * np.asarray(d_loss)[..., None]
  np.testing.assert_allclose(d_scores_BTS[:, :, 0], expected, rtol=0, atol=1e-6)


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
  specs = P(), P(), P(), P(), of_heads, P(), of_heads
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
