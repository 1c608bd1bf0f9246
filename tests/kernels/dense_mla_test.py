"""dense_mla against loops, its implementations against each other."""

import functools

import chex
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.dense_mla import chunked_xla
from pallas_kernels.ops.dense_mla import reference
from tests.kernels import inputs
from tests.kernels import oracles
from tests.kernels import rows

B, T, S, N, U = inputs.B, inputs.T, inputs.S, inputs.N, inputs.U
HR = inputs.H + inputs.R
SCALE = inputs.SCALE

OPS = {"reference": reference.dense_mla, "chunked": chunked_xla.dense_mla}
TILED = {  # one by one, odd, larger than T and S; by default, powers of two
  f"{query_tile}x{key_tile}": functools.partial(
    chunked_xla.dense_mla, query_tile=query_tile, key_tile=key_tile
  )
  for query_tile, key_tile in ((1, 1), (7, 5), (64, 128))
}


def value_and_vjp(op, q, k, v, start, end, d_out, d_lse, *indices):
  """out, lse, and the gradients to q, k and v."""
  f = lambda q, k, v: op(q, k, v, start, end, SCALE, *indices)
  results, pullback = jax.vjp(f, q, k, v)
  return *results, *pullback((d_out, d_lse))


@functools.cache  # tests share what they compile
def compiled(op):
  return jax.jit(functools.partial(value_and_vjp, (OPS | TILED)[op]))


def make_inputs(kind="any", dtype=jnp.float32):
  return (
    inputs.normal(0, B, T, N, HR, dtype=dtype),
    inputs.normal(1, B, S, N, HR, dtype=dtype),
    inputs.normal(2, B, S, N, U, dtype=dtype),
    *inputs.ranges(kind),
    inputs.normal(3, B, T, N, U, dtype=dtype),
    inputs.normal(4, B, T, N),
  )


def loops(q, k, v, start, end, *rest):
  return oracles.dense_mla(q, k, v, start, end, SCALE, *rest)


def assert_close(actual, expected, rtol=2e-6, atol=2e-6):
  """Row by row; `atol` is for terms of size one that cancel."""
  names = "out", "lse", "d_q", "d_k", "d_v"
  for name, x, y in zip(names, actual, expected, strict=True):
    rows.assert_close(x, y, rtol, atol, name)


@pytest.mark.parametrize("kind", inputs.RANGES)
def test_reference_is_what_the_loops_compute(kind):
  args = make_inputs(kind)
  assert_close(compiled("reference")(*args), loops(*args))


@pytest.mark.parametrize("op", ["chunked", *inputs.slow(TILED)])
@pytest.mark.parametrize("kind", inputs.RANGES)
def test_matches_reference(op, kind):
  args = make_inputs(kind)
  expected = compiled("reference")(*args)
  actual = compiled(op)(*args)
  assert_close(actual, expected)
  chex.assert_trees_all_equal(compiled(op)(*args), actual, strict=True)


@pytest.mark.parametrize("op", [*OPS, *inputs.slow(TILED)])
@pytest.mark.parametrize(
  "kind, choice",
  [
    *(("causal", "plain"), ("packed", "packed")),
    *(("any", "plain"), ("any", "invalid")),
  ],
)
def test_of_the_range_only_chosen_keys_are_read(op, kind, choice):
  args = *make_inputs(kind), inputs.choices(choice)
  actual = compiled(op)(*args)
  assert_close(actual, loops(*args))
  # It is another result than that of all keys.
  assert jnp.abs(actual[0] - compiled(op)(*args[:-1])[0]).max() > 0.1


@pytest.mark.parametrize("op", OPS)
def test_bfloat16(op):
  """bfloat16 rounds by 2^-9: the results, and factors of each product."""
  args = make_inputs("any", jnp.bfloat16)
  actual = compiled(op)(*args)
  expected = loops(*args)
  for x, dtype in zip(
    actual, (jnp.bfloat16, jnp.float32) + (jnp.bfloat16,) * 3
  ):
    assert x.dtype == dtype
  rows.assert_close(actual[0], expected[0], 2**-7)
  rows.assert_close(actual[1], expected[1], 2e-6)  # lse does not round
  for x, y in zip(actual[2:], expected[2:]):
    rows.assert_close(x, y, 2**-6, 2**-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cotangent", [1e3, np.inf, np.nan])
def test_no_key_no_output(op, cotangent):
  """Dead queries: 0, -inf, no gradient, whatever the cotangents are."""
  *args, d_lse = make_inputs("any")
  start, end = args[3:5]
  dead_BT = jnp.maximum(start, 0) >= jnp.minimum(end, S)
  assert dead_BT.sum() > 4
  d_keys = compiled(op)(*args, d_lse)[3:]
  # lse is -inf, so most functions of it send back no finite number.
  bad_BTN = jnp.where(dead_BT[..., None], cotangent, d_lse)
  out, lse, d_q, *actual = compiled(op)(*args, bad_BTN)
  np.testing.assert_array_equal(out[dead_BT], 0)
  np.testing.assert_array_equal(lse[dead_BT], -np.inf)
  np.testing.assert_array_equal(d_q[dead_BT], 0)
  chex.assert_trees_all_equal(actual, list(d_keys))


@pytest.mark.parametrize("op", OPS)
def test_only_the_range_counts(op):
  """No other key changes anything, nor does it get a gradient."""
  q, k, v, start, end, d_out, d_lse = make_inputs("any")
  first, last = 9, 40  # inside tiles
  start, end = jnp.maximum(start, first), jnp.minimum(end, last)
  expected = compiled(op)(q, k, v, start, end, d_out, d_lse)
  key = jnp.arange(S)[None, :, None, None]
  other = (key < first) | (key >= last)
  k, v = (jnp.where(other, 1e4, x) for x in (k, v))
  actual = compiled(op)(q, k, v, start, end, d_out, d_lse)
  chex.assert_trees_all_equal(actual, expected)
  for gradient in actual[3:]:
    np.testing.assert_array_equal(jnp.where(other, gradient, 0), 0)


@pytest.mark.parametrize("op", OPS)
def test_large_logits(op):
  """Logits of some hundreds overflow nothing."""
  q, *rest = make_inputs("any")
  args = 100 * q, *rest
  # They round to 2e-5, which is the relative error of a weight.
  assert_close(compiled(op)(*args), loops(*args), 1e-4, 5e-3)


def test_same_when_sharded_over_the_batch():
  args = make_inputs("any")
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
