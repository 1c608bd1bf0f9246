"""The blocks of a cluster combine attention to their keys, as simulated."""

import contextlib
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper import fragments
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import combine
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import plan
from tests.kernels import by_thread
from tests.kernels import simulated
from tests.kernels.simulated import cluster
from tests.kernels.simulated import memory

N, C, KEYS = plan.ROWS, 512, 24
NEVER = -1e30  # a block's top without a key


def attended(x, blocks):
  """What each block has, and what attention to all keys gives.

  Head 0 has no key, head 1 none in any block but the last, block 1 none at all.
  """
  logits = x.normal(scale=9, size=(blocks, N, KEYS))
  logits[x.random(logits.shape) < 0.25] = -np.inf
  logits[:, 0] = logits[:-1, 1] = logits[1] = -np.inf
  values = x.normal(size=(blocks, KEYS, C))
  highest = logits.max(2, keepdims=True)
  below = x.uniform(0, 8, highest.shape)  # of the top that weights refer to
  top = np.where(np.isfinite(highest), highest - below, NEVER)
  weights = np.exp2(logits - top)
  mine = np.einsum("bnk,bkc->bnc", weights, values).astype(np.float32)
  halves = weights.reshape(blocks, N, 2, -1).sum(3)
  numbers = np.full((blocks, len(plan.Row), N), np.nan, np.float32)
  numbers[:, plan.Row.TOP_1] = top[..., 0]
  numbers[:, plan.Row.SUM_0] = halves[..., 0]
  numbers[:, plan.Row.SUM_1] = halves[..., 1]
  numbers[:, plan.Row.BARRIERS] = 0
  every = np.exp2(
    logits - np.where(np.isfinite(m := logits.max((0, 2))), m, 0)[None, :, None]
  )
  total = every.sum((0, 2))
  out = np.einsum("bnk,bkc->nc", every, values)
  out /= np.where(total > 0, total, 1)[:, None]
  with np.errstate(divide="ignore"):
    lse = np.log(total) + np.where(np.isfinite(m), m, 0) * np.log(2)
  return mine, numbers, out, lse


class Expected:
  """Double of `signals` that counts off the bytes of a barrier."""

  def expect(self, barrier, size, where):
    _, at = barrier.touched(0, 4, where)
    counts = barrier.array.view(np.int32)
    np.add.at(counts, at[:, 0] // 4, -size.value[where.value])

  def wait(self, barrier, parity):
    del parity
    _, at = barrier.touched(0, 4)
    assert (barrier.array.view(np.int32)[at[:, 0] // 4] == 0).all()


def run(mine, numbers, out, lse):
  """Runs both consumers of each block."""
  blocks = len(mine)
  n = 128 * blocks
  keys = np.full((blocks, 2 * N * 576), np.nan, jnp.bfloat16)
  queries = np.full((blocks, N * 576), np.nan, jnp.bfloat16)
  with contextlib.ExitStack() as stack:
    for module in (fragments, combine):
      stack.enter_context(simulated.run_as(n, module))
    stack.enter_context(mock.patch.object(combine, "signals", Expected()))
    for which in range(2):
      combine.exchange(
        by_thread.registers(*mine[:, :, C // 2 * which :][:, :, : C // 2]),
        *map(cluster.place, (keys, queries, numbers)),
        memory.Place(out),
        memory.Place(lse),
        which=which,
        blocks=blocks,
      )


@pytest.mark.parametrize("blocks", range(2, 9))
def test_is_attention_to_all_keys(blocks):
  x = np.random.default_rng(blocks)
  mine, numbers, expected_out, expected_lse = attended(x, blocks)
  out = np.full((N, C), np.nan, jnp.bfloat16)
  lse = np.full(N, np.nan, np.float32)
  run(mine, numbers, out, lse)
  assert np.isinf(lse[0]) and not out[0].any()
  np.testing.assert_allclose(lse, expected_lse, 2e-6, 2e-6)
  np.testing.assert_allclose(
    out.astype(np.float32), expected_out, rtol=2**-8, atol=2e-6
  )


def test_sums_in_the_order_of_the_blocks():
  """So that a result does not depend on which block is first to come."""
  blocks = 4
  mine, numbers, *_ = attended(np.random.default_rng(0), blocks)
  numbers[:, plan.Row.TOP_1] = 0
  numbers[:, [plan.Row.SUM_0, plan.Row.SUM_1]] = 1 / (2 * blocks)
  mine[:] = np.array([1, 2.0**30, -(2.0**30), 0.5])[:, None, None]
  out = np.full((N, C), np.nan, jnp.bfloat16)
  run(mine, numbers, out, np.zeros(N, np.float32))
  np.testing.assert_array_equal(out.astype(np.float32), 0.5)
