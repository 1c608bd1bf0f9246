"""grouped_mlp on Hopper, as far as a machine without a GPU can tell.

The kernels lower for CUDA at the real shapes. What surrounds them is run with
the kernel replaced by what its docstring says.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.ops.grouped_mlp import reference
from pallas_kernels.ops.grouped_mlp.mosaic_gpu import kernel
from tests.kernels import inputs
from tests.kernels import rows

LAYERS = 3
run = functools.partial(pallas_kernels.grouped_mlp, implementation="mosaic_gpu")
run_reference = jax.jit(reference.grouped_mlp)


def structs(R, E, D, F, dtype=jnp.bfloat16):
  struct, X = jax.ShapeDtypeStruct, LAYERS * E
  return (
    *(struct((R, D), dtype), struct((E,), jnp.int32)),
    *(struct((X, D, F), dtype), struct((X, D, F), dtype)),
    *(struct((X, F, D), dtype), struct((), jnp.int32)),
  )


def fake_product(x, weights, group, count):
  """Blocks beyond the count are anything."""
  x_GbD = x.reshape(len(group), -1, x.shape[1])
  f32 = jnp.float32
  y, *up = (
    jnp.einsum("GbD,GDF->GbF", x_GbD, w[group]).astype(f32) for w in weights
  )
  if up:
    y = jax.nn.silu(y) * up[0]
  y = jnp.where(jnp.arange(len(group))[:, None, None] < count[0], y, jnp.nan)
  return y.astype(x.dtype).reshape(len(x), -1)


@jax.jit
def run_with_fake(*args):
  with mock.patch.object(kernel, "product", fake_product):
    return run(*args)


@pytest.mark.parametrize(
  "R, sizes",
  [
    (21, (5, 0, 11, 4, 1)),
    (21, (21, 0, 0, 0, 0)),
    (21, (0, 0, 0, 0, 21)),
    (21, (0, 9, 0, 3, 0)),  # nine rows of no group
    (21, (0, 0, 0, 0, 0)),
    (21, (8, 8, 5, 0, 0)),
    (1, (0, 1)),
    (8, (0, 1, 0) * 8),
    (600, (1, 128, 129, 300)),
  ],
)
def test_surroundings(R, sizes):
  D, F, E = 128, 256, len(sizes)
  x, gate, up, down = (
    inputs.normal(seed, *shape, dtype=jnp.bfloat16)
    for seed, shape in enumerate(
      [(R, D), (LAYERS * E, D, F), (LAYERS * E, D, F), (LAYERS * E, F, D)]
    )
  )
  gate, up, down = (w * jnp.bfloat16(0.1) for w in (gate, up, down))
  args = x, jnp.array(sizes), gate, up, down, jnp.int32(E)
  actual = run_with_fake(*args)
  expected = run_reference(*args)
  assert actual.dtype == jnp.bfloat16
  rows.assert_close(actual, expected, 2**-6, 2**-6)
  np.testing.assert_array_equal(actual[sum(sizes) :], 0)


@pytest.mark.parametrize(
  "R, D, F",
  [
    *((R, 7168, 2048) for R in (8, 256, 1024, 4096)),  # blocks of 8 to 128
    (8, 128, 128),
  ],
)
def test_lowers(R, D, F):
  args = structs(R, E=32, D=D, F=F)
  text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(dtype=jnp.float32), "float32"),
    (dict(D=192), "D=192"),
    (dict(F=64), "F=64"),
    (dict(R=0), "rows"),
  ],
)
def test_refuses(change, message):
  args = structs(**dict(R=8, E=4, D=128, F=128) | change)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(run, *args)
