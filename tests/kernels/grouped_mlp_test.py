"""grouped_mlp in XLA, against a loop and against three grouped products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.ops.grouped_mlp import blocks as blocks_lib
from tests.kernels import inputs
from tests.kernels import rows

R, E, D, F = 21, 5, 6, 7
LAYERS = 3
SIZES = (
  (5, 0, 11, 4, 1),
  (21, 0, 0, 0, 0),
  (0, 0, 0, 0, 21),
  (1, 1, 1, 1, 17),
  (0, 9, 0, 3, 0),  # nine rows of no group
  (0, 0, 0, 0, 0),
)


def arrays(dtype=jnp.float32, make=inputs.normal, R=R, E=E):
  """Rows, and the matrices of all layers."""
  return [
    make(seed, *shape).astype(dtype)
    for seed, shape in enumerate(
      ((R, D), (LAYERS * E, D, F), (LAYERS * E, D, F), (LAYERS * E, F, D))
    )
  ]


run = jax.jit(pallas_kernels.grouped_mlp, static_argnames=["implementation"])


def loop(x, sizes, gate, up, down, first):
  x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
  y = np.zeros_like(x)
  for r, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
    e = first + group
    gated = x[r] @ gate[e]
    y[r] = (gated / (1 + np.exp(-gated)) * (x[r] @ up[e])) @ down[e]
  return y


@pytest.mark.parametrize("name", ["chunked_xla", "reference"])
@pytest.mark.parametrize("first", [0, E, 2 * E])
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_a_loop(sizes, first, name):
  x, *matrices = arrays()
  args = jnp.array(sizes), *matrices, jnp.int32(first)
  actual = run(x, *args, implementation=name)
  expected = loop(x, sizes, *matrices, first)
  rows.assert_close(actual, expected, 1e-5, 1e-5)
  np.testing.assert_array_equal(actual[sum(sizes) :], 0)


@pytest.mark.parametrize("R, E", [(1, 8), (5, 2), (8, 64), (40, 3), (100, 2)])
def test_any_numbers_of_rows_and_groups(R, E):
  x, *matrices = arrays(R=R, E=E)
  sizes = np.random.default_rng(0).multinomial(R, np.full(E, 1 / E))
  actual = run(x, jnp.array(sizes), *matrices, jnp.int32(E))
  expected = loop(x, sizes, *matrices, E)
  rows.assert_close(actual, expected, 1e-5, 1e-5)


@pytest.mark.parametrize(
  "R, E, expected",
  [(1, 8, 8), (8, 256, 8), (512, 256, 8), (512, 64, 16), (512, 8, 128)],
)
def test_sizes_of_blocks(R, E, expected):
  assert blocks_lib.even_size(R, E) == expected


def test_the_other_rows_change_nothing():
  """Bit by bit: a row of group 2, at any place and in any company."""
  x, *matrices = arrays("bfloat16")
  results = []
  for i, sizes in enumerate(SIZES[:4]):
    others = inputs.normal(9 + i, R, D, dtype="bfloat16")
    sizes = np.array(sizes)
    sizes[np.argmax(sizes)] -= 1
    sizes[2] += 1
    place = sizes[:3].sum() - 1
    y = run(
      others.at[place].set(x[0]), jnp.array(sizes), *matrices, jnp.int32(E)
    )
    results.append(np.asarray(y[place], np.float32))
  for result in results[1:]:
    np.testing.assert_array_equal(result, results[0])


@jax.jit
def three_products(x, sizes, gate, up, down):
  matmul = functools.partial(pallas_kernels.grouped_matmul, sizes=sizes)
  return matmul(jax.nn.silu(matmul(x, gate)) * matmul(x, up), down)


@pytest.mark.parametrize("sizes", SIZES)
def test_rounds_as_three_products_do(sizes):
  """Sums are exact here: what differs would be rounding of the products."""
  make = functools.partial(inputs.grid, largest=16)
  x, *matrices = arrays("bfloat16", make)
  sizes = jnp.array(sizes)
  expected = three_products(x, sizes, *(w[2 * E :] for w in matrices))
  actual = run(x, sizes, *matrices, jnp.int32(2 * E))
  assert actual.dtype == jnp.bfloat16
  in_group = slice(int(sizes.sum()))
  np.testing.assert_array_equal(
    actual[in_group].astype(np.float32), expected[in_group].astype(np.float32)
  )


def test_copies_no_matrix():
  """At most one group's are held at a time, of 8 in this layer and 24."""
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  D, F, E = 64, 96, 8
  args = (
    *(struct(R, D), jax.ShapeDtypeStruct((E,), jnp.int32)),
    *(struct(LAYERS * E, D, F), struct(LAYERS * E, D, F)),
    *(struct(LAYERS * E, F, D), jax.ShapeDtypeStruct((), jnp.int32)),
  )
  memory = run.lower(*args).compile().memory_analysis()
  assert memory is not None
  assert memory.temp_size_in_bytes < 4 * (3 * D * F + 10 * R * (D + F))
