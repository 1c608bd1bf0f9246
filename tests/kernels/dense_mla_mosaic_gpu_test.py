"""dense_mla on Hopper, as far as a machine without a GPU can tell.

The kernels lower for CUDA at the real shapes. What surrounds them is run with
each kernel replaced by what its docstring says, which trusts the plan: tiles
that it leaves out are not looked at, those that it calls whole not masked. Code
of single threads is simulated.
"""

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper import fragments
from pallas_kernels.ops.dense_mla import api
from pallas_kernels.ops.dense_mla import reference
from pallas_kernels.ops.dense_mla.mosaic_gpu import backward as backward_lib
from pallas_kernels.ops.dense_mla.mosaic_gpu import forward as forward_lib
from pallas_kernels.ops.dense_mla.mosaic_gpu import mask_bits
from pallas_kernels.ops.dense_mla.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.ops.dense_mla.mosaic_gpu import walks
from tests.kernels import by_thread
from tests.kernels import inputs
from tests.kernels import rows
from tests.kernels import simulated
from tests.kernels.simulated import memory
from tests.kernels.simulated import threads

B, HR, U = inputs.B, 192, 128
SCALE = 0.1


def shapes(B, T, S, N, dtype=jnp.bfloat16, HR=HR, U=U, K=None):
  sizes = (B, T, N, HR), (B, S, N, HR), (B, S, N, U), (B, T, N, U)
  q, k, v, d_out = (jax.ShapeDtypeStruct(x, dtype) for x in sizes)
  bound = jax.ShapeDtypeStruct((B, T), jnp.int32)
  d_lse = jax.ShapeDtypeStruct((B, T, N), jnp.float32)
  indices = [jax.ShapeDtypeStruct((B, T, K), jnp.int32)] if K else []
  return q, k, v, bound, bound, d_out, d_lse, *indices


def value_and_vjp(op, q, k, v, start, end, d_out, d_lse, *indices):
  results, pullback = jax.vjp(
    lambda q, k, v: op(q, k, v, start, end, SCALE, *indices), q, k, v
  )
  return *results, *pullback((d_out, d_lse))


@functools.cache  # tests share what they compile
def compiled_reference():
  return jax.jit(functools.partial(value_and_vjp, reference.dense_mla))


def make_inputs(kind, T, S, N):
  bf16 = jnp.bfloat16
  if kind == "within a tile":
    start, end = jnp.full((B, T), 50), jnp.full((B, T), S - 9)
  else:
    start, end = inputs.ranges(kind, T, S)
  dead = jnp.maximum(start, 0) >= jnp.minimum(end, S)
  return (
    inputs.normal(0, B, T, N, HR, dtype=bf16),
    inputs.normal(1, B, S, N, HR, dtype=bf16),
    inputs.normal(2, B, S, N, U, dtype=bf16),
    *(start, end),
    inputs.normal(3, B, T, N, U, dtype=bf16),
    jnp.where(dead[..., None], jnp.nan, inputs.normal(4, B, T, N)),
  )


def grow(x, length):
  """Axis 1 at `length`: TMA reads zeros beyond an array, writes nothing."""
  x = x[:, :length]
  widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths)


def as_planned(plan, walked, kept):
  """bool[B, kept items, walked items]: tiles looked at, and not masked."""
  plan = np.asarray(plan)
  tiles = np.arange(max(plan[..., 1].max(), 1))
  first, last, whole, unwhole = np.moveaxis(plan, -1, 0)[..., None]
  seen = (tiles >= first) & (tiles < last)
  plain = seen & (tiles >= whole) & (tiles < unwhole)
  return (np.repeat(np.repeat(x, kept, 1), walked, 2) for x in (seen, plain))


def chosen_columns(words):
  """int32[B, column tiles, rows, words of a tile] -> bool[B, rows, columns]"""
  words = np.asarray(words).view(np.uint32).swapaxes(1, 2)
  bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
  return bits.reshape(*bits.shape[:2], -1).astype(bool)


def visible(seen, plain, start, end, chosen_BTS):
  """bool[B, T, S]: chosen bits are the only mask where there are any."""
  start, end = np.asarray(start)[..., None], np.asarray(end)[..., None]
  key = np.arange(seen.shape[2])
  if chosen_BTS is not None:
    return seen & chosen_BTS[..., : seen.shape[2]]
  return seen & (plain | ((key >= start) & (key < end)))


def fake_forward(q, k, v, start, end, plan, scale, chosen):
  bT, bS = forward_lib.bT, forward_lib.bS
  if chosen is not None:
    chosen = chosen_columns(chosen)
  visible_BTS = visible(*as_planned(plan, bS, bT), start, end, chosen)
  tileable_T, (T, S) = q.shape[1], visible_BTS.shape[1:]
  q, k, v = grow(q, T), grow(k, S), grow(v, S)
  logits = scale * jnp.einsum(
    "BTND,BSND->BNTS", q, k, preferred_element_type=jnp.float32
  )
  logits = jnp.where(visible_BTS[:, None], logits, -jnp.inf)
  lse_BNT = jax.nn.logsumexp(logits, -1)
  alive = (start < end)[:, None]
  weights = jnp.where(alive[..., None], jnp.exp(logits - lse_BNT[..., None]), 0)
  out = jnp.einsum("BNTS,BSNU->BTNU", weights, v.astype(jnp.float32))
  out = grow(out, tileable_T).astype(q.dtype)
  return out, jnp.where(alive, lse_BNT, -jnp.inf)


def fake_backward(q, k, v, d_out, lse, delta, start, end, plan, scale, chosen):
  bT, bS = backward_lib.bT, backward_lib.bS
  seen, plain = (
    grow(x.swapaxes(1, 2), start.shape[1]) for x in as_planned(plan, bT, bS)
  )
  if chosen is not None:
    chosen = chosen_columns(chosen).swapaxes(1, 2)[:, : start.shape[1]]
  visible_BTS = visible(seen, plain, start, end, chosen)
  tileable_T, tileable_S, (T, S) = q.shape[1], k.shape[1], visible_BTS.shape[1:]
  q, d_out, k, v = (
    grow(x, n).astype(jnp.float32)
    for x, n in ((q, T), (d_out, T), (k, S), (v, S))
  )
  log2 = scale * np.log2(np.e) * jnp.einsum("BTND,BSND->BNTS", q, k)
  log2 = jnp.where(visible_BTS[:, None], log2, -jnp.inf)
  weights = jnp.exp2(log2 - lse[..., None])
  d_weights = jnp.einsum("BTNU,BSNU->BNTS", d_out, v)
  d_logits = weights * (d_weights - delta[..., None])
  d_q = jnp.einsum("BNTS,BSND->BTND", d_logits, k)
  d_k = scale * jnp.einsum("BNTS,BTND->BSND", d_logits, q)
  d_v = jnp.einsum("BNTS,BTNU->BSNU", weights, d_out)
  d_k, d_v = (grow(x, tileable_S).astype(jnp.bfloat16) for x in (d_k, d_v))
  return grow(d_q, tileable_T), d_k, d_v


@pytest.mark.parametrize(
  "sizes",
  [
    dict(B=1, T=32768, S=32768, N=128),
    dict(B=2, T=95, S=300, N=8),
    dict(B=1, T=8192, S=8192, N=128, K=2048),
    dict(B=2, T=95, S=300, N=8, K=64),
  ],
)
def test_lowers(sizes):
  step = functools.partial(value_and_vjp, mosaic_gpu.dense_mla)
  lowered = jax.jit(step).trace(*shapes(**sizes))
  text = lowered.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(dtype=jnp.float32), "float32"),
    (dict(HR=128), "HR=128"),
    (dict(U=64), "U=64"),
    (dict(scale=-1.0), "scale"),
  ],
)
def test_refuses(change, message):
  scale = change.pop("scale", SCALE)
  args = shapes(1, 256, 256, 2, **change)
  f = functools.partial(api.dense_mla, scale=scale, implementation="mosaic_gpu")
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(f, *args[:5])


@pytest.mark.parametrize(
  "kind, size, choice",
  [
    ("packed", (300, 330, 1), "packed"),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ("packed", (300, 330, 1), None),
        ("causal", (300, 330, 1), None),
        ("any", (300, 330, 1), None),
        ("within a tile", (300, 330, 1), None),
        ("any", (95, 95, 2), None),
        ("causal", (300, 330, 1), "plain"),
        ("within a tile", (300, 330, 1), "plain"),
        ("any", (95, 95, 2), "invalid"),
      )
    ),
  ],
)
def test_surroundings(kind, size, choice):
  args = make_inputs(kind, *size)
  indices = [inputs.choices(choice, *size[:2], K=40)] if choice else []
  with (
    mock.patch.object(forward_lib, "forward", fake_forward),
    mock.patch.object(backward_lib, "backward", fake_backward),
  ):
    # Not jitted: the fakes' sizes depend on the plan.
    actual = value_and_vjp(mosaic_gpu.dense_mla, *args, *indices)
  *args, d_lse = args
  expected = compiled_reference()(*args, jnp.nan_to_num(d_lse), *indices)
  rtols = 2**-7, 2e-6, 2**-6, 2**-6, 2**-6
  atols = 0.0, 2e-6, 2**-6, 2**-6, 2**-6
  for x, y, rtol, atol in zip(actual, expected, rtols, atols, strict=True):
    assert x.dtype == y.dtype
    rows.assert_close(x, y, rtol, atol)


@pytest.mark.parametrize("last_first", [False, True])
def test_blocks_have_each_tile_once(last_first):
  heads, tiles = 3, 5
  plan = np.arange(B * tiles * 4).reshape(B, tiles, 4)
  found = []
  for block in range(B * heads * tiles):
    walk = walks.Walk.of_block(
      *(jnp.int32(block), jnp.asarray(plan.reshape(-1)), B, heads),
      last_first=last_first,
    )
    batch, head, tile, *bounds = map(int, dataclasses.astuple(walk))
    assert bounds == plan[batch, tile].tolist()
    found.append((batch, head, tile))
  order = range(tiles)[::-1] if last_first else range(tiles)
  assert found == list(itertools.product(range(B), range(heads), order))


@pytest.mark.parametrize("columns", [backward_lib.bT, forward_lib.bS])
def test_masks_by_bits(columns):
  first, n = 75, columns // 32
  x = np.random.default_rng(0)
  words = x.integers(0, 2**32, (200, n), np.uint32)
  logits = x.normal(size=(64, columns)).astype(np.float32)
  kept = chosen_columns(words[None, None])[0, first : first + 64]
  with (
    simulated.run_as(128, fragments),
    simulated.run_as(128, mask_bits),
  ):
    bits = mask_bits.load_words(memory.Place(words), threads.U32(first), n)
    actual = mask_bits.masked(by_thread.registers(logits), bits)
    expected = by_thread.registers(np.where(kept, logits, -np.inf))
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(a.value, b.value)


def test_packs_pairs_in_order():
  numbers = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
  rounded = numbers.astype(jnp.bfloat16).astype(np.float32)
  with simulated.run_as(128, backward_lib):
    words = backward_lib.packed(by_thread.registers(numbers))
    actual = backward_lib.unpacked(words)
    expected = by_thread.registers(rounded)
  assert len(words) == 16
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(a.value, b.value)
