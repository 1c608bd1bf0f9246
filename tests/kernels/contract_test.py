"""What a kernel takes forward, it takes backward: nothing fails half-way.

For every op with kernels, both backends, and shapes on both sides of each
limit: `NotImplementedError` comes from the value and from its gradient alike,
or from neither.
"""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels

SCALE = 0.1
USUAL = dict(B=1, T=16, S=512, K=128, N=64, C=512, R=64, U=128, M=64, I=128)
# For each op and letter, sizes inside and beyond some kernel's limit.
HEADS = (8, 24, 128, 192)
KEYS = (0, 96, 8192, 8256)
INDEX = dict(M=(5, 128), I=(64, 96))
LATENT = dict(C=(448,), R=(32,))
LIMITS = {
  "indexer_topk": dict(INDEX, K=(1, 8192, 16384), S=(100, 200_000)),
  "sparse_mla": dict(LATENT, N=HEADS, K=KEYS),
  "dense_mla": dict(N=HEADS, R=(32,), U=(64,)),
  "sparse_indexer_loss": dict(INDEX, **LATENT, N=HEADS, K=KEYS),
  "dense_indexer_loss": dict(INDEX, N=HEADS, R=(32,), S=(200_000,)),
  "sparse_mla_with_loss": dict(INDEX, **LATENT, N=HEADS, K=KEYS),
}
# What is no multiple of anything.
RAGGED = dict(T=13, S=331, K=77, N=5, M=3)
DTYPES = (jnp.float32, jnp.float16)


def float_inputs(sizes, dtype):
  """Inputs that have gradients, by name."""
  B, T, S, K, N, C, R, U, M, I = sizes.values()
  struct = jax.ShapeDtypeStruct
  return {
    "q_index": struct((B, T, M, I), dtype),
    "k_index": struct((B, S, I), dtype),
    "w": struct((B, T, M), jnp.float32),
    "q": struct((B, T, N, C + R), dtype),
    "kv": struct((B, S, C + R), dtype),
    "q_heads": struct((B, T, N, U + R), dtype),
    "k_heads": struct((B, S, N, U + R), dtype),
    "v_heads": struct((B, S, N, U), dtype),
    "lse": struct((B, T, N), jnp.float32),
  }


def run(op, name, sizes, x):
  """Results of the op's kernel."""
  B, T, K = sizes["B"], sizes["T"], sizes["K"]
  ranges = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), jnp.int32)
  indices = jnp.zeros((B, T, K), jnp.int32)
  index = pallas_kernels.Index(x["q_index"], x["k_index"], x["w"])
  latent = pallas_kernels.Attended(x["q"], x["kv"], x["lse"])
  heads = pallas_kernels.Attended(x["q_heads"], x["k_heads"], x["lse"])
  C = sizes["C"]
  args = {
    "indexer_topk": (index, *ranges, K),
    "sparse_mla": (x["q"], x["kv"], indices, C, SCALE),
    "dense_mla": (x["q_heads"], x["k_heads"], x["v_heads"], *ranges, SCALE),
    "sparse_indexer_loss": (index, latent, indices, SCALE),
    "dense_indexer_loss": (index, heads, *ranges, SCALE),
    "sparse_mla_with_loss": (x["q"], x["kv"], indices, index, C, SCALE),
  }
  results = getattr(pallas_kernels, op)(*args[op], implementation=name)
  return results[1] if op == "indexer_topk" else results  # scores


def takes(op, name, sizes, dtype, *, gradient):
  """Whether a kernel takes these inputs."""

  def value(x):
    return run(op, name, sizes, x)

  def with_gradient(x):
    out, pullback = jax.vjp(value, x)
    return pullback(jax.tree.map(jnp.ones_like, out))

  try:
    jax.eval_shape(
      with_gradient if gradient else value, float_inputs(sizes, dtype)
    )
  except NotImplementedError:
    return False
  return True


KERNELS = [("mosaic_gpu", op) for op in LIMITS] + [
  # On TPUs sparse_mla_with_loss is two of the others.
  pytest.param("mosaic_tpu", op, marks=pytest.mark.slow)
  for op in LIMITS
  if op != "sparse_mla_with_loss"
]


@pytest.mark.parametrize(("name", "op"), KERNELS)
def test_sizes_that_fill_no_tile_are_taken(name, op):
  """The last tile is padded, where plain XLA would take many times as long."""
  for letter in RAGGED.keys() & (LIMITS[op].keys() | {"T", "S"}):
    sizes = USUAL | {letter: RAGGED[letter]}
    for gradient in (False, True):
      assert takes(op, name, sizes, jnp.bfloat16, gradient=gradient), sizes


@pytest.mark.parametrize(("name", "op"), KERNELS)
def test_both_ways_or_neither(name, op):
  cases = [
    (USUAL | {letter: x}, jnp.bfloat16)
    for letter, sizes in LIMITS[op].items()
    for x in sizes
  ]
  taken = []
  for sizes, dtype in [*cases, *((USUAL, dtype) for dtype in DTYPES)]:
    forward, backward = (
      takes(op, name, sizes, dtype, gradient=x) for x in (False, True)
    )
    assert forward == backward, f"{sizes} {dtype}: {forward=}, {backward=}"
    taken.append(forward)
  assert takes(op, name, USUAL, jnp.bfloat16, gradient=True)
  assert any(taken) and not all(taken)
