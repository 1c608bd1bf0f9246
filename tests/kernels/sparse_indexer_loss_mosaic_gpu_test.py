"""The Hopper kernels of sparse_indexer_loss: they lower, or refuse in time;
what single threads compute.

Their numbers are checked on a GPU: `python -m pallas_kernels.bench`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import operands
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import (
  gradient as gradient_lib,
)
from pallas_kernels.ops.sparse_indexer_loss.mosaic_gpu import op as mosaic_gpu
from tests.kernels import by_thread
from tests.kernels import simulated

T, S, N, CR, M, I = 16, 32_768, 128, 576, 64, 128
SCALE = 0.07
bf16 = jnp.bfloat16


def op(q_index, k_index, w, indices, q, kv, lse, *options):
  return mosaic_gpu.sparse_indexer_loss(
    operands.Index(q_index, k_index, w),
    operands.Attended(q, kv, lse),
    *(indices, SCALE, *options),
  )


def shapes(B=1, K=2048, N=N, M=M, I=I, CR=CR, index=bf16, attention=bf16):
  return [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((B, T, M, I), index),
      ((B, S, I), index),
      ((B, T, M), jnp.float32),
      ((B, T, K), jnp.int32),
      ((B, T, N, CR), attention),
      ((B, S, CR), attention),
      ((B, T, N), jnp.float32),
    )
  ]


def gradients(*args):
  loss = lambda *index: jnp.sum(op(*index, *args[3:]))
  return jax.value_and_grad(loss, (0, 1, 2))(*args[:3])


def lowered(f, args) -> str:
  return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
  "sizes", [{"K": 2048}, {"K": 8192}, {"B": 3, "K": 192}, {"N": 16, "M": 32}]
)
def test_lowers_for_cuda_with_gradients(sizes):
  text = lowered(gradients, shapes(**sizes))
  # Target, comparison, gradient.
  assert text.count("mosaic_gpu_v2") == 3


def test_a_loss_that_is_not_measured_is_behind_a_condition():
  def step(measure, *args):
    return op(*args, None, measure)

  measure = jax.ShapeDtypeStruct((), bool)
  text = lowered(step, [measure, *shapes()])
  assert text.count("mosaic_gpu_v2") == 2
  assert "stablehlo.case" in text


@pytest.mark.parametrize(
  "sizes, reason",
  [
    ({"index": jnp.float32}, "index.q.dtype=float32"),
    ({"attention": jnp.float32}, "q.dtype=float32"),
    ({"M": 65}, "M=65"),
    ({"I": 64}, "I=64"),
    ({"K": 8193}, "K=8193"),
    ({"N": 136}, "N=136"),
    ({"N": 0}, "N=0"),
    ({"CR": 512}, "CR=512"),
  ],
)
def test_refuses_before_it_compiles(sizes, reason):
  with pytest.raises(NotImplementedError, match=reason):
    jax.eval_shape(op, *shapes(**sizes))


def test_heads_without_weight_and_keys_without_place_are_added():
  x = jnp.ones((2, 3, 5, 7))
  heads = mosaic_gpu._pad_heads(x, 2)
  chex.assert_shape(heads, (2, 3, 64, 7))
  assert float(heads.sum()) == x.size
  keys = mosaic_gpu._pad_keys(jnp.zeros((2, 3, 300), jnp.int32), -1)
  chex.assert_shape(keys, (2, 3, 512))
  assert int(keys.sum()) == -2 * 3 * 212


@pytest.mark.parametrize("heads", [16, 64])
def test_threads_mask_what_is_not_active(heads):
  keys = 64
  x = np.random.default_rng(0)
  similarity = x.normal(size=(keys, heads)).astype(np.float32)
  some = np.array([0.0, -0.0, 1e-30, 1e-45, np.inf, -np.inf, np.nan])
  similarity[:, 3] = x.choice(some, keys)
  d, w = (x.normal(size=n).astype(np.float32) for n in (keys, heads))
  with simulated.run_as(128, gradient_lib):
    masked = gradient_lib.where_active(
      by_thread.registers(similarity),
      by_thread.by_row(d),
      by_thread.pairs(by_thread.by_column(w)),
    )
    active = similarity.astype(jnp.bfloat16) > 0
    for numbers, factor in zip(masked, (d[:, None], w), strict=True):
      expected = by_thread.registers(np.where(active, factor, 0))
      for number, pair in zip(numbers, by_thread.pairs(expected), strict=True):
        np.testing.assert_array_equal(number.value, pair.value)
