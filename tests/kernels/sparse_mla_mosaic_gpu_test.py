"""The Hopper kernels of sparse_mla: what they take, and that they lower.

What they compute is compared on a GPU: `python -m pallas_kernels.bench`.
"""

import chex
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.ops.sparse_mla import api
from pallas_kernels.ops.sparse_mla.mosaic_gpu import op as mosaic_gpu

C, CR = 512, 576


def shapes(N=128, T=256, S=4096, K=2048, B=1, width=CR, dtype=jnp.bfloat16):
  return (
    jax.ShapeDtypeStruct((B, T, N, width), dtype),
    jax.ShapeDtypeStruct((B, S, width), dtype),
    jax.ShapeDtypeStruct((B, T, K), jnp.int32),
  )


def attend(q, kv, indices, latent_rank=C):
  return mosaic_gpu.sparse_mla(q, kv, indices, latent_rank, 0.1)


def lowered(f, *args):
  traced = jax.jit(f).trace(*args)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
  "sizes",
  [
    {"N": 128, "S": 131072},
    {"N": 64, "K": 8192},
    {"N": 32, "K": 64, "B": 2},
    {"N": 16, "K": 192, "S": 95, "T": 1},
  ],
)
def test_forward(sizes):
  text = lowered(attend, *shapes(**sizes))
  assert "sparse_mla_forward" in text


@pytest.mark.parametrize(
  "deterministic", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_the_gradient_calls_both_kernels(deterministic):
  def loss(q, kv, indices):
    out, lse = api.sparse_mla(
      *(q, kv, indices, C, 0.1),
      deterministic=deterministic,
      implementation="mosaic_gpu",
    )
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

  text = lowered(jax.grad(loss, argnums=(0, 1)), *shapes())
  assert "sparse_mla_forward" in text
  assert "sparse_mla_backward" in text
  assert ("sparse_mla_key_sums" in text) == deterministic


def test_heads_are_filled_up_and_cut_off_again():
  out, lse = jax.eval_shape(attend, *shapes(N=16, T=3, B=2))
  chex.assert_shape(out, (2, 3, 16, C))
  chex.assert_shape(lse, (2, 3, 16))
  assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
  "sizes, message",
  [
    ({"dtype": jnp.float32}, "float32"),
    ({"width": 512}, "C.R=512"),
    ({"N": 48}, "N=48"),
    ({"N": 96}, "N=96"),
    ({"K": 100}, "K=100"),
    ({"K": 8256}, "K=8256"),
  ],
)
def test_names_what_it_cannot_do(sizes, message):
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(attend, *shapes(**sizes))


def test_another_latent_rank():
  with pytest.raises(NotImplementedError, match="C=256"):
    jax.eval_shape(lambda *xs: attend(*xs, latent_rank=256), *shapes())


def test_the_api_reaches_it_by_name():
  with pytest.raises(NotImplementedError, match="float32"):
    jax.eval_shape(
      lambda *xs: api.sparse_mla(*xs, C, 0.1, implementation="mosaic_gpu"),
      *shapes(dtype=jnp.float32),
    )
