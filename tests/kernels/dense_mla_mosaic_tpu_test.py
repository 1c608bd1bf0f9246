"""dense_mla on TPUs: numbers by interpretation, and that it compiles.

Interpretation follows each copy and finds races; memory that nobody has written
is NaN.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.dense_mla import api
from pallas_kernels.ops.dense_mla import reference
from pallas_kernels.ops.dense_mla.mosaic_tpu import mask_bits as mask_bits_lib
from pallas_kernels.ops.dense_mla.mosaic_tpu import op as mosaic_tpu
from pallas_kernels.tpu import heads
from tests.kernels import inputs
from tests.kernels import rows
from tests.kernels import tpu_topologies

# No tile divides T or S, and S exceeds K.
B, T, S, K, N, HR, U = 2, 200, 1100, 90, 2, 192, 128
SCALE = 0.1
TILES = mosaic_tpu.Tiles(bT=128, bS=1024, backward_bS=512, chunk=256, group=2)
bf16 = jnp.bfloat16


def value_and_vjp(op, q, k, v, start, end, d_out, d_lse, *indices):
  """out, lse, and the gradients to q, k and v."""
  f = lambda q, k, v: op(q, k, v, start, end, SCALE, *indices)
  results, pullback = jax.vjp(f, q, k, v)
  return *results, *pullback((d_out, d_lse))


def bits(indices, start, end, S):
  """bool[B, T, S]: whether a key is read."""
  key = np.arange(S)
  chosen = (np.asarray(indices)[..., None] == key).any(-2)
  start, end = (np.asarray(x)[..., None] for x in (start, end))
  return chosen & (key >= start) & (key < end)


def masked_reference(q, k, v, start, end, scale, indices):
  """As `reference`, of the keys that are read."""
  read_BT1S = bits(indices, start, end, S)[:, :, None]
  dead_BT11 = ~read_BT1S.any(-1, keepdims=True)
  logits_BTNS = scale * jnp.einsum("BTND,BSND->BTNS", q, k)
  logits_BTNS = jnp.where(read_BT1S, logits_BTNS, -jnp.inf)
  logits_BTNS = jnp.where(dead_BT11, 0.0, logits_BTNS)
  lse_BTN1 = jax.nn.logsumexp(logits_BTNS, axis=-1, keepdims=True)
  weights_BTNS = jnp.where(dead_BT11, 0.0, jnp.exp(logits_BTNS - lse_BTN1))
  out = jnp.einsum("BTNS,BSNU->BTNU", weights_BTNS, v)
  return out, jnp.where(dead_BT11, -jnp.inf, lse_BTN1)[..., 0]


@functools.cache  # tests share what they compile
def compiled(tiles):
  op = functools.partial(mosaic_tpu.dense_mla, tiles=tiles)
  return jax.jit(functools.partial(value_and_vjp, op))


def make_inputs(kind, dtype=jnp.float32):
  start, end = inputs.ranges(kind, T, S)
  start, end = start[:B], end[:B]
  dead = jnp.maximum(start, 0) >= jnp.minimum(end, S)
  return (
    inputs.normal(0, B, T, N, HR, dtype=dtype),
    inputs.normal(1, B, S, N, HR, dtype=dtype),
    inputs.normal(2, B, S, N, U, dtype=dtype),
    *(start, end),
    inputs.normal(3, B, T, N, U, dtype=dtype),
    jnp.where(dead[..., None], jnp.nan, inputs.normal(4, B, T, N)),
  )


def make_indices():
  """Any keys in any order; some are none, some queries have none."""
  indices = np.array(inputs.choices("plain", T, S, K)[:B])
  indices[:, :, 5::7] = -1
  indices[:, :, 3] = np.iinfo(np.int32).max
  indices[:, ::11] = S
  return jnp.asarray(indices)


def step(q, k, v, start, end, d_out, d_lse, *indices):
  op = mosaic_tpu.dense_mla if indices else api.dense_mla
  return value_and_vjp(op, q, k, v, start, end, d_out, d_lse, *indices)


def shapes(T, S, N, K=0):
  sizes = (1, T, N, HR), (1, S, N, HR), (1, S, N, U), (1, T, N, U)
  q, k, v, d_out = (jax.ShapeDtypeStruct(x, bf16) for x in sizes)
  bound = jax.ShapeDtypeStruct((1, T), jnp.int32)
  d_lse = jax.ShapeDtypeStruct((1, T, N), jnp.float32)
  args = q, k, v, bound, bound, d_out, d_lse
  return args + ((jax.ShapeDtypeStruct((1, T, K), jnp.int32),) if K else ())


def assert_close(actual, expected, rtol=2e-6, atol=4e-6):
  names = "out", "lse", "d_q", "d_k", "d_v"
  for name, x, y in zip(names, actual, expected, strict=True):
    rows.assert_close(x, y, rtol, atol, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind, group", [("causal", 2), ("any", 1)])
def test_matches_reference(kind, group):
  """With chunks that need no mask; queries in one group, and in two."""
  args = make_inputs(kind)
  tiles = dataclasses.replace(TILES, group=group)
  actual = compiled(tiles)(*args)
  assert_close(actual, value_and_vjp(reference.dense_mla, *args))


@pytest.mark.slow
def test_bfloat16():
  args = [x[:1] for x in make_inputs("packed", bf16)]
  actual = compiled(TILES)(*args)
  again = compiled(TILES)(*args)
  chex.assert_trees_all_equal(again, actual, strict=True)
  exact = (x.astype(jnp.float32) if x.dtype == bf16 else x for x in args)
  expected = value_and_vjp(reference.dense_mla, *exact)
  for x, dtype in zip(actual, (bf16, jnp.float32) + (bf16,) * 3):
    assert x.dtype == dtype
  rows.assert_close(actual[0], expected[0], 2**-7, 1e-6)
  rows.assert_close(actual[1], expected[1], 2e-6, 2e-6)
  for x, y in zip(actual[2:], expected[2:]):
    rows.assert_close(x, y, 2**-6, 2**-6)


@pytest.mark.slow
def test_reads_only_indices():
  args = *make_inputs("any"), make_indices()
  dead = ~bits(args[-1], *args[3:5], S).any(-1)
  assert dead.sum() > 20
  with_d_lse = lambda x: (
    *args[:6], jnp.where(dead[..., None], x, args[6]), args[7]
  )  # fmt: skip
  actual = compiled(TILES)(*with_d_lse(jnp.nan))
  assert_close(actual, value_and_vjp(masked_reference, *with_d_lse(0.0)))


def test_words():
  """Of a word and a bit of a second one."""
  S, K = 4096 + 200, 40
  indices = np.array(inputs.choices("plain", 35, S, K)[:B])
  indices[:, 3], indices[:, 4, ::5] = -1, S
  indices[:, 5] = 127 + 128 * np.arange(K) % 4096  # 32 bits of one word
  indices[:, 5, 32:] = -1
  start, end = (np.asarray(x[:B]) for x in inputs.ranges("any", 35, S))
  start, end = start.clip(0, S), end.clip(0, S)
  start[:, 5], end[:, 5] = 0, S
  words = jax.jit(functools.partial(mask_bits_lib.from_indices, S=S))(
    *(jnp.asarray(x) for x in (indices, start, end))
  )
  chex.assert_shape(words, (B, 35, 2, 128))
  bit = np.arange(32)[:, None]
  actual = np.asarray(words)[..., None, :] >> bit & 1
  actual = actual.reshape(B, 35, -1)[..., :S].astype(bool)
  np.testing.assert_array_equal(actual, bits(indices, start, end, S))


@pytest.mark.parametrize("N", (1, 2, 3))
@pytest.mark.parametrize("HR", (64, 128, 192, 256))
def test_what_is_read_of_heads_side_by_side(N, HR):
  q, k = (inputs.normal(i, 2, 5, N, HR) for i in range(2))
  q_BNTL, k_BSL = heads.queries(q.swapaxes(1, 2)), heads.side_by_side(k)
  for n in range(N):
    lanes = slice(heads.place(n, HR), heads.place(n, HR) + heads.width(HR))
    assert (lanes.start % 128, q_BNTL.shape[-1] % 128) == (0, 0)
    np.testing.assert_allclose(
      q_BNTL[:, n] @ k_BSL[..., lanes].swapaxes(1, 2),
      q[:, :, n] @ k[:, :, n].swapaxes(1, 2),
      *(1e-5, 1e-5),
    )


@pytest.mark.parametrize(
  "change, message",
  [
    ({"k": jnp.float32}, "k in float32"),
    ({"q": jnp.float16}, "q in float16"),
    ({"HR": 100}, "only multiples of 64"),
    ({"U": 64}, "only multiples of 64 and 128"),
    ({"scale": 0.0}, "is not positive"),
    ({"HR": 1 << 16}, "bytes of VMEM"),
  ],
)
def test_refuses(change, message):
  HR, U = change.get("HR", 192), change.get("U", 128)
  args = [
    jax.ShapeDtypeStruct(size, change.get(name, bf16))
    for name, size in zip("qkv", ((1, 8, 2, HR), (1, 8, 2, HR), (1, 8, 2, U)))
  ]
  bound = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  op = lambda *args: mosaic_tpu.dense_mla(*args, change.get("scale", 0.1))
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(op, *args, bound, bound)


@pytest.mark.slow
def test_compiles():
  """A TPU takes it by itself, forward and backward."""
  args = shapes(4096, 8192, 16)
  text = tpu_topologies.compile_step("v6e", step, args).as_text() or ""
  assert "dense_mla_forward_q1024_k4096_c512" in text
  assert "dense_mla_backward_q1024_k2048_c512" in text


@pytest.mark.tpus
@pytest.mark.parametrize("chip", tpu_topologies.TOPOLOGIES)
@pytest.mark.parametrize(
  "shape", [(4096, 4096, 128), (4096, 131_072, 16), (4096, 32_768, 128, 2048)]
)
def test_compiles_everywhere(chip, shape):
  tpu_topologies.compile_step(chip, step, shapes(*shape))
