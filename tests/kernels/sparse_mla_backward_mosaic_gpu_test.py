"""The Hopper backward kernel of sparse_mla, as far as a CPU can tell.

It lowers for CUDA at the real shapes; around a stand-in for the kernel, the
gradients are right for any number of heads.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.sparse_mla import reference
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import kernel
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import key_sums
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import launch

C, D = 512, 576
SCALE = 0.1


def make_shapes(B=1, T=64, N=128, S=8192, K=2048):
  f32, bf16 = jnp.float32, jnp.bfloat16
  shape = jax.ShapeDtypeStruct
  return (
    shape((B, T, N, D), bf16),
    shape((B, S, D), bf16),
    shape((B, T, K), jnp.int32),
    shape((B, T, N, C), bf16),
    shape((B, T, N), f32),
    shape((B, T, N, C), bf16),
    shape((B, T, N), f32),
  )


@pytest.mark.parametrize(
  "sizes, deterministic, kernels",
  [
    (dict(N=128, T=4096, S=131072), False, 1),
    (dict(N=16, B=2, K=8192), False, 1),
    (dict(N=192, B=2), False, 2),
    (dict(N=256), False, 2),
    (dict(N=128, T=1, S=95, K=64), True, 1),
    (dict(N=32, B=2, T=300, S=1521), True, 1),
    (dict(N=192), True, 2),
    (dict(N=256), True, 2),
  ],
)
def test_lowers(sizes, deterministic, kernels):
  args = make_shapes(**sizes)
  f = lambda *args: launch.backward(*args, SCALE, deterministic=deterministic)
  traced = jax.jit(f).trace(*args)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu_v2") == kernels * (1 + deterministic)
  d_q, d_kv, p = traced.out_info
  assert (d_q.shape, d_q.dtype) == (args[0].shape, jnp.bfloat16)
  assert (d_kv.shape, d_kv.dtype) == (args[1].shape, jnp.bfloat16)
  assert (p.shape, p.dtype) == (args[2].shape, jnp.float32)


def summed_without_a_kernel():
  """Has `key_sums` add up rows with a stand-in for its kernel."""

  def add_up(order, ends, rows_ref, d_kv_ref):
    B, S, width = d_kv_ref.shape
    key = jnp.searchsorted(ends, jnp.arange(len(order)), side="right") - 1
    sums = jnp.zeros((B * S + 1, width)).at[key].add(rows_ref[...][order])
    d_kv_ref[...] += sums[: B * S].reshape(B, S, width)

  return mock.patch.object(key_sums.plgpu, "kernel", lambda *_, **__: add_up)


def stand_in(plan, queries, out_type=()):
  """Computes what `kernel.of` does, for one group of heads."""

  def run(
    first, tiles, q, d_out, kv, indices, biases, offsets, d_kv_ref, *refs
  ):
    query = jnp.minimum(first[0] + jnp.arange(queries), len(q) - 1)
    q, d_out = (x[query].astype(jnp.float32) for x in (q, d_out))
    index, biases, offsets = (x[query] for x in (indices, biases, offsets))
    place = jnp.arange(index.shape[1])[None]
    read = (place < 64 * tiles[query, None]) & (index >= 0)
    read &= index < plan.keys
    batch = query[:, None] // plan.queries
    keys = kv.reshape(*kv.shape[:2], -1, 2, 4, 2).swapaxes(-3, -2)
    keys = keys.reshape(kv.shape)[batch, index * read].astype(jnp.float32)
    logits = jnp.einsum("qnd,qkd->qnk", q, keys)
    p = jnp.exp2(logits * SCALE * np.log2(np.e) + biases[..., None])
    p *= read[:, None]
    d_p = jnp.einsum("qnc,qkc->qnk", d_out, keys[..., :C])
    d_s = p * (SCALE * d_p + offsets[..., None])
    d_q = jnp.einsum("qnk,qkd->qnd", d_s, keys).astype(jnp.bfloat16)
    rows = jnp.einsum("qnk,qnd->qkd", d_s, q)
    rows = rows.at[..., :C].add(jnp.einsum("qnk,qnc->qkc", p, d_out))
    sums = p.reshape(queries, plan.blocks, 64, -1).sum(2)
    if plan.deterministic:
      d_kv_ref[...] = rows.reshape(d_kv_ref.shape)
      for ref, x in zip(refs, (d_q, sums), strict=True):
        ref[query] = x
      return None
    d_kv_ref[...] = d_kv_ref[...].at[batch, index * read].add(rows)
    return d_q, sums

  return run


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("N", [16, 320])
def test_gradients_of_any_number_of_heads(N, deterministic, monkeypatch):
  B, T, S, K, bf16 = 2, 2, 90, 128, jnp.bfloat16
  x = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(x.normal(size=shape), bf16)
  q, kv = normal(B, T, N, D) / 4, normal(B, S, D)
  indices = jnp.asarray(x.integers(-20, S + 20, (B, T, K)), jnp.int32)
  indices = indices.at[0, 1].set(-1)  # a query without a key
  d_out, d_lse = normal(B, T, N, C), normal(B, T, N).astype(jnp.float32)
  monkeypatch.setattr(kernel, "of", stand_in)
  monkeypatch.setattr(launch, "_CHUNK_BYTES", 3 * 4 * D * K)

  @jax.jit
  def both(q, kv):
    f = lambda q, kv: reference.sparse_mla(q, kv, indices, C, SCALE)
    (out, lse), pull = jax.vjp(f, q, kv)
    args = q, kv, indices, out, lse, d_out, d_lse
    with summed_without_a_kernel():
      mine = launch.backward(*args, SCALE, deterministic=deterministic)
    return mine, pull((d_out, d_lse)), lse

  (d_q, d_kv, p), expected, lse = both(q, kv)
  for actual, exact in zip((d_q, d_kv), expected, strict=True):
    actual, exact = (np.asarray(x, np.float32) for x in (actual, exact))
    error = np.abs(actual - exact).max() / np.abs(exact).max()
    assert error < 0.01, error
  valid = (indices >= 0) & (indices < S)
  keys = jnp.take_along_axis(kv[:, None], (indices * valid)[..., None], 2)
  logits = SCALE * jnp.einsum(
    "BTND,BTKD->BTNK", q, keys, preferred_element_type=jnp.float32
  )
  probability = jnp.exp(logits - jnp.where(jnp.isinf(lse), 0, lse)[..., None])
  expected_p = jnp.sum(probability, 2) * valid
  np.testing.assert_allclose(p, expected_p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_rows_are_summed_by_key(chunk):
  """Chunks of queries, with a stand-in for each of the two kernels."""
  B, T, S, K, width = 2, 3, 7, 4, 5
  rng = np.random.default_rng(0)
  indices = rng.integers(-2, S + 2, (B * T, K)).astype(np.int32)
  rows = rng.standard_normal((B * T, K, width)).astype(np.float32)

  def kernel(first, rows, rows_ref, seen_ref):
    query = jnp.minimum(first[0] + jnp.arange(chunk), B * T - 1)
    rows_ref[...] = rows[query].reshape(chunk * K, width)
    seen_ref[query] = jnp.ones_like(query)

  def run(rows):
    d_kv_ref = jax.new_ref(jnp.zeros((B, S, width)))
    seen = jax.ShapeDtypeStruct((B * T,), jnp.int32)
    with summed_without_a_kernel():
      (seen,) = key_sums.by_chunk(
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
