"""Latents in 8 bits: FlashMLA's numbers, exactly, and what sparse_mla reads."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import latents
from pallas_kernels import operands
from pallas_kernels.ops.sparse_mla import api
from tests.kernels import eight_bits
from tests.kernels import hlo
from tests.kernels import inputs
from tests.kernels import oracles
from tests.kernels import rows
from tests.kernels import tpu_topologies

B, T, S, K, N = inputs.B, inputs.T, inputs.S, inputs.K, inputs.N
C, R = 256, inputs.R
SCALE = 0.1
IMPLEMENTATIONS = ("reference", "chunked_xla")


def bits(x) -> np.ndarray:
  """As integers: also -0 and what is no number are compared."""
  return np.asarray(x).view(f"u{x.dtype.itemsize}")


def assert_quantized(kv):
  """That they are the oracle's, to the last bit."""
  actual = jax.jit(latents.quantize, static_argnums=1)(kv, C)
  expected = eight_bits.latents(kv, C)
  for x, y in zip(jax.tree.leaves(actual), expected, strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(bits(x), bits(y))
  return actual


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_every_size(dtype):
  """Groups of one row have scales of their own."""
  size = 10.0 ** np.arange(-12, 30)[:, None, None]
  size = size * np.repeat([1, 1e-3, 0], [128, 128, R])
  assert_quantized(jnp.asarray(inputs.normal(0, 42, 9, C + R) * size, dtype))


def test_the_largest_number_of_a_group_may_be_any():
  """Each of bfloat16 below 2^127: where the scale doubles, too, and zero."""
  greatest = np.arange(0x7F00, dtype=np.uint16).view(ml_dtypes.bfloat16)
  kv = np.zeros((len(greatest), C + R), ml_dtypes.bfloat16)
  kv[:, 3], kv[:, 130] = greatest, greatest.astype(float) * -1
  tiny = np.abs(greatest.astype(np.float32)) < np.finfo(np.float32).tiny
  kv[tiny] = 0  # XLA takes denormals for 0 on CPUs
  found = assert_quantized(jnp.asarray(kv))
  assert {448.0, 256.0} <= set(np.asarray(found.values[:, 3], np.float32))
  assert found.scale.min() == 2.0**-13


def test_denormals_are_zeros():
  kv = jnp.full((3, C + R), 1e-40, jnp.float32)
  found = jax.jit(latents.quantize, static_argnums=1)(kv, C)
  np.testing.assert_array_equal(np.asarray(found.values, np.float32), 0)
  np.testing.assert_array_equal(found.scale, np.float32(2.0**-13))


def test_what_is_no_number_stays_none():
  kv = inputs.normal(0, 4, C + R).at[1, 7].set(jnp.nan).at[2, 9].set(jnp.inf)
  found = latents.dequantize(latents.quantize(kv, C), jnp.bfloat16)
  finite = np.isfinite(np.asarray(found, np.float32)).all(-1)
  np.testing.assert_array_equal(finite, [True, False, False, True])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_read_is_exact(dtype):
  """The product of a value and its scale has 4 bits: bfloat16 has them."""
  size = 10.0 ** np.arange(-12, 30)[:, None, None]
  kv = inputs.normal(0, 42, 9, C + R) * size
  found = latents.quantize(kv, C)
  read = jax.jit(latents.dequantize, static_argnums=1)(found, dtype)
  assert read.dtype == dtype and read.shape == found.shape == kv.shape
  exact = np.asarray(found.values, np.float64) * np.repeat(
    np.asarray(found.scale, np.float64), 128, -1
  )
  np.testing.assert_array_equal(np.asarray(read[..., :C], np.float64), exact)
  np.testing.assert_array_equal(
    np.asarray(read[..., C:], np.float32),
    np.asarray(kv[..., C:].astype(jnp.bfloat16), np.float32),
  )
  # Rounding again changes nothing.
  again = latents.quantize(read, C)
  np.testing.assert_array_equal(
    np.asarray(latents.dequantize(again, dtype), np.float32),
    np.asarray(read, np.float32),
  )


def test_a_row_has_656_bytes_at_deepseeks_widths():
  kv = jnp.zeros((1, 576), jnp.bfloat16)
  found = latents.quantize(kv, 512)
  assert sum(x.nbytes for x in jax.tree.leaves(found)) == 656


@pytest.mark.parametrize("rank", [1, 127, 200])
def test_ranks_that_no_group_divides_are_refused(rank):
  with pytest.raises(ValueError, match=f"latent_rank={rank}: .* multiple"):
    latents.quantize(jnp.zeros((1, 256)), rank)


def make_inputs(kind="invalid", dtype=jnp.float32):
  size = 10.0 ** np.random.default_rng(4).uniform(-3, 0.3, (B, S, 1))
  return (
    inputs.normal(0, B, T, N, C + R, dtype=dtype),
    jnp.asarray(inputs.normal(1, B, S, C + R) * size, dtype),
    inputs.choices(kind),
  )


@functools.cache
def compiled(implementation):
  run = functools.partial(
    api.sparse_mla,
    latent_rank=C,
    scale=SCALE,
    implementation=implementation,
  )
  return jax.jit(run)


def loops(q, kv, indices):
  nothing = np.zeros((B, T, N, C)), np.zeros((B, T, N))
  kv = eight_bits.rounded_latents(kv, C)
  return oracles.sparse_mla(q, kv, indices, C, SCALE, *nothing)[:2]


@pytest.mark.parametrize("kind", inputs.CHOICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_is_that_to_what_rounding_leaves(implementation, kind):
  q, kv, indices = make_inputs(kind)
  args = q, latents.quantize(kv, C), indices
  expected = loops(q, kv, indices)
  for x, y in zip(compiled(implementation)(*args), expected, strict=True):
    rows.assert_close(x, y, 2e-6, 2e-6)
  exact = compiled(implementation)(q, kv, indices)
  assert np.abs(exact[0] - expected[0]).max() > 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_in_bfloat16_is_that_to_rows_of_it(implementation):
  """To the last bit: what is read of 8 bits are numbers of bfloat16."""
  q, kv, indices = make_inputs("invalid", jnp.bfloat16)
  rounded = jnp.asarray(eight_bits.rounded_latents(kv, C), jnp.bfloat16)
  run = compiled(implementation)
  actual = run(q, latents.quantize(kv, C), indices)
  for x, y in zip(actual, run(q, rounded, indices), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_are_not_chosen_may_hold_no_numbers(implementation):
  q, kv, indices = make_inputs("plain")
  indices = jnp.where(indices % 3 == 1, -1, indices)
  kept = latents.quantize(kv, C)
  other = jnp.arange(S) % 3 == 1
  garbage = jax.tree.map(
    lambda x: jnp.where(other[None, :, None], jnp.full_like(x, jnp.nan), x),
    kept,
  )
  run = compiled(implementation)
  for x, y in zip(run(q, garbage, indices), run(q, kept, indices)):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_there_is_no_gradient(implementation):
  q, kv, indices = make_inputs()
  kept = latents.quantize(kv, C)

  def loss(q):
    run = functools.partial(api.sparse_mla, implementation=implementation)
    return jnp.sum(run(q, kept, indices, C, SCALE)[0])

  with pytest.raises(ValueError, match="latents in 8 bits are for inference"):
    jax.grad(loss)(q)


@pytest.mark.parametrize("rank", [128, C + R])
def test_another_rank_than_theirs_is_refused(rank):
  q, kv, indices = make_inputs()
  with pytest.raises(ValueError, match=f"latent_rank={rank} must be {C}"):
    api.sparse_mla(q, latents.quantize(kv, C), indices, rank, SCALE)


def test_the_kernel_for_tpus_refuses_them():
  q, kv, indices = make_inputs()
  with pytest.raises(NotImplementedError, match="kv in 8 bits"):
    api.sparse_mla(
      *(q, latents.quantize(kv, C), indices, C, SCALE),
      implementation="mosaic_tpu",
    )


def test_no_copy_of_all_rows_is_made():
  """On a TPU: on a CPU, XLA reads numbers of 8 bits by way of 16."""
  S, struct = 2**20, jax.ShapeDtypeStruct
  row = latents.quantize(jnp.zeros((1, C + R), jnp.bfloat16), C)

  def step(q, indices, *kept):
    kv = operands.QuantizedLatents(*kept)
    return api.sparse_mla(
      *(q, kv, indices, C, SCALE), implementation="chunked_xla"
    )

  shapes = [
    struct((1, 8, N, C + R), jnp.bfloat16),
    struct((1, 8, 64), jnp.int32),
    *(struct((1, S, x.shape[-1]), x.dtype) for x in jax.tree.leaves(row)),
  ]
  compiled = tpu_topologies.compile_step("v6e", step, shapes)
  assert hlo.temporary_bytes(compiled) < S * C // 8
