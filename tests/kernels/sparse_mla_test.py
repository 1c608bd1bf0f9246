"""sparse_mla against loops, its implementations against each other."""

import functools

import chex
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.dense_mla import reference as dense_reference
from pallas_kernels.ops.sparse_mla import api
from pallas_kernels.ops.sparse_mla import chunked_xla
from pallas_kernels.ops.sparse_mla import reference
from tests.kernels import inputs
from tests.kernels import oracles
from tests.kernels import rows

B, T, S, K = inputs.B, inputs.T, inputs.S, inputs.K
N, C, R, H, U = inputs.N, inputs.C, inputs.R, inputs.H, inputs.U
SCALE = inputs.SCALE

OPS = {"reference": reference.sparse_mla, "chunked": chunked_xla.sparse_mla}
TILED = {  # one by one, odd, larger than T; by default, a power of two
  f"tile {tile}": functools.partial(chunked_xla.sparse_mla, query_tile=tile)
  for tile in (1, 5, 64)
}


def value_and_vjp(op, q, kv, indices, d_out, d_lse):
  """out, lse, and the gradients to q and kv."""
  f = lambda q, kv: op(q, kv, indices, C, SCALE)
  results, pullback = jax.vjp(f, q, kv)
  return *results, *pullback((d_out, d_lse))


@functools.cache  # tests share what they compile
def compiled(op):
  return jax.jit(functools.partial(value_and_vjp, (OPS | TILED)[op]))


def make_inputs(kind="plain", dtype=jnp.float32):
  return (
    inputs.normal(0, B, T, N, C + R, dtype=dtype),
    inputs.normal(1, B, S, C + R, dtype=dtype),
    inputs.choices(kind),
    inputs.normal(2, B, T, N, C, dtype=dtype),
    inputs.normal(3, B, T, N),
  )


def loops(q, kv, indices, d_out, d_lse):
  return oracles.sparse_mla(q, kv, indices, C, SCALE, d_out, d_lse)


def assert_close(actual, expected, rtol=2e-6, atol=2e-6):
  """Row by row; `atol` is for terms of size one that cancel."""
  names = "out", "lse", "d_q", "d_kv"
  for name, x, y in zip(names, actual, expected, strict=True):
    rows.assert_close(x, y, rtol, atol, name)


@pytest.mark.parametrize("kind", inputs.CHOICES)
def test_reference_is_what_the_loops_compute(kind):
  args = make_inputs(kind)
  assert_close(compiled("reference")(*args), loops(*args))


@pytest.mark.parametrize("op", ["chunked", *inputs.slow(TILED)])
@pytest.mark.parametrize("kind", inputs.CHOICES)
def test_matches_reference(op, kind):
  args = make_inputs(kind)
  expected = compiled("reference")(*args)
  actual = compiled(op)(*args)
  assert_close(actual, expected)
  chex.assert_trees_all_equal(compiled(op)(*args), actual, strict=True)


@pytest.mark.parametrize("op", OPS)
def test_bfloat16(op):
  """bfloat16 rounds by 2^-9: the results, and factors of each product."""
  args = make_inputs("invalid", jnp.bfloat16)
  actual = compiled(op)(*args)
  expected = loops(*args)
  for x, dtype in zip(
    actual, (jnp.bfloat16, jnp.float32) + (jnp.bfloat16,) * 2
  ):
    assert x.dtype == dtype
  rows.assert_close(actual[0], expected[0], 2**-7)
  rows.assert_close(actual[1], expected[1], 2e-6)  # lse does not round
  for x, y in zip(actual[2:], expected[2:]):
    rows.assert_close(x, y, 2**-6, 2**-6)


@pytest.mark.parametrize("op", ["reference", "tile 1"])
def test_adds_up_the_gradient_of_a_key_in_float32(op):
  """A sum over many queries would lose what is below 2^-9 of it."""
  T, S, K, dtype = 768, 5, 3, jnp.bfloat16
  q = inputs.normal(0, B, T, N, C + R, dtype=dtype)
  kv = inputs.normal(1, B, S, C + R, dtype=dtype)
  indices = inputs.choices("plain", T, S, K)
  d_out = jnp.abs(inputs.normal(2, B, T, N, C, dtype=dtype))
  args = q, kv, indices, d_out, inputs.normal(3, B, T, N)
  rows.assert_close(compiled(op)(*args)[3], loops(*args)[3], 2**-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cotangent", [1e3, np.inf, np.nan])
def test_no_key_no_output(op, cotangent):
  """Dead queries: 0, -inf, no gradient, whatever the cotangents are."""
  q, kv, indices, d_out, d_lse = make_inputs("invalid")
  dead_BT = ~((indices >= 0) & (indices < S)).any(-1)
  assert dead_BT.sum() > 4
  _, _, _, d_kv = compiled(op)(q, kv, indices, d_out, d_lse)
  # lse is -inf, so most functions of it send back no finite number.
  bad_BTN = jnp.where(dead_BT[..., None], cotangent, d_lse)
  out, lse, d_q, actual = compiled(op)(q, kv, indices, d_out, bad_BTN)
  np.testing.assert_array_equal(out[dead_BT], 0)
  np.testing.assert_array_equal(lse[dead_BT], -np.inf)
  np.testing.assert_array_equal(d_q[dead_BT], 0)
  np.testing.assert_array_equal(actual, d_kv)


@pytest.mark.parametrize("op", OPS)
def test_only_the_chosen_keys_count(op):
  """No other key changes anything, nor does it get a gradient."""
  q, kv, indices, d_out, d_lse = make_inputs("invalid")
  indices = jnp.where(indices % 3 == 0, -1, indices)
  expected = compiled(op)(q, kv, indices, d_out, d_lse)
  other = (jnp.arange(S) % 3 == 0)[None, :, None]
  other_kv = jnp.where(other, 1e4, kv)
  actual = compiled(op)(q, other_kv, indices, d_out, d_lse)
  chex.assert_trees_all_equal(actual, expected)
  np.testing.assert_array_equal(actual[3][:, ::3], 0)


@pytest.mark.parametrize("op", OPS)
def test_large_logits(op):
  """Logits of some hundreds overflow nothing."""
  q, kv, indices, d_out, d_lse = make_inputs("invalid")
  args = 100 * q, kv, indices, d_out, d_lse
  # They round to 2e-5, which is the relative error of a weight.
  assert_close(compiled(op)(*args), loops(*args), 1e-4, 5e-3)


@pytest.mark.parametrize("op", OPS)
def test_order_of_the_keys_is_no_matter(op):
  q, kv, indices, d_out, d_lse = make_inputs("invalid")
  expected = compiled(op)(q, kv, indices, d_out, d_lse)
  actual = compiled(op)(q, kv, indices[..., ::-1], d_out, d_lse)
  assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", inputs.RANGES)
def test_all_keys_are_dense_attention(op, kind):
  """With every visible key chosen (K > S), absorbed equals expanded MLA.

  So do the gradients to all that both forms are made of.
  """
  xs = (
    inputs.normal(0, B, T, N, H),
    inputs.normal(1, B, T, N, R),
    inputs.normal(2, B, S, C),
    inputs.normal(3, B, S, R),
    inputs.normal(4, C, N, H) / H**0.5,
    inputs.normal(5, C, N, U) / C**0.5,
  )

  def sparse(start, end, q_nope, q_rope, c, k_rope, w_uk, w_uv):
    key = jnp.arange(S + 5)[None, None]
    visible_BTK = (key >= start[..., None]) & (key < end[..., None])
    q_BTNC = jnp.einsum("BTNH,CNH->BTNC", q_nope, w_uk)
    q = jnp.concatenate([q_BTNC, q_rope], -1)
    kv = jnp.concatenate([c, k_rope], -1)
    indices_BTK = jnp.where(visible_BTK, key, -1)
    out, lse = OPS[op](q, kv, indices_BTK, C, SCALE)
    return jnp.einsum("BTNC,CNU->BTNU", out, w_uv), lse

  def dense(start, end, q_nope, q_rope, c, k_rope, w_uk, w_uv):
    k_BSNR = jnp.broadcast_to(k_rope[:, :, None], (B, S, N, R))
    k_BSNH = jnp.einsum("BSC,CNH->BSNH", c, w_uk)
    return dense_reference.dense_mla(
      jnp.concatenate([q_nope, q_rope], -1),
      jnp.concatenate([k_BSNH, k_BSNR], -1),
      jnp.einsum("BSC,CNU->BSNU", c, w_uv),
      start,
      end,
      SCALE,
    )

  def run(f, *ranges):
    results, pullback = jax.vjp(functools.partial(f, *ranges), *xs)
    cotangents = inputs.normal(6, B, T, N, U), inputs.normal(7, B, T, N)
    return *results, *pullback(cotangents)

  both = jax.jit(lambda *ranges: (run(sparse, *ranges), run(dense, *ranges)))
  for x, y in zip(*both(*inputs.ranges(kind)), strict=True):
    rows.assert_close(x, y, 1e-5, 1e-4)


def test_same_when_sharded_over_the_batch():
  args = make_inputs("invalid")
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


def test_the_whole_row_may_be_the_value():
  """latent_rank = C + R: no rotated part."""
  q, kv, indices, _, _ = make_inputs()
  d_out, d_lse = inputs.normal(2, *q.shape), inputs.normal(3, *q.shape[:3])

  def run(q, kv, indices, d_out, d_lse):
    f = lambda q, kv: chunked_xla.sparse_mla(q, kv, indices, C + R, SCALE)
    results, pullback = jax.vjp(f, q, kv)
    return *results, *pullback((d_out, d_lse))

  actual = jax.jit(run)(q, kv, indices, d_out, d_lse)
  expected = oracles.sparse_mla(q, kv, indices, C + R, SCALE, d_out, d_lse)
  assert_close(actual, expected)


@pytest.mark.parametrize("latent_rank", [0, C + R + 1])
def test_refuses_a_latent_rank_that_cannot_be(latent_rank):
  q, kv, indices, _, _ = make_inputs()
  with pytest.raises(ValueError, match=f"{latent_rank=}"):
    api.sparse_mla(q, kv, indices, latent_rank, SCALE)
