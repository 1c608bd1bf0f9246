"""What single threads of sparse_mla's Hopper backward compute, in numpy."""

import contextlib
import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper import widths
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import gather
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import key_gradients
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import key_sums
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import logit_gradients
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import permutation
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import query_gradients
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import shared_memory
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import weight_tile
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import weights
from tests.kernels import by_thread
from tests.kernels import simulated
from tests.kernels import swizzle
from tests.kernels.simulated import memory
from tests.kernels.simulated import threads

C, D = widths.C, widths.CR
BF16 = jnp.bfloat16
SCALE = 0.3
KEYS = 100
PACKAGE = gather.__name__.rpartition(".")[0]


@pytest.fixture(autouse=True)
def one_warpgroup():
  """Runs the code of these modules as one warpgroup."""
  names = "gather key_gradients key_sums lanes logit_gradients permutation"
  names += " query_gradients weight_tile weights"
  with contextlib.ExitStack() as stack:
    for name in names.split():
      module = importlib.import_module(f"{PACKAGE}.{name}")
      stack.enter_context(simulated.run_as(128, module))
    yield


def plan_of(blocks, tiles=3, deterministic=False):
  return plans.Plan(64 * blocks, KEYS, tiles, 7, SCALE, deterministic)


def shared(array):
  return memory.Place(array, is_shared=True)


def normal(seed, *shape, dtype=np.float32):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def permuted(x):
  """Columns in the order of the kernel's products."""
  order = [
    16 * block + 4 * quad + 2 * j + e
    for block in range(x.shape[-1] // 16)
    for j in range(2)
    for quad in range(4)
    for e in range(2)
  ]
  return x[..., order]


def indices_of(seed, n):
  """Keys, each at most once, and some that are out of range on either side."""
  x = np.random.default_rng(seed)
  keys = x.choice(KEYS, n, replace=n > KEYS)
  wrong = x.choice([-(2**31), -1, KEYS, 2**31 - 1], n)
  return np.where(x.random(n) < 0.25, wrong, keys).astype(np.int32)


@pytest.mark.parametrize("blocks, rank", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_gathers_a_blocks_columns_of_the_last_tile(blocks, rank, tiles):
  plan = plan_of(blocks)
  kv, indices = normal(0, KEYS, D, dtype=BF16), indices_of(1, 3 * 64)
  wide, narrow = (
    np.full(64 * n, np.nan, BF16) for n in (plan.wide, plan.narrow)
  )
  words = np.zeros(64, np.int32)
  fields = dataclasses.fields(shared_memory.SharedMemory)
  places = {x.name: None for x in fields} | dict(
    kv_wide=shared(wide), kv_narrow=shared(narrow), indices=shared(words)
  )
  gather.gather(
    memory.Place(kv),
    memory.Place(indices),
    shared_memory.SharedMemory(**places),
    threads.U32(tiles),
    threads.U32(rank),
    plan,
  )
  chosen = indices[64 * (tiles - 1) : 64 * tiles]
  valid = (chosen >= 0) & (chosen < KEYS)
  rows = np.where(valid[:, None], kv[chosen * valid], np.zeros((), BF16))
  for tile, atom, first, columns in (
    (wide, 128, rank * plan.wide, plan.wide),
    (narrow, 64, C + rank * plan.narrow, plan.narrow),
  ):
    np.testing.assert_array_equal(
      swizzle.matrix(tile, columns, atom), rows[:, first : first + columns]
    )
  np.testing.assert_array_equal(words, chosen)


@pytest.mark.parametrize(
  "rows, columns, atom", [(64, 512, 128), (128, 256, 128), (64, 64, 64)]
)
def test_permutes_columns_in_shared_memory(rows, columns, atom):
  x = normal(0, rows, columns, dtype=BF16)
  place = swizzle.matrix(np.arange(rows * columns), columns, atom)
  tile = np.empty(rows * columns, BF16)
  tile[place] = x
  eight = 16 * columns
  permutation.permute(shared(tile), rows, columns, eight=eight, swizzle=atom)
  np.testing.assert_array_equal(tile[place], permuted(x))


def test_columns_are_four_neighbours_of_each_thread():
  x = np.arange(3 * D).reshape(3, D)
  order = permutation.permuted(jnp.asarray(x))
  np.testing.assert_array_equal(order, permuted(x))


def test_weights_and_their_sums():
  logits, biases = normal(0, 64, 64), normal(1, 64)  # keys, heads
  valid = np.random.default_rng(2).random(64) < 0.75
  tile, p, which = np.empty(64 * 64, BF16), np.full(3 * 64, np.nan), 1
  p = p.astype(np.float32)
  row = np.arange(128) // 32 * 16 + np.arange(128) % 32 // 4
  packed, sums = weights.of_products(
    by_thread.registers(logits),
    shared(biases),
    [threads.Bool(valid[row]), threads.Bool(valid[row + 8])],
    SCALE,
  )
  weight_tile.store(shared(tile), packed)
  weights.store_sums(
    memory.Place(p), threads.U32(which), weights.over_quad(sums)
  )
  expected = np.exp(logits * SCALE + biases * np.log(2)) * valid[:, None]
  np.testing.assert_allclose(
    swizzle.matrix(tile, 64).astype(np.float32), expected, rtol=2**-8
  )
  np.testing.assert_allclose(p[64:128], expected.sum(1), rtol=1e-5)
  assert np.isnan(p[:64]).all() and np.isnan(p[128:]).all()


def test_logit_gradients():
  d_weights, offsets = normal(0, 64, 64), normal(1, 64)
  p = normal(2, 64, 64, dtype=BF16)
  place = swizzle.matrix(np.arange(64 * 64), 64)
  p_tile, ds_tile = np.empty(64 * 64, BF16), np.empty(64 * 64, BF16)
  p_tile[place] = p
  factors = logit_gradients.per_weight(
    by_thread.registers(d_weights), shared(offsets), SCALE
  )
  packed = weight_tile.multiply(shared(p_tile), factors)
  weight_tile.store(shared(ds_tile), packed)
  expected = p.astype(np.float32) * (SCALE * d_weights + offsets)
  np.testing.assert_allclose(
    ds_tile[place].astype(np.float32), expected, rtol=2**-7, atol=1e-6
  )


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_stores_query_gradients(rank):
  """Both warpgroups of a block alone, or of one of a cluster."""
  blocks = 1 if rank is None else 2
  plan, rank = plan_of(blocks), rank or 0
  d_q = np.zeros((64 * blocks, D), BF16)
  expected = np.zeros((64 * blocks, D), BF16)
  for which in range(2):
    acc = normal(which, 64, 288)
    registers = [
      *by_thread.registers(acc[:, :256]),
      *by_thread.registers(acc[:, 256:]),
    ]
    query_gradients.store(
      memory.Place(d_q), registers, which, threads.U32(rank), plan
    )
    heads = slice(64 * (rank ^ which), None) if blocks == 2 else slice(None)
    part = rank if blocks == 2 else which
    rows = expected[heads][:64]
    rows[:, 256 * part :][:, :256] = acc[:, :256].astype(BF16)
    rows[:, C + 32 * part :][:, :32] = acc[:, 256:].astype(BF16)
  np.testing.assert_array_equal(permuted(d_q), expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("blocks, rank", [(1, 0), (2, 1)])
@pytest.mark.parametrize(
  "index, is_narrow", [(0, False), (1, False), (0, True)]
)
def test_adds_columns_to_keys(deterministic, blocks, rank, index, is_narrow):
  plan = plan_of(blocks, deterministic=deterministic)
  columns = key_gradients.Columns(index, is_narrow)
  chosen, acc = indices_of(0, 64), normal(1, 64, columns.number)
  slot, tile = 2 * 64, 1
  d_kv = normal(2, 4 * 64 if deterministic else KEYS, D)
  keys = key_gradients.load_keys(shared(chosen))
  targets = key_gradients.targets_of(
    keys, threads.U32(tile), threads.U32(slot), plan
  )
  block = rank * (plan.narrow if is_narrow else plan.wide)
  first = block + columns.number * index + C * is_narrow
  expected = permuted(d_kv)
  for i, key in enumerate(chosen):
    if 0 <= key < KEYS:
      row = slot + 64 * tile + i if deterministic else key
      mine = expected[row, first : first + columns.number]
      mine[:] = acc[i] + (0 if deterministic else mine)
  place = key_gradients.place_of(memory.Place(d_kv)) + 4 * block
  registers = by_thread.registers(acc)
  key_gradients.add(place, columns, registers, targets, plan)
  np.testing.assert_array_equal(permuted(d_kv), expected)


@pytest.mark.parametrize("block", [0, 1])
def test_sums_the_rows_of_a_blocks_keys(block):
  """Of the second block, two warps have a key, one of them without a row."""
  counts = np.array([3, 0, 1, 5, 0, 2])
  rows, d_kv = normal(0, 16, D), normal(1, 6, D)
  order = np.random.default_rng(2).permutation(16).astype(np.int32)
  ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
  expected = d_kv.copy()
  for key in range(4 * block, min(4 * block + 4, 6)):
    total = np.zeros(D, np.float32)
    for i in order[ends[key] : ends[key + 1]]:
      total += rows[i]
    expected[key] += total
  key_sums.sum_rows(
    threads.U32(block),
    *map(memory.Place, (order, ends, rows, d_kv)),
    width=D,
    keys=6,
  )
  np.testing.assert_array_equal(d_kv, expected)
