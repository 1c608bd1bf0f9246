"""The Hopper kernels of sparse_mla: what they take, and that they lower.

The forward kernel's producer and its count of steps run as simulated in numpy;
`sparse_mla_combine_test.py` has what passes between blocks. What the kernels
compute is compared on a GPU: `python -m pallas_kernels.bench`.
"""

import functools
import re
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import operands
from pallas_kernels.hopper import barriers
from pallas_kernels.ops.sparse_mla import api
from pallas_kernels.ops.sparse_mla.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import launch
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import gather
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import plan
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import (
  quantized as quantized_lib,
)
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import steps as steps_lib
from tests.kernels import simulated
from tests.kernels import swizzle
from tests.kernels.simulated import memory
from tests.kernels.simulated import threads

C, CR = 512, 576
WIPED = 1000.0  # what no row holds


def shapes(N=128, T=256, S=4096, K=2048, B=1, width=CR, dtype=jnp.bfloat16):
  return (
    jax.ShapeDtypeStruct((B, T, N, width), dtype),
    jax.ShapeDtypeStruct((B, S, width), dtype),
    jax.ShapeDtypeStruct((B, T, K), jnp.int32),
  )


def attend(q, kv, indices, latent_rank=C):
  return mosaic_gpu.sparse_mla(q, kv, indices, latent_rank, 0.1)


def quantized(dtype=jnp.float8_e4m3fn, **sizes):
  """Shapes for `attend_quantized`."""
  q, kv, indices = shapes(**sizes)
  parts = (C, dtype), (4, jnp.float32), (CR - C, jnp.bfloat16)
  part = lambda n, dtype: jax.ShapeDtypeStruct((*kv.shape[:-1], n), dtype)
  return q, *(part(*x) for x in parts), indices


def attend_quantized(q, values, scale, rope, indices):
  return attend(q, operands.QuantizedLatents(values, scale, rope), indices)


def gradient(*args, **options):
  return jax.grad(lambda *x: jnp.sum(attend(*x, **options)[1]))(*args)


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
    {"N": 24, "K": 95, "S": 95},
  ],
)
def test_forward(sizes):
  text = lowered(attend, *shapes(**sizes))
  assert "sparse_mla_forward" in text


@pytest.mark.parametrize("B", [128, 8])
def test_forward_in_8_bits(B):
  """With one block a query, and with several; nothing runs but the kernel."""
  text = lowered(attend_quantized, *quantized(B=B, T=1, S=32768))
  assert text.count("stablehlo.custom_call") == 1
  assert "stablehlo.concatenate" not in text


@pytest.mark.parametrize(
  "B, blocks",
  [
    (67, 1),
    (66, 1),
    (32, 2),
    (16, 3),
    (12, 4),
    (10, 4),
    (8, 6),
    (7, 8),
    (1, 8),
  ],
)
def test_few_queries_have_more_blocks(B, blocks):
  """And nothing runs but the kernel."""
  sizes = shapes(B=B, T=1, S=32768)
  assert plan.blocks(2 * B, 2048 // plan.STEP) == blocks
  text = lowered(attend, *sizes)
  assert text.count("stablehlo.custom_call") == 1
  ops = set(re.findall(r"stablehlo\.(\w+)", text))
  assert ops <= {"constant", "convert", "custom_call", "pad", "reshape"}
  assert not re.search(r"high = \[[0, ]*[1-9]", text)  # it pads by nothing


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 64])
def test_blocks_run_at_once_and_none_is_idle(steps):
  at_once = 132, 66, 39, 30, 22, 17, 15, 15  # of 1 to 8 blocks, on an H200
  each = lambda blocks: -(-steps // blocks)  # steps of the busiest block
  for work in range(1, 400):
    blocks = plan.blocks(work, steps)
    assert blocks <= steps
    if blocks > 1:
      assert work <= at_once[blocks - 1]
      assert each(blocks) < each(blocks - 1)
    for more in range(blocks + 1, 9):
      assert work > at_once[more - 1] or each(more) == each(blocks)


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


@pytest.mark.parametrize("f", [attend, gradient])
@pytest.mark.parametrize(
  "sizes, message",
  [
    ({"dtype": jnp.float32}, "float32"),
    ({"width": 512}, "C.R=512"),
    ({"N": 0}, "N=0"),
    ({"K": 0}, "K=0"),
    ({"K": 8256}, "K=8256"),
  ],
)
def test_names_what_it_cannot_do(f, sizes, message):
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(f, *shapes(**sizes))


def test_names_what_it_cannot_do_in_8_bits():
  with pytest.raises(NotImplementedError, match="float8_e5m2"):
    jax.eval_shape(attend_quantized, *quantized(jnp.float8_e5m2))


@pytest.mark.parametrize("f", [attend, gradient])
def test_another_latent_rank(f):
  with pytest.raises(NotImplementedError, match="C=256"):
    jax.eval_shape(functools.partial(f, latent_rank=256), *shapes())


@pytest.mark.parametrize("sizes", [{"N": 16, "K": 64}, {"N": 320, "K": 8192}])
def test_whatever_it_takes_has_a_gradient(sizes):
  q, *rest = shapes(**sizes)
  assert jax.eval_shape(gradient, q, *rest).shape == q.shape


@pytest.mark.parametrize("K", [1, 63, 64, 100, 4095])
def test_selected_keys_are_filled_up_to_whole_tiles(monkeypatch, K):
  """Of what is filled up, neither the kernel nor the target has a key."""
  given = []

  def launch_once(plan, args, d_kv_ref):
    indices = args[4]
    given.append(indices)
    assert indices.shape[1] == 64 * plan.tiles
    weights = jnp.where(indices >= 0, 1.0, np.nan)[:, None]
    return jnp.zeros((2, plan.heads, CR), jnp.bfloat16), weights

  monkeypatch.setattr(launch, "_launch", launch_once)
  per_head = jnp.zeros((1, 2, 3))
  indices = jnp.arange(2 * K, dtype=jnp.int32).reshape(1, 2, K)
  *_, p = launch.backward(
    *(jnp.zeros((1, 2, 3, CR)), jnp.zeros((1, 2 * K, CR)), indices),
    *(jnp.zeros((1, 2, 3, C)), per_head),
    *(jnp.zeros((1, 2, 3, C)), per_head),
    0.1,
  )
  np.testing.assert_array_equal(given[0][:, :K], indices[0])
  np.testing.assert_array_equal(given[0][:, K:], -1)
  np.testing.assert_array_equal(p, np.ones((1, 2, K)))


def test_the_api_reaches_it_by_name():
  with pytest.raises(NotImplementedError, match="float32"):
    jax.eval_shape(
      lambda *xs: api.sparse_mla(*xs, C, 0.1, implementation="mosaic_gpu"),
      *shapes(dtype=jnp.float32),
    )


class Consumers:
  """Double of `signals` for the producer: consumers that look at all it has
  written whenever it signals or waits, and wipe out a part when it is free.

  Args:
    rows: [steps, 2, 64, C+R], what the tiles should hold.
    masks: [steps, 2, 64], likewise.
    converts: Whether the producer does.
  """

  PARTS = (plan.LEFT_0, plan.RIGHT_0, plan.RIGHT_1, plan.LEFT_1)

  def __init__(self, rows, masks, converts):
    self.rows, self.masks, self.converts = rows, masks, converts
    self.tiles_s = np.full(rows[0].size, WIPED, rows.dtype)
    self.rows_s = np.full((len(plan.Row), plan.ROWS), WIPED, np.float32)
    self.expected_tiles = np.full_like(rows[0], WIPED)
    self.expected_masks = np.full_like(masks[0], WIPED)
    self.passed = []

  def wait(self, barrier, parity):
    self.look()
    which, step = self._pass(barrier)
    if which == plan.Barrier.COUNTED:
      assert (parity.value == 0).all()
      return
    # Parts are free from the start: the first wait is for the phase before.
    assert (parity.value == (step + 1) % 2).all()
    [part] = (x for x in self.PARTS if x.free == which)
    blocks = self.tiles_s.reshape(2, -1, plan.COLUMN_TILES, 8, plan.COLUMNS)
    blocks[part.tile, :, part.columns] = WIPED
    self.expected_tiles[self._columns(part)] = WIPED

  def arrive_after_copies(self, barrier):
    """The copies may be complete at once, or only when they must be."""
    self._fill(*self._pass(barrier))

  def _fill(self, which, arrived):
    times = which.arrivals(self.converts) // threads.WARPGROUP
    if (arrived + 1) % times:
      return
    [part] = (x for x in self.PARTS if x.ready == which)
    columns = self._columns(part)
    self.expected_tiles[columns] = self.rows[arrived // times][columns]
    self.look()

  def arrive(self, barrier):
    which, arrived = self._pass(barrier)
    if which == plan.Barrier.MASKED:
      self.expected_masks = self.masks[arrived]
      self.look()
    else:
      self._fill(which, arrived)

  def meet_warp(self):
    pass

  def look(self):
    tiles = swizzle.matrix(self.tiles_s, CR).reshape(self.expected_tiles.shape)
    np.testing.assert_array_equal(tiles, self.expected_tiles)
    masks = self.rows_s[[plan.Row.MASK_0, plan.Row.MASK_1]]
    np.testing.assert_array_equal(masks, self.expected_masks)

  def _pass(self, barrier):
    """Returns the barrier of a place, and how often it has been passed."""
    [at] = np.unique(barrier.at) - self.rows_s[: plan.Row.BARRIERS].nbytes
    which = plan.Barrier(at // barriers.BYTES)
    times = self.passed.count(which)
    self.passed.append(which)
    return which, times

  @staticmethod
  def _columns(part):
    columns = plan.COLUMNS * np.array(part.columns)
    return part.tile, slice(None), slice(columns[0], columns[-1] + plan.COLUMNS)


def rows_in_8_bits(x, number):
  """Rows in 8 bits, any but NaNs, and what they are."""
  values = x.integers(0, 127, (number, C), np.uint8)
  values |= x.integers(0, 2, values.shape, np.uint8) << 7
  values = values.view(jnp.float8_e4m3fn)
  scale = np.exp2(x.integers(-13, 12, (number, 4))).astype(np.float32)
  rope = x.normal(size=(number, CR - C)).astype(jnp.bfloat16)
  c = values.astype(np.float32).reshape(number, 4, -1) * scale[..., None]
  c = c.reshape(number, C).astype(jnp.bfloat16)
  return (values, scale, rope), np.concatenate([c, rope], 1)


@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize(
  "steps, rank, blocks", [(1, 0, 1), (3, 0, 1), (2, 0, 4), (3, 4, 5)]
)
def test_the_producer_fills_each_part_when_it_is_free(
  steps, rank, blocks, in_8_bits
):
  S, first_row = 300, 20
  x = np.random.default_rng(steps)
  parts, kv = rows_in_8_bits(x, first_row + S)
  indices = x.integers(0, S, (steps, 2, plan.ROWS), np.int32)
  invalid = x.choice([-1, -(2**31), S, 2**31 - 1], indices.shape)
  indices = np.where(x.random(indices.shape) < 0.25, invalid, indices)
  # All steps of the query: others are other blocks', or have no valid index.
  given = x.integers(0, S, (steps, blocks, *indices.shape[1:]), np.int32)
  given[:, rank] = indices
  given = np.concatenate([given, np.full_like(given, -1)])
  valid = (indices >= 0) & (indices < S)
  rows = kv[first_row + np.where(valid, indices, 0)]
  rows[~valid] = 0
  masks = np.where(valid, np.float32(0), np.float32(-np.inf))
  consumers = Consumers(rows, masks, in_8_bits)
  noted = np.zeros(plan.CONSUMER_WARPS, np.uint32)
  noted[3] = 2 * plan.ROWS * ((steps - 1) * blocks + rank) + 1  # in its last
  consumers.rows_s[plan.Row.LAST, : noted.size] = noted.view(np.float32)
  with (
    simulated.run_as(128, gather),
    simulated.run_as(128, quantized_lib),
    simulated.run_as(128, steps_lib),
    mock.patch.object(gather, "signals", consumers),
    mock.patch.object(quantized_lib, "signals", consumers),
    mock.patch.object(steps_lib, "signals", consumers),
  ):
    place = lambda x: memory.Place(x) + x[:first_row].nbytes
    if in_8_bits:
      source = quantized_lib.Rows(*map(place, parts))
      room = 2 * steps * blocks
      fill = functools.partial(quantized_lib.fill, source, steps=room)
    else:
      fill = functools.partial(gather.fill, place(kv))
    fill(
      memory.Place(given),
      memory.Place(consumers.tiles_s, is_shared=True),
      memory.Place(consumers.rows_s, is_shared=True),
      threads.U32(rank),
      **dict(keys=S, blocks=blocks),
    )
  consumers.look()
  of_step = []
  for part in Consumers.PARTS:
    arrivals = part.ready.arrivals(in_8_bits) // threads.WARPGROUP
    of_step += [part.free, *[part.ready] * arrivals]
  of_step.insert(of_step.index(plan.RIGHT_0.ready), plan.Barrier.MASKED)
  of_step.insert(of_step.index(plan.RIGHT_1.free), plan.Barrier.COUNTED)
  assert consumers.passed == of_step * steps


def test_every_number_of_8_bits_is_widened():
  codes = np.array([x for x in range(256) if x & 127 < 127], np.uint8)
  codes = np.resize(codes, (128, 4))  # some of them twice
  for exponent in (-13, -1, 0, 5, 119):
    with simulated.run_as(128, quantized_lib):
      scale = np.full((128, 2), 2.0**exponent, jnp.bfloat16).view(np.uint32)
      words = quantized_lib.widen(
        threads.U32(codes.view(np.uint32)[:, 0]), threads.U32(scale[:, 0])
      )
      wide = np.stack([x.value for x in words], 1).view(jnp.bfloat16)
    numbers = codes.view(jnp.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(
      wide.astype(np.float64), np.ldexp(numbers, exponent)
    )


def count_steps(indices, keys, rank, blocks):
  """Steps of a block, as all its threads count them."""
  numbers = np.zeros((len(plan.Row), plan.ROWS), np.uint32)
  with simulated.run_as(32 * plan.CONSUMER_WARPS, steps_lib):
    last = steps_lib.last_of_warp(memory.Place(indices), indices.size, keys)
    noted = last.value[:: threads.WARP]
    numbers[plan.Row.LAST, : noted.size] = noted
    place = memory.Place(numbers, is_shared=True)
    steps = steps_lib.count_own(place, threads.U32(rank), blocks)
  [number] = np.unique(steps.value)
  return number


@pytest.mark.parametrize("K", [128, 2048, 8192])
def test_steps_end_after_the_last_valid_index(K):
  S = 30000
  for last in {-1, 0, 126, 127, 128 % K, 190 % K, K - 2, K - 1}:
    place = np.arange(K)
    indices = np.where(place < last, 3 * place, S)  # some of them are none
    indices[1::7] = -1
    indices = np.where(place == last, S - 1, indices).astype(np.int32)
    indices[last + 1 :] = np.resize([-1, S, -(2**31), 2**31 - 1], K - last - 1)
    assert count_steps(indices, S, 0, 1) == max(last // 128 + 1, 1)


@pytest.mark.parametrize("blocks", range(2, 9))
def test_blocks_take_turns_at_the_steps(blocks):
  K = 2048
  for steps in range(K // 128 + 1):
    indices = np.where(np.arange(K) < 128 * steps, 7, -1).astype(np.int32)
    for rank in range(blocks):
      own = len(range(rank, steps, blocks))
      assert count_steps(indices, 10, rank, blocks) == max(own, 1)
