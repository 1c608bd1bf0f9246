"""sparse_mla_with_loss on TPUs: the kernels of its two parts, in turn."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from tests.kernels import tpu_topologies

LATENT_RANK, SCALE = 512, 0.07


def shapes(T, S, N, K=2048):
  a, bf16 = jax.ShapeDtypeStruct, jnp.bfloat16
  return (
    *(a((1, T, N, 576), bf16), a((1, S, 576), bf16), a((1, T, K), jnp.int32)),
    *(a((1, T, 64, 128), bf16), a((1, S, 128), bf16)),
    *(a((1, T, 64), jnp.float32), a((), bool)),
  )


def step(q, kv, indices, q_index, k_index, w, measure):
  def total(q, kv, q_index, k_index, w):
    out, _, loss = pallas_kernels.sparse_mla_with_loss(
      *(q, kv, indices, pallas_kernels.Index(q_index, k_index, w)),
      *(LATENT_RANK, SCALE),
      measure=measure,
    )
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(loss)

  return jax.value_and_grad(total, range(5))(q, kv, q_index, k_index, w)


@pytest.mark.slow
def test_both_parts_have_a_kernel():
  with jax.set_mesh(tpu_topologies.mesh("v6e")), dispatch.record() as chosen:
    jax.eval_shape(step, *shapes(64, 8192, 16))
  ops = "sparse_mla", "sparse_indexer_loss", "sparse_mla_with_loss"
  assert chosen == {op: ["mosaic_tpu"] for op in ops}


@pytest.mark.tpus
@pytest.mark.parametrize("chip", tpu_topologies.TOPOLOGIES)
@pytest.mark.parametrize("S, N", [(32_768, 16), (131_072, 128)])
def test_compiles_at_real_shapes(chip, S, N):
  tpu_topologies.compile_step(chip, step, shapes(4096, S, N))
