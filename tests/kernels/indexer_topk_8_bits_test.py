"""indexer_topk of keys that are in 8 bits already, in pages and without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import operands
from pallas_kernels.ops.indexer_topk import api
from pallas_kernels.ops.indexer_topk import chunked_xla
from pallas_kernels.ops.indexer_topk import fp8
from tests.kernels import eight_bits
from tests.kernels import hlo
from tests.kernels import inputs
from tests.kernels import oracles
from tests.kernels import rows
from tests.kernels import tpu_topologies

B, T, S, K, M, I = inputs.B, inputs.T, inputs.S, inputs.K, inputs.M, 16
IMPLEMENTATIONS = {
  name: functools.partial(api.indexer_topk, implementation=name)
  for name in ("reference", "chunked_xla")
} | {  # K keys come from several blocks, blocks have several tiles
  f"{bT}x{bS}x{block}": functools.partial(
    chunked_xla.indexer_topk,
    score_dtype="float8_e4m3fn",
    query_tile=bT,
    key_tile=bS,
    key_block=block,
  )
  for bT, bS, block in ((64, 4, 8), (5, 12, 24))
}
every = pytest.mark.parametrize("op", IMPLEMENTATIONS)


@functools.cache
def compiled(op):
  def run(index, start, end, pages=None):
    return IMPLEMENTATIONS[op](index, start, end, K, pages=pages)

  return jax.jit(run)


def make_index(dtype=jnp.float32) -> operands.Index:
  """Keys of every size."""
  size = 10.0 ** np.random.default_rng(4).uniform(-2, 1, (B, S, 1))
  return operands.Index(
    inputs.normal(0, B, T, M, I, dtype=dtype),
    jnp.asarray(inputs.normal(1, B, S, I) * size, dtype),
    inputs.normal(2, B, T, M),
  )


def kept(index) -> operands.Index:
  """The same with the keys in 8 bits."""
  k, k_scale = fp8.quantize(index.k)
  return operands.Index(index.q, k, index.w, k_scale)


def in_pages(index, page=4, spare=3) -> tuple[operands.Index, jax.Array]:
  """Keys anywhere in a pool of what is no number, and the table."""
  P, rng = -(-S // page), np.random.default_rng(0)
  pages_BP = rng.permutation(B * P + spare)[: B * P].reshape(B, P)
  padding = [(0, 0), (0, P * page - S)]

  def pool(x):
    x = jnp.pad(x, padding + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(B, P, page, *x.shape[2:])
    empty = jnp.full((B * P + spare, *x.shape[2:]), jnp.nan, x.dtype)
    return empty.at[pages_BP].set(x)

  pooled = operands.Index(index.q, pool(index.k), index.w, pool(index.k_scale))
  return pooled, jnp.asarray(pages_BP, jnp.int32)


def expected(index, start, end):
  q, k = (eight_bits.rounded_index(x) for x in (index.q, index.k))
  return oracles.topk(oracles.index_scores(q, k, index.w), start, end, K)


@every
@pytest.mark.parametrize("kind", inputs.RANGES)
def test_chooses_by_what_rounding_leaves(op, kind):
  index, (start, end) = make_index(), inputs.ranges(kind)
  end = jnp.minimum(end, S)  # pages have room for more
  want = expected(index, start, end)
  pooled, pages = in_pages(kept(index))
  for found in (
    compiled(op)(kept(index), start, end),
    compiled(op)(pooled, start, end, pages),
  ):
    np.testing.assert_array_equal(found[0], want[0])
    rows.assert_close(found[1], want[1], rtol=1e-6)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chooses_as_if_it_rounded_the_keys_itself(op, dtype):
  """To the last bit: they are rounded alike, and once."""
  index, ranges = make_index(dtype), inputs.ranges("any")
  run = functools.partial(IMPLEMENTATIONS[op], score_dtype="float8_e4m3fn")
  want = jax.jit(lambda *args: run(*args, K))(index, *ranges)
  found = compiled(op)(kept(index), *ranges)
  for x, y in zip(found, want, strict=True):
    np.testing.assert_array_equal(x, y)


def test_has_no_gradient():
  start, end = inputs.ranges("any")
  index = kept(make_index())

  def total(q, w, k_scale):
    index_of = operands.Index(q, index.k, w, k_scale)
    scores = api.indexer_topk(index_of, start, end, K)[1]
    return jnp.sum(jnp.where(jnp.isneginf(scores), 0.0, scores))

  gradients = jax.grad(total, (0, 1, 2))(index.q, index.w, index.k_scale)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0)


def test_keys_and_scales_come_together():
  index, ranges = make_index(), inputs.ranges("any")
  in_8_bits = kept(index)
  bare = operands.Index(index.q, in_8_bits.k, index.w)
  scaled = operands.Index(index.q, index.k, index.w, in_8_bits.k_scale)
  with pytest.raises(ValueError, match="float8_e4m3fn with no k_scale"):
    api.indexer_topk(bare, *ranges, K)
  with pytest.raises(ValueError, match="float32 with k_scale"):
    api.indexer_topk(scaled, *ranges, K)


def test_the_kernel_for_tpus_refuses_them():
  with pytest.raises(NotImplementedError, match="keys in 8 bits"):
    api.indexer_topk(
      *(kept(make_index()), *inputs.ranges("any"), K),
      implementation="mosaic_tpu",
    )


def test_losses_refuse_them():
  """Their gradient is that of the keys as they were."""
  index, start_end = kept(make_index()), inputs.ranges("any")
  N, C, R = inputs.N, inputs.C, inputs.R
  q, kv = inputs.normal(3, B, T, N, C + R), inputs.normal(4, B, S, C + R)
  lse, heads = inputs.normal(5, B, T, N), inputs.normal(6, B, S, N, C + R)
  chosen = inputs.choices("plain")
  latent = operands.Attended(q, kv, lse)
  dense = operands.Attended(q, heads, lse)
  calls = {
    "sparse_indexer_loss": (index, latent, chosen, 1.0),
    "dense_indexer_loss": (index, dense, *start_end, 1.0),
    "sparse_mla_with_loss": (q, kv, chosen, index, C, 1.0),
  }
  for op, args in calls.items():
    with pytest.raises(ValueError, match=f"{op}: index.k_scale is given"):
      getattr(pallas_kernels, op)(*args)


def test_no_copy_of_all_keys_is_made():
  """On a TPU: on a CPU, XLA reads numbers of 8 bits by way of 16."""
  S, page, M, I, struct = 2**20, 64, 8, 128, jax.ShapeDtypeStruct

  def step(q, k, w, k_scale, start, end, pages):
    index = operands.Index(q, k, w, k_scale)
    return api.indexer_topk(
      *(index, start, end, 64), pages=pages, implementation="chunked_xla"
    )

  shapes = [
    struct((1, 1, M, I), jnp.bfloat16),
    struct((S // page, page, I), jnp.float8_e4m3fn),
    struct((1, 1, M), jnp.float32),
    struct((S // page, page), jnp.float32),
    *[struct((1, 1), jnp.int32)] * 2,
    struct((1, 1024), jnp.int32),  # of 16 times as many
  ]
  compiled = tpu_topologies.compile_step("v6e", step, shapes)
  assert hlo.temporary_bytes(compiled) < S * I // 2
