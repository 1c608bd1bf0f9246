"""dense_indexer_loss on TPUs: numbers by interpretation, and that it compiles.

Interpretation follows each copy and finds races; memory that nobody has written
is NaN.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.dense_indexer_loss import api
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import (
  chunks as chunks_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import op as mosaic_tpu
from tests.kernels import dense_indexer_loss_test as portable
from tests.kernels import heads
from tests.kernels import hlo
from tests.kernels import oracles
from tests.kernels import rows
from tests.kernels import tpu_topologies

bf16 = jnp.bfloat16
# Interpretation is slow: some of the queries, among them all kinds of ranges.
QUERIES = {"any": slice(13), "packed": slice(-13, None)}
# Several of each, none of which divides its length.
TILES = chunks_lib.Tiles(cores=2, bT=4, bS=27, target_bS=18, bN=2)
op = functools.partial(mosaic_tpu.dense_indexer_loss, tiles=TILES)


def some(kind, arrays):
  """Of arrays [B, T, ...]; those of keys stay whole."""
  T = portable.T
  return [x[:, QUERIES[kind]] if x.shape[1] == T else x for x in arrays]


def make_inputs(kind, dtype=jnp.float32):
  return some(kind, portable.make_inputs(kind, dtype, width=192))


def expected(kind, dtype=jnp.float32):
  """By loops; what is left out has no part in the gradient to the keys."""
  *args, d_loss = make_inputs(kind, dtype)
  return oracles.dense_indexer_loss(*args, portable.SCALE, d_loss)


@functools.cache  # tests share what they compile
def compiled():
  return jax.jit(functools.partial(portable.value_and_vjp, op))


def run(*args, measure=True):
  return compiled()(*args, measure=jnp.bool(measure))


def with_noise(kind, args):
  """Large numbers wherever a query sees no key: they must not matter."""
  q_index, k_index, w, start, end, q, k, lse, d_loss = args
  dead_BT = dead(kind)
  q_index = jnp.where(dead_BT[..., None, None], 1e4, q_index)
  q = jnp.where(dead_BT[..., None, None], -1e4, q)
  w = jnp.where(dead_BT[..., None], 1e4, w)
  d_loss = jnp.where(dead_BT, 1e4, d_loss)
  return q_index, k_index, w, start, end, q, k, lse, d_loss


def dead(kind):
  return ~portable.alive(kind)[:, QUERIES[kind]]


@functools.cache
def result(kind):
  return run(*with_noise(kind, make_inputs(kind)))


def shapes(T, S, N, M=64, I=128, HR=192, dtype=bf16, key_dtype=None):
  a = jax.ShapeDtypeStruct
  return (
    *(a((1, T, M, I), dtype), a((1, S, I), key_dtype or dtype)),
    a((1, T, M), jnp.float32),
    *[a((1, T), jnp.int32)] * 2,
    *(a((1, T, N, HR), dtype), a((1, S, N, HR), dtype)),
    *(a((1, T, N), jnp.float32), a((1, T), jnp.float32)),
  )


def step(*args):
  return portable.value_and_vjp(mosaic_tpu.dense_indexer_loss, *args)


def assert_close(actual, expected, rtol=5e-6, atol=5e-6):
  np.testing.assert_allclose(actual[0], expected[0], rtol, atol)
  for x, y in zip(actual[1:4], expected[1:4]):
    rows.assert_close(x, y, rtol, atol)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["any", "packed"])
def test_is_what_the_loops_compute(kind):
  assert_close(result(kind), expected(kind))


@pytest.mark.slow
def test_no_key_no_loss():
  dead_BT = dead("any")
  assert dead_BT.sum() > 4
  loss, d_q_index, _, d_w, *_ = result("any")
  for x in (loss, d_q_index, d_w):
    np.testing.assert_array_equal(x[dead_BT], 0)


@pytest.mark.slow
def test_all_dead():
  q_index, k_index, w, start, _, q, k, lse, d_loss = make_inputs("packed")
  lse = jnp.full_like(lse, -jnp.inf)
  for x in run(q_index, k_index, w, start, start, q, k, lse, d_loss):
    np.testing.assert_array_equal(x, 0)


@pytest.mark.slow
def test_the_gradient_needs_no_loss():
  args = with_noise("packed", make_inputs("packed"))
  loss, *gradients = run(*args, measure=False)
  np.testing.assert_array_equal(loss, 0)
  chex.assert_trees_all_equal(gradients, list(result("packed")[1:]))


@pytest.mark.parametrize(
  "change, why",
  [
    (dict(dtype=jnp.float16), "k_index in float16"),
    (dict(key_dtype=jnp.float32), "k_index in float32"),
    (dict(S=1 << 21), "S=2097152"),
    (dict(M=1024), "M=1024 .* bytes of VMEM"),
    (dict(HR=100), "HR=100 is not a multiple of 64"),
  ],
)
def test_refuses(change, why):
  args = shapes(**(dict(T=1024, S=1024, N=8) | change))
  with pytest.raises(NotImplementedError, match=why):
    jax.eval_shape(step, *args)


def test_is_chosen_on_a_tpu():
  assert next(iter(api.IMPLEMENTATIONS)) == "mosaic_tpu"


@pytest.mark.slow
def test_compiles():
  tpu_topologies.compile_step("v5p", step, shapes(512, 1024, 16))


@pytest.mark.slow
def test_bfloat16():
  args = make_inputs("any", bf16)
  loss, *gradients = run(*args)
  expected_loss, *others = expected("any", bf16)
  np.testing.assert_allclose(loss, expected_loss, 3e-6, 3e-6)
  for x, y, like in zip(gradients, others, args):
    assert x.dtype == like.dtype
    rows.assert_close(x, y, 2**-6, 2**-8)


@pytest.mark.tpus
@pytest.mark.parametrize(
  "S, N", [(4096, 128), (5000, 16), (32_768, 128), (131_072, 16)]
)
@pytest.mark.parametrize("chip", tpu_topologies.TOPOLOGIES)
def test_compiles_at_real_shapes(chip, S, N):
  T = 4096
  compiled = tpu_topologies.compile_step(chip, step, shapes(T, S, N))
  if S > 8192:  # otherwise the index queries alone are larger
    large = hlo.arrays_of(compiled, T * S)
    assert not [x for x in large if not is_input(x, T, S, N)]


def is_input(shape, T, S, N):
  """Whether it is q, also padded to whole lanes, or k, also with heads joined.

  A score of each query and key can have as many elements as q, but then keys
  are an axis of it.
  """
  size = math.prod(shape)
  is_q = size in (T * N * 192, T * N * 256) and S not in shape
  return is_q or (size == S * N * 192 and T not in shape)


@pytest.mark.long
def test_heads_over_devices():
  auto = jax.sharding.AxisType.Auto
  with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(auto,))):
    sharded = heads.sharded(op, "x")
    step = jax.jit(functools.partial(portable.value_and_vjp, sharded))
    actual = step(*with_noise("packed", make_inputs("packed")))
  expected = result("packed")
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
