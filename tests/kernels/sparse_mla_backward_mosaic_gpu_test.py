"""The Hopper backward kernel of sparse_mla, as far as a CPU can tell.

It lowers for CUDA at the real shapes; what it cannot do it refuses; and what is
not assembly computes what it should.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.sparse_mla.mosaic_gpu import backward as backward_lib
from pallas_kernels.ops.sparse_mla.mosaic_gpu import (
  backward_rows as backward_rows_lib,
)
from pallas_kernels.ops.sparse_mla.mosaic_gpu import key_sums as key_sums_lib

C, D = 512, 576
SCALE = 0.1


def make_shapes(B=1, T=64, N=128, S=8192, K=2048, D=D, dtype=jnp.bfloat16):
  f32 = jnp.float32
  shape = jax.ShapeDtypeStruct
  return (
    shape((B, T, N, D), dtype),
    shape((B, S, D), dtype),
    shape((B, T, K), jnp.int32),
    shape((B, T, N, C), dtype),
    shape((B, T, N), f32),
    shape((B, T, N, C), dtype),
    shape((B, T, N), f32),
  )


def backward(*args, latent_rank=C, **options):
  f = lambda *args: backward_lib.backward(*args, latent_rank, SCALE, **options)
  return jax.jit(f).trace(*args)


@pytest.mark.parametrize(
  "sizes, deterministic",
  [
    (dict(N=128, T=4096, S=131072), False),
    (dict(N=16, B=2, K=8192), False),
    (dict(N=128, T=1, S=95, K=64), True),
    (dict(N=32, B=2, T=300, S=1521), True),
  ],
)
def test_lowers(sizes, deterministic):
  args = make_shapes(**sizes)
  traced = backward(*args, deterministic=deterministic)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in text
  d_q, d_kv, p = traced.out_info
  assert (d_q.shape, d_q.dtype) == (args[0].shape, jnp.bfloat16)
  assert (d_kv.shape, d_kv.dtype) == (args[1].shape, jnp.bfloat16)
  assert (p.shape, p.dtype) == (args[2].shape, jnp.float32)


@pytest.mark.parametrize(
  "reason, sizes",
  [
    ("bfloat16", dict(dtype=jnp.float32)),
    ("heads", dict(N=192)),
    ("multiples of 64", dict(K=96)),
    ("multiples of 64", dict(K=0)),
    ("512 of 576", dict(D=544)),
    ("512 of 576", dict(latent_rank=448)),
  ],
)
def test_refuses(reason, sizes):
  options = {k: sizes.pop(k) for k in ("latent_rank",) if k in sizes}
  with pytest.raises(NotImplementedError, match=reason):
    backward(*make_shapes(**sizes), **options)


def test_columns_are_four_neighbours_of_each_thread():
  x = np.asarray(backward_rows_lib.permuted(jnp.arange(D)[None]))[0]
  assert sorted(x) == [*range(D)]
  for block in range(0, D, 16):
    for quad in range(4):  # columns 8 j + 2 quad + e of an accumulator
      mine = [x[block + 8 * j + 2 * quad + e] for j in (0, 1) for e in (0, 1)]
      assert mine == [block + 4 * quad + i for i in range(4)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_rows_are_summed_by_key(chunk):
  """Chunks of queries, with a stand-in for each of the two kernels."""
  B, T, S, K, width = 2, 3, 7, 4, 5
  rng = np.random.default_rng(0)
  indices = rng.integers(-2, S + 2, (B * T, K)).astype(np.int32)
  rows = rng.standard_normal((B * T, K, width)).astype(np.float32)

  def kernel(first, rows, rows_ref, seen_ref):
    n = min(chunk, B * T)
    query = jnp.minimum(first[0] + jnp.arange(n), B * T - 1)
    rows_ref[...] = rows[query].reshape(n * K, width)
    seen_ref[query] = jnp.ones_like(query)

  def add_up(order, ends, rows_ref, d_kv_ref):
    key = jnp.searchsorted(ends, jnp.arange(len(order)), side="right") - 1
    sums = jnp.zeros((B * S + 1, width)).at[key].add(rows_ref[...][order])
    d_kv_ref[...] += sums[: B * S].reshape(B, S, width)

  def run(rows):
    d_kv_ref = jax.new_ref(jnp.zeros((B, S, width)))
    seen = jax.ShapeDtypeStruct((B * T,), jnp.int32)
    with mock.patch.object(
      key_sums_lib.plgpu, "kernel", lambda *_, **__: add_up
    ):
      (seen,) = key_sums_lib.by_chunk(
        kernel, [rows], chunk, jnp.asarray(indices), T, d_kv_ref, [seen]
      )
    return d_kv_ref[...], seen

  d_kv, seen = jax.jit(run)(rows)
  expected = np.zeros((B, S, width), np.float32)
  for query in range(B * T):
    for j, key in enumerate(indices[query]):
      if 0 <= key < S:
        expected[query // T, key] += rows[query, j]
  np.testing.assert_allclose(d_kv, expected, rtol=1e-5, atol=1e-6)
  assert (np.asarray(seen) > 0).all()
