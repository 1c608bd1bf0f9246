"""What is said to be fp32 is: no factor in fp32 is rounded for a product.

At JAX's default precision a TPU would make bfloat16 of it, and a GPU TF32. Read
off the programs lowered for both: a CPU rounds nothing.
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from dsa_jax import cache as cache_lib
from dsa_jax import frame as frame_lib
from pallas_kernels import contraction
from pallas_kernels import dispatch
from tests.kernels import hlo
from tests.model import models
from tests.train.learn import step_test

LAYER = dataclasses.replace(models.CONFIG, num_layers=1, num_dense_layers=0)
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}


def lowered(platform, f, *args):
  with (
    mock.patch.object(dispatch, "platform", lambda: platform),
    dispatch.kernels(False),
  ):
    traced = f.trace(*args)
    return traced.lower(lowering_platforms=(PLATFORMS[platform],))


def train(kind, cfg):
  train_step, state = step_test.start(step_test.stage(kind), cfg)
  return train_step, state, step_test.cut(step_test.batch(), 2)


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
  "kind, dtype",
  [("sparse", "bfloat16"), ("sparse", "float32"), ("warmup", "bfloat16")],
)
def test_a_training_step(platform, kind, dtype):
  cfg = dataclasses.replace(LAYER, dtype=dtype, vocab_size=264)
  assert not hlo.inexact_products(lowered(platform, *train(kind, cfg)))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decoding(platform, dtype):
  """Two tokens, with logits and drafts."""
  cfg = dataclasses.replace(LAYER, dtype=dtype)

  @jax.jit
  def decode(model, tokens, pages, offset):
    pool = cache_lib.make_pool(cfg, 8, 4)
    frame = frame_lib.make_cached_frame(
      *(cfg, pages, pool.page_size, offset, jnp.full_like(offset, 2), 2)
    )
    done = model.decode(tokens, frame, pool)
    drafts, pool = model.draft(tokens, done.hidden, frame, done.pool)
    return model.head(done.hidden), model.head(drafts), pool

  pages, offset = jnp.arange(8).reshape(2, 4), jnp.asarray([3, 9])
  args = models.model(cfg), models.tokens(2, 2), pages, offset
  assert not hlo.inexact_products(lowered(platform, decode, *args))


@pytest.mark.parametrize("precision", [None, "high", "highest"])
def test_a_rounded_product_is_found(precision):
  x = jnp.ones((4, 4))
  for factors, rounded in (((x, x), 1), ((x.astype(jnp.bfloat16),) * 2, 0)):
    f = jax.jit(lambda x, y: jnp.matmul(x, y, precision=precision))
    found = hlo.inexact_products(lowered("tpu", f, *factors))
    assert len(found) == (rounded if precision != "highest" else 0)


def test_fp32_is_exact_and_bfloat16_in_one_pass():
  bf16 = jnp.bfloat16
  assert contraction.precision(jnp.float32) == jax.lax.Precision.HIGHEST
  assert contraction.precision(bf16, jnp.float32) is not None  # as promoted
  assert contraction.precision(bf16, bf16) is None
