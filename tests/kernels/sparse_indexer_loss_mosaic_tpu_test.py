"""sparse_indexer_loss on TPUs: numbers by interpretation, and that it compiles.

Interpretation follows each copy and finds races; memory that nobody has written
is NaN.
"""

import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.sparse_indexer_loss import api
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import op as mosaic_tpu
from pallas_kernels.tpu import row_plan
from pallas_kernels.tpu import row_walk
from tests.kernels import heads
from tests.kernels import inputs
from tests.kernels import oracles
from tests.kernels import rows
from tests.kernels import sparse_indexer_loss_test as portable
from tests.kernels import tpu_topologies

bf16 = jnp.bfloat16
# Interpretation is slow: three blocks of queries, the last not full, choosing
# alike and read a union, anything and read it apart, or hardly any key.
T = 11
TILES = row_plan.Tiles(bQ=4, bK=8, longest_union=2)
op = functools.partial(mosaic_tpu.sparse_indexer_loss, tiles=TILES)


def make_inputs(dtype=jnp.float32):
  q_index, k_index, w, indices, q, kv, _, d_loss = portable.make_inputs(
    "invalid", dtype
  )
  alike, anything = inputs.choices("packed"), inputs.choices("plain")
  blocks = alike[:, 8:12], anything[:, :4], indices[:, 3:6]
  indices = jnp.concatenate(blocks, 1)
  q_index, w, q, d_loss = (x[:, :T] for x in (q_index, w, q, d_loss))
  lse = portable.attended(q, kv, indices)
  return q_index, k_index, w, indices, q, kv, lse, d_loss


def expected(dtype=jnp.float32):
  q_index, k_index, w, indices, q, kv, lse, d_loss = make_inputs(dtype)
  return oracles.sparse_indexer_loss(
    q_index, k_index, w, indices, q, kv, lse, portable.SCALE, d_loss
  )


@functools.cache  # tests share what they compile
def compiled():
  return jax.jit(functools.partial(portable.value_and_vjp, op))


def run(*args, measure=True):
  # Fewer products at once than a block has heads.
  with mock.patch.object(row_walk, "_AT_ONCE", 2 * portable.N):
    return compiled()(*args, measure=jnp.bool(measure))


def with_noise(args):
  """Large numbers wherever nothing was chosen: they must not matter."""
  q_index, k_index, w, indices, q, kv, lse, d_loss = args
  chosen = np.zeros(k_index.shape[:2], bool)
  for b, row in enumerate(np.asarray(indices)):
    chosen[b, row[(row >= 0) & (row < portable.S)]] = True
  k_index = jnp.where(chosen[..., None], k_index, 1e4)
  kv = jnp.where(chosen[..., None], kv, 1e4)
  dead_BT = dead(indices)
  q_index = jnp.where(dead_BT[..., None, None], 1e4, q_index)
  w = jnp.where(dead_BT[..., None], 1e4, w)
  d_loss = jnp.where(dead_BT, 1e4, d_loss)
  return q_index, k_index, w, indices, q, kv, lse, d_loss


def dead(indices):
  return ~((indices >= 0) & (indices < portable.S)).any(-1)


@functools.cache
def result():
  return run(*with_noise(make_inputs()))


def shapes(T, S, N, M=64, I=128, K=2048, CR=576, dtype=bf16, key_dtype=None):
  a = jax.ShapeDtypeStruct
  return (
    *(a((1, T, M, I), dtype), a((1, S, I), key_dtype or dtype)),
    a((1, T, M), jnp.float32),
    a((1, T, K), jnp.int32),
    *(a((1, T, N, CR), dtype), a((1, S, CR), dtype)),
    *(a((1, T, N), jnp.float32), a((1, T), jnp.float32)),
  )


def step(*args):
  return portable.value_and_vjp(mosaic_tpu.sparse_indexer_loss, *args)


def test_both_kinds_of_blocks():
  plan = row_plan.plan(make_inputs()[3], portable.S, TILES)
  assert set(np.unique(plan.blocks[..., 1])) == {0, 1}


@pytest.mark.slow
def test_is_what_the_loops_compute():
  loss, *gradients = result()
  expected_loss, *others = expected()
  np.testing.assert_allclose(loss, expected_loss, 5e-6, 5e-6)
  for x, y in zip(gradients, others):
    rows.assert_close(x, y, 5e-6, 5e-6)
  assert np.mean(loss) > 0.1


@pytest.mark.slow
def test_nothing_chosen_no_loss():
  dead_BT = dead(make_inputs()[3])
  assert dead_BT.sum() > 0
  loss, d_q_index, _, d_w, *_ = result()
  for x in (loss, d_q_index, d_w):
    np.testing.assert_array_equal(x[dead_BT], 0)


@pytest.mark.slow
def test_the_gradient_needs_no_loss():
  loss, *gradients = run(*with_noise(make_inputs()), measure=False)
  np.testing.assert_array_equal(loss, 0)
  chex.assert_trees_all_equal(gradients, list(result()[1:]))


@pytest.mark.parametrize(
  "change, why",
  [
    (dict(dtype=jnp.float16), "kv in float16"),
    (dict(key_dtype=jnp.float32), "k_index in float32"),
    (dict(K=0), "K=0"),
    (dict(S=1 << 24), "S=16777216"),
    (dict(K=1 << 14), "K=16384 .* bytes of SMEM"),
    (dict(N=4096), "N=4096 .* bytes of VMEM"),
  ],
)
def test_refuses(change, why):
  args = shapes(**(dict(T=64, S=1024, N=8) | change))
  with pytest.raises(NotImplementedError, match=why):
    jax.eval_shape(step, *args)


def test_is_first():
  assert next(iter(api.IMPLEMENTATIONS)) == "mosaic_tpu"


@pytest.mark.slow
def test_compiles():
  tpu_topologies.compile_step("v6e", step, shapes(64, 4096, 16, K=256))


@pytest.mark.slow
def test_bfloat16():
  args = make_inputs(bf16)
  loss, *gradients = run(*args)
  expected_loss, *others = expected(bf16)
  np.testing.assert_allclose(loss, expected_loss, 5e-6, 5e-6)
  for x, y, like in zip(gradients, others, args):
    assert x.dtype == like.dtype
    rows.assert_close(x, y, 2**-6, 2**-8)


@pytest.mark.long
def test_heads_over_devices():
  auto = jax.sharding.AxisType.Auto
  with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(auto,))):
    sharded = heads.sharded(op, "x")
    step = jax.jit(functools.partial(portable.value_and_vjp, sharded))
    actual = step(*with_noise(make_inputs()))
  expected = result()
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.tpus
@pytest.mark.parametrize(
  "S, N", [(4096, 128), (5000, 16), (32_768, 128), (131_072, 16)]
)
@pytest.mark.parametrize("chip", tpu_topologies.TOPOLOGIES)
def test_compiles_at_real_shapes(chip, S, N):
  tpu_topologies.compile_step(chip, step, shapes(4096, S, N))
