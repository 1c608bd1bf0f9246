"""sparse_mla_with_loss is its two parts; its kernels lower, or refuse."""

import contextlib
import io
from unittest import mock

import jax
from jax import ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import checkpoint_names
from pallas_kernels.ops.sparse_indexer_loss import api as sparse_indexer_loss
from pallas_kernels.ops.sparse_mla_with_loss import api
from pallas_kernels.ops.sparse_mla_with_loss.mosaic_gpu import op as mosaic_gpu
from tests.kernels import inputs

B, T, S, N = inputs.B, inputs.T, inputs.S, inputs.N
C, R, M, I, SCALE = inputs.C, inputs.R, inputs.M, inputs.I, inputs.SCALE


def in_turn(
  q, kv, indices, q_index, k_index, w, C, scale, measure, implementation
):
  out, lse = pallas_kernels.sparse_mla(
    q, kv, indices, C, scale, implementation=implementation
  )
  loss = pallas_kernels.sparse_indexer_loss(
    pallas_kernels.Index(q_index, k_index, w),
    pallas_kernels.Attended(q, kv, lse),
    *(indices, scale),
    measure=measure,
    implementation=implementation,
  )
  return out, lse, loss


def at_once(
  q, kv, indices, q_index, k_index, w, C, scale, measure, implementation
):
  return pallas_kernels.sparse_mla_with_loss(
    *(q, kv, indices, pallas_kernels.Index(q_index, k_index, w), C, scale),
    measure=measure,
    implementation=implementation,
  )


def value_and_vjp(op, measure, implementation):
  q = inputs.normal(0, B, T, N, C + R)
  kv = inputs.normal(1, B, S, C + R)
  indices = inputs.choices("invalid")
  index = (
    inputs.normal(2, B, T, M, I),
    inputs.normal(3, B, S, I),
    inputs.normal(4, B, T, M) / M,
  )
  results, pullback = jax.vjp(
    lambda q, kv, *index: op(
      q, kv, indices, *index, C, SCALE, measure, implementation
    ),
    *(q, kv, *index),
  )
  cotangents = (
    inputs.normal(5, B, T, N, C),
    inputs.normal(6, B, T, N),
    inputs.normal(7, B, T),
  )
  return results, pullback(cotangents)


@pytest.mark.parametrize(
  "measure, implementation",
  [
    (True, None),
    (False, "chunked_xla"),
    pytest.param(True, "reference", marks=pytest.mark.slow),
  ],
)
def test_is_one_op_after_the_other(measure, implementation):
  expected, actual = (
    value_and_vjp(op, measure, implementation) for op in (in_turn, at_once)
  )
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_what_refuses_both_may_do_one():
  kernel = mock.Mock(side_effect=NotImplementedError("no such shape"))
  loss = mock.Mock(return_value=jnp.zeros((B, T)))
  with (
    mock.patch.dict(api.IMPLEMENTATIONS, mosaic_gpu=kernel),
    mock.patch.dict(sparse_indexer_loss.IMPLEMENTATIONS, mosaic_gpu=loss),
    mock.patch.object(jax, "default_backend", return_value="gpu"),
    mock.patch.object(
      pallas_kernels.dispatch, "device_kind", return_value="NVIDIA H200"
    ),
    mock.patch.object(pallas_kernels.dispatch, "_warn_portable"),
    pallas_kernels.dispatch.record() as chosen,
  ):
    jax.eval_shape(lambda: value_and_vjp(at_once, True, None)[0])
  assert chosen["sparse_mla"] == ["chunked_xla"]
  assert chosen["sparse_indexer_loss"] == ["mosaic_gpu"]


def shapes(T=16, S=8192, K=2048, N=128, dtype=jnp.bfloat16, I=128):
  return [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((1, T, N, 576), dtype),
      ((1, S, 576), dtype),
      ((1, T, K), jnp.int32),
      ((1, T, 64, I), jnp.bfloat16),
      ((1, S, I), jnp.bfloat16),
      ((1, T, 64), jnp.float32),
      ((), bool),
    )
  ]


def step(q, kv, indices, q_index, k_index, w, measure):
  def total(q, kv, q_index, k_index, w):
    out, _, loss = mosaic_gpu.sparse_mla_with_loss(
      *(q, kv, indices, pallas_kernels.Index(q_index, k_index, w), 512, SCALE),
      measure=measure,
    )
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(loss)

  return jax.value_and_grad(total, range(5))(q, kv, q_index, k_index, w)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"N": 16, "K": 192}])
def test_lowers_for_cuda_with_gradients(sizes):
  traced = jax.jit(step).trace(*shapes(**sizes))
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # The loss alone needs its target apart; it is behind a condition.
  assert "stablehlo.case" in text
  assert text.count("mosaic_gpu_v2") >= 6


def test_remat_keeps_what_the_attention_returned():
  policy = jax.checkpoint_policies.save_only_these_names(
    checkpoint_names.SPARSE_MLA
  )
  f = jax.checkpoint(
    lambda q, kv, indices, *index: mosaic_gpu.sparse_mla_with_loss(
      *(q, kv, indices, pallas_kernels.Index(*index), 512, SCALE)
    )[0],
    policy=policy,
  )
  with contextlib.redirect_stdout(io.StringIO()) as kept:
    ad_checkpoint.print_saved_residuals(f, *shapes()[:-1])
  named = [x for x in kept.getvalue().splitlines() if "named" in x]
  assert len(named) == 2
  assert named[0].startswith("bf16[1,16,128,512]"), named
  assert named[1].startswith("f32[1,16,128]"), named


@pytest.mark.parametrize(
  "sizes, reason", [({"dtype": jnp.float32}, "float32"), ({"I": 64}, "I=64")]
)
def test_refuses_before_it_compiles(sizes, reason):
  with pytest.raises(NotImplementedError, match=reason):
    jax.eval_shape(step, *shapes(**sizes))
