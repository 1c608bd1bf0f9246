"""dense_indexer_loss on Hopper, as far as a machine without a GPU can tell.

The kernels lower for CUDA at the real shapes. What surrounds them is run with
each kernel replaced by what its docstring says, NaN where it writes nothing.
"""

import contextlib
import functools
import math
import re
from unittest import mock

import chex
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import operands
from pallas_kernels.ops.dense_indexer_loss import reference
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import kernels
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  scores as scores_lib,
)
from pallas_kernels.ops.dense_indexer_loss.mosaic_gpu import (
  target as target_lib,
)
from tests.kernels import inputs
from tests.kernels import rows

I, HR = 128, 192
SCALE = 0.1
# T, S, N, M: one chunk of queries and two tiles of keys, or the reverse.
SIZES = {"any": (95, 200, 2, 32), "packed": (300, 53, 2, 64)}


def shapes(B, T, S, N, M, dtype=jnp.bfloat16, I=I, HR=HR):
  a = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind)
  i32, f32 = jnp.int32, jnp.float32
  return (
    *(a(dtype, B, T, M, I), a(dtype, B, S, I), a(f32, B, T, M)),
    *(a(i32, B, T), a(i32, B, T)),
    *(a(dtype, B, T, N, HR), a(dtype, B, S, N, HR), a(f32, B, T, N)),
    a(f32, B, T),
  )


def value_and_gradient(
  op, q_index, k_index, w, start, end, q, k, lse, d_loss, measure=True, **kwargs
):
  loss, pullback = jax.vjp(
    lambda index: op(
      *(index, operands.Attended(q, k, lse), start, end, SCALE),
      measure=measure,
      **kwargs,
    ),
    operands.Index(q_index, k_index, w),
  )
  return loss, *jax.tree.leaves(pullback(d_loss))


def make_inputs(kind, T, S, N, M):
  bf16 = jnp.bfloat16
  B = inputs.B
  start, end = inputs.ranges(kind, T, S)
  q = inputs.normal(0, B, T, N, HR, dtype=bf16)
  k = inputs.normal(1, B, S, N, HR, dtype=bf16)
  logits = SCALE * jnp.einsum(
    "BTND,BSND->BTNS", q, k, preferred_element_type=jnp.float32
  )
  key = jnp.arange(S)[None, None]
  visible = (key >= start[..., None]) & (key < end[..., None])
  lse = jax.nn.logsumexp(logits, -1, where=visible[:, :, None])
  return (
    inputs.normal(2, B, T, M, I, dtype=bf16),
    inputs.normal(3, B, S, I, dtype=bf16),
    inputs.normal(4, B, T, M) / M,
    *(start, end, q, k, lse),
    inputs.normal(5, B, T),
  )


def of_chunk(x, place, chunk):
  """Rows of a chunk; zeros beyond the last, which TMA fills in."""
  x = jnp.pad(x, [(0, 0), (0, chunk), *[(0, 0)] * (x.ndim - 2)])
  return jax.lax.dynamic_slice_in_dim(x[place[0]], place[1], chunk).astype(
    jnp.float32
  )


def keys(x, place, width):
  padding = [(0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
  return jnp.pad(x[place[0]], padding).astype(jnp.float32)


def unless_seen(x, start, end, bT, bS):
  """NaN in tiles [bT, bS] that the kernel leaves out; the last may be cut."""
  first_S = bS * jnp.arange(-(-x.shape[1] // bS))[None]
  start, end = start.reshape(-1, bT), end.reshape(-1, bT)
  alive = start < end
  start = jnp.where(alive, start, x.shape[1]).min(1)[:, None]
  end = jnp.where(alive, end, 0).max(1)[:, None]
  visible = (first_S < end) & (first_S + bS > start)
  visible = jnp.repeat(jnp.repeat(visible, bT, 0), bS, 1)[:, : x.shape[1]]
  return jnp.where(visible, x, jnp.nan)


def distributions(index, attended, where, scale, width):
  queries = where.queries
  place, start, end = queries.place, queries.start, queries.end
  chunk = start.shape[0]
  similarity = jnp.einsum(
    "TMI,SI->TMS",
    of_chunk(index.q, place, chunk),
    keys(index.k, place, width),
  )
  w = 2 * of_chunk(index.half_w.swapaxes(1, 2), place, chunk)
  scores = jnp.einsum("TMS,TM->TS", jax.nn.relu(similarity), w)
  key = jnp.arange(width)[None]
  visible = (key >= start[:, None]) & (key < end[:, None])
  scores = jnp.where(visible, scores, -jnp.inf)

  active = (similarity > 0) & visible[:, None]
  words = []
  for word in active.swapaxes(0, 1).reshape(2, 16, 2, chunk, width):
    bit = jnp.arange(16)[:, None] + 16 * jnp.arange(2)[None]
    words.append(jnp.sum(word << bit[..., None, None], (0, 1)))

  tiled = scores.reshape(chunk, -1, scores_lib.bS)
  top = tiled.max(-1)
  finite = jnp.where(jnp.isneginf(top), 0.0, top)
  total = jnp.exp(tiled - finite[..., None]).sum(-1)
  scores = unless_seen(scores, start, end, scores_lib.bT, kernels.bS)

  wider = -(-width // target_lib.bS) * target_lib.bS
  logits = scale * jnp.einsum(
    "TND,SND->TNS",
    of_chunk(attended.q, place, chunk),
    keys(attended.k, place, wider),
  )
  bias = of_chunk(attended.bias.swapaxes(1, 2), place, chunk) / np.log2(np.e)
  target = unless_seen(
    jnp.exp(logits + bias[..., None]).sum(1),
    *(start, end, kernels.bT, target_lib.bS),
  )
  words = jnp.stack(words).astype(jnp.int32)
  return scores_lib.Scores(scores, words, top.T, total.T), target


def gradients(d_scores, active, k_index, weighted_q, where, d_k):
  heads, f32 = np.arange(64), jnp.float32
  bit = heads % 32 // 2 + 16 * (heads % 2)
  active = (active[heads // 32] >> bit[:, None, None]) & 1
  g = jnp.where(active.swapaxes(0, 1) != 0, d_scores[:, None], 0.0).astype(f32)
  k = keys(k_index, where.queries.place, d_scores.shape[1])
  d_k += jnp.einsum("TMS,TMI->SI", g, weighted_q.astype(f32))
  return jnp.einsum("TMS,SI->TMI", g, k), d_k


@contextlib.contextmanager
def without_kernels():
  """The surroundings call what the kernels' docstrings say, in their place."""
  with (
    mock.patch.object(kernels, "distributions", distributions),
    mock.patch.object(kernels, "gradients", gradients),
  ):
    yield


@functools.cache  # tests share what they run
def run_without_kernels(kind, size, wrap=lambda f: f, **kwargs):
  op = functools.partial(
    value_and_gradient, mosaic_gpu.dense_indexer_loss, **kwargs
  )
  with without_kernels():
    return jax.jit(wrap(op))(*make_inputs(kind, *size))


@pytest.mark.parametrize(
  "B, T, S, N, M",
  [
    (1, 32768, 32768, 128, 64),
    pytest.param(2, 95, 300, 8, 32, marks=pytest.mark.slow),
    pytest.param(1, 1, 1, 16, 64, marks=pytest.mark.slow),
    pytest.param(1, 4096, 131072, 128, 64, marks=pytest.mark.slow),
  ],
)
def test_lowers(B, T, S, N, M):
  step = functools.partial(value_and_gradient, mosaic_gpu.dense_indexer_loss)
  lowered = jax.jit(step).trace(*shapes(B, T, S, N, M))
  text = lowered.lower(lowering_platforms=("cuda",)).as_text()
  # One kernel for the loss, two for the gradient.
  assert text.count("@mosaic_gpu_v2") == 3
  tensors = re.findall(r"tensor<((?:\d+x)+)\w", text)
  sizes = [math.prod(map(int, x[:-1].split("x"))) for x in tensors]
  if T == S > 1024:  # otherwise k alone is larger
    assert max(sizes) < T * S


@pytest.mark.parametrize(
  "change, why",
  [
    (dict(dtype=jnp.float32), "dtype=float32"),
    (dict(M=128), "M=128"),
    (dict(I=64), "I=64"),
    (dict(HR=96), "HR=96"),
    (dict(S=1 << 20), "S=1048576"),
  ],
)
def test_refuses(change, why):
  args = shapes(**(dict(B=1, T=8, S=64, N=8, M=64) | change))
  op = functools.partial(value_and_gradient, mosaic_gpu.dense_indexer_loss)
  with pytest.raises(NotImplementedError, match=why):
    jax.eval_shape(op, *args)


@pytest.mark.parametrize(
  "kind, size",
  [
    ("any", SIZES["any"]),
    pytest.param("packed", SIZES["packed"], marks=pytest.mark.slow),
  ],
)
def test_surroundings(kind, size):
  actual = run_without_kernels(kind, size)
  expected = jax.jit(
    functools.partial(value_and_gradient, reference.dense_indexer_loss)
  )(*make_inputs(kind, *size))
  np.testing.assert_allclose(actual[0], expected[0], 1e-4, 1e-5)
  for x, y, rtol in zip(actual[1:], expected[1:], (2**-6, 2**-6, 2**-7)):
    assert x.dtype == y.dtype
    rows.assert_close(x, y, rtol, 2**-8)


@pytest.mark.slow
def test_heads_over_devices():
  n, heads = P(), P(None, None, "x")
  auto = jax.sharding.AxisType.Auto
  with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(auto,))):
    actual = run_without_kernels(
      *("any", SIZES["any"]),
      wrap=lambda f: jax.shard_map(
        f,
        in_specs=(n, n, n, n, n, heads, heads, heads, n),
        out_specs=n,
        check_vma=False,
      ),
      heads_axis="x",
    )
  expected = run_without_kernels("any", SIZES["any"])
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_needs_no_loss():
  loss, *gradients = run_without_kernels("any", SIZES["any"], measure=False)
  np.testing.assert_array_equal(loss, 0)
  expected = run_without_kernels("any", SIZES["any"])
  chex.assert_trees_all_equal(gradients, list(expected[1:]))
