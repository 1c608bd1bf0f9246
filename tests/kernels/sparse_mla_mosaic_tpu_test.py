"""sparse_mla on TPUs: numbers by interpretation, and that it compiles.

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

from pallas_kernels.ops.sparse_mla import reference
from pallas_kernels.ops.sparse_mla.mosaic_tpu import op as mosaic_tpu
from pallas_kernels.tpu import row_plan
from pallas_kernels.tpu import row_walk
from tests.kernels import inputs
from tests.kernels import rows
from tests.kernels import tpu_topologies

# No tile divides T or K, and S exceeds K. Blocks end inside a row of the batch.
B, T, S, K, N, C, R = 2, 9, 53, 7, 16, 128, 64
SCALE = 0.1
TILES = row_plan.Tiles(bQ=4, bK=4, longest_union=2)
bf16 = jnp.bfloat16


def value_and_vjp(op, q, kv, indices, d_out, d_lse):
  """out, lse, and the gradients to q and kv."""
  f = lambda q, kv: op(q, kv, indices, d_out.shape[-1], SCALE)
  results, pullback = jax.vjp(f, q, kv)
  return *results, *pullback((d_out, d_lse))


OPS = {
  "kernel": functools.partial(mosaic_tpu.sparse_mla, tiles=TILES),
  "reference": reference.sparse_mla,
}


@functools.cache  # tests share what they compile
def compiled(op):
  return jax.jit(functools.partial(value_and_vjp, OPS[op]))


def choices(kind):
  """As `inputs.choices`; "near": neighbours choose nearly the same."""
  if kind != "near":
    return inputs.choices(kind, T, S, K)
  rng = np.random.default_rng(2)
  near = np.arange(T)[:, None] + np.arange(K)
  return jnp.asarray(rng.permuted(np.tile(near, (B, 1, 1)), axis=-1), "int32")


def make_inputs(kind, dtype=jnp.float32):
  return (
    inputs.normal(0, B, T, N, C + R, dtype=dtype),
    inputs.normal(1, B, S, C + R, dtype=dtype),
    choices(kind),
    inputs.normal(2, B, T, N, C, dtype=dtype),
    inputs.normal(3, B, T, N),
  )


@functools.cache
def run(op, kind, dtype=jnp.float32):
  return compiled(op)(*make_inputs(kind, dtype))


def unions(kind):
  """Of each block, whether it reads a union."""
  plan = row_plan.plan(choices(kind), S, TILES)
  return np.asarray(plan.blocks[..., 0, 1])


def step(T, S, N, K=2048):
  """Values and gradients at DeepSeek's widths, and the arguments' shapes."""
  a = jax.ShapeDtypeStruct
  shapes = (
    *(a((1, T, N, 576), bf16), a((1, S, 576), bf16)),
    *(a((1, T, K), jnp.int32), a((1, T, N, 512), bf16)),
    a((1, T, N), jnp.float32),
  )
  return functools.partial(value_and_vjp, mosaic_tpu.sparse_mla), shapes


def assert_close(actual, expected, rtol=5e-6, atol=5e-6):
  names = "out", "lse", "d_q", "d_kv"
  for name, x, y in zip(names, actual, expected, strict=True):
    assert x.dtype == y.dtype, name
    rows.assert_close(x, y, rtol, atol, name)


@pytest.mark.parametrize(
  "kind",
  [
    "invalid",
    *(
      pytest.param(kind, marks=pytest.mark.slow)
      for kind in ("near", "plain", "twice")
    ),
  ],
)
def test_matches_reference(kind):
  assert_close(run("kernel", kind), run("reference", kind))


def test_blocks_with_a_union_and_without():
  assert unions("near").all()
  assert not unions("plain").all()


@pytest.mark.slow
@mock.patch.object(row_walk, "_AT_ONCE", 2 * N)
def test_a_union_in_several_products():
  """As blocks of many heads need; each starts a part of the copies."""
  op = jax.jit(lambda *args: value_and_vjp(OPS["kernel"], *args))
  assert_close(op(*make_inputs("near")), run("reference", "near"))
  args = make_inputs("near", bf16)
  forward = jax.jit(lambda *args: OPS["kernel"](*args, C, SCALE))
  chex.assert_trees_all_equal(forward(*args[:3]), compiled("kernel")(*args)[:2])


@pytest.mark.slow
def test_bfloat16():
  """bfloat16 rounds by 2^-9: the results, and factors of each product."""
  args = make_inputs("invalid", bf16)
  actual = compiled("kernel")(*args)
  wide = [x.astype(jnp.float32) if x.dtype == bf16 else x for x in args]
  expected = compiled("reference")(*wide)
  assert [x.dtype for x in actual] == [bf16, jnp.float32, bf16, bf16]
  rows.assert_close(actual[0], expected[0], 2**-7)
  rows.assert_close(actual[1], expected[1], 2e-6)  # lse does not round
  for x, y in zip(actual[2:], expected[2:]):
    rows.assert_close(x, y, 2**-6, 2**-6)


@pytest.mark.slow
def test_no_key_no_output():
  """Dead queries: 0, -inf, no gradient, whatever the cotangents are.

  The others' are the same, bit by bit, in another run.
  """
  q, kv, indices, d_out, d_lse = make_inputs("invalid")
  dead_BT = ~((indices >= 0) & (indices < S)).any(-1)
  assert dead_BT.sum() > 1
  bad_BTN = jnp.where(dead_BT[..., None], np.nan, d_lse)
  actual = compiled("kernel")(q, kv, indices, d_out, bad_BTN)
  np.testing.assert_array_equal(actual[0][dead_BT], 0)
  np.testing.assert_array_equal(actual[1][dead_BT], -np.inf)
  np.testing.assert_array_equal(actual[2][dead_BT], 0)
  chex.assert_trees_all_equal(actual, run("kernel", "invalid"))


def test_heads_that_fill_no_register():
  q, kv, indices, d_out, d_lse = make_inputs("plain")
  inputs = q[:, :, :5], kv, indices, d_out[:, :, :5], d_lse[:, :, :5]
  assert_close(compiled("kernel")(*inputs), compiled("reference")(*inputs))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(dtype=jnp.float16), "float16"),
    (dict(C=120), "C=120"),
    (dict(S=1 << 23), "S=8388608 keys"),
    (dict(K=0), "K=0 keys"),
    (dict(K=1 << 14), "K=16384 .* bytes of SMEM"),
    (dict(N=640), "N=640 heads .* bytes of VMEM"),  # backward's
  ],
)
def test_refuses(change, message):
  sizes = dict(T=64, S=4096, N=128, C=512, K=2048, dtype=bf16) | change
  T, S, N, C, K, dtype = (sizes[x] for x in ("T", "S", "N", "C", "K", "dtype"))
  a = jax.ShapeDtypeStruct
  shapes = a((1, T, N, 576), dtype), a((1, S, 576), dtype)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(
      lambda *args: mosaic_tpu.sparse_mla(*args, C, SCALE),
      *(*shapes, a((1, T, K), jnp.int32)),
    )


@pytest.mark.slow
def test_compiles():
  """On a chip with two cores, which is what kv's gradient depends on."""
  op, shapes = step(T=64, S=4096, N=16, K=256)
  tpu_topologies.compile_step("v5p", op, shapes)


@pytest.mark.tpus
@pytest.mark.parametrize("chip", tpu_topologies.TOPOLOGIES)
@pytest.mark.parametrize("S, N", [(4096, 16), (131_072, 128)])
def test_compiles_at_real_shapes(chip, S, N):
  op, shapes = step(T=4096, S=S, N=N)
  tpu_topologies.compile_step(chip, op, shapes)
