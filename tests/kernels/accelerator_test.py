"""The portable implementations cut as on an accelerator, compared with a CPU's.

Tiles are larger there, and several rows of the batch run at once.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from tests.kernels import inputs
from tests.kernels import rows

B, T, S, K = 4, 37, 53, 11
N, H, R, C, U = inputs.N, inputs.H, inputs.R, inputs.C, inputs.U
M, I, SCALE = inputs.M, inputs.I, inputs.SCALE


def make_inputs():
  start, end = (jnp.concatenate([x, x + 3]) for x in inputs.ranges("any"))
  indices = jnp.concatenate(
    [inputs.choices("invalid"), inputs.choices("plain")]
  )
  return {
    "index": (
      inputs.normal(0, B, T, M, I),
      inputs.normal(1, B, S, I),
      inputs.normal(2, B, T, M) / M,
    ),
    "ranges": (start, end),
    "indices": indices,
    "expanded": (
      inputs.normal(3, B, T, N, H + R),
      inputs.normal(4, B, S, N, H + R),
      inputs.normal(5, B, S, N, U),
    ),
    "absorbed": (
      inputs.normal(6, B, T, N, C + R),
      inputs.normal(7, B, S, C + R),
    ),
    "d": inputs.normal(8, B, T),
  }


def indexer_topk(x):
  return pallas_kernels.indexer_topk(
    pallas_kernels.Index(*x["index"]), *x["ranges"], K
  )


def with_gradients(op, *args):
  out, pullback = jax.vjp(op, *args)
  first = out[0] if isinstance(out, tuple) else out
  zeros = jax.tree.map(jnp.zeros_like, out)
  d_out = (first, *zeros[1:]) if isinstance(out, tuple) else jnp.ones_like(out)
  return out, pullback(d_out)


def sparse_mla(x):
  op = lambda q, kv: pallas_kernels.sparse_mla(q, kv, x["indices"], C, SCALE)
  return with_gradients(op, *x["absorbed"])


def dense_mla(x):
  op = lambda *args: pallas_kernels.dense_mla(*args, *x["ranges"], SCALE)
  return with_gradients(op, *x["expanded"])


def sparse_indexer_loss(x):
  (_, lse), _ = sparse_mla(x)
  attended = pallas_kernels.Attended(*x["absorbed"], lse)
  op = lambda index: pallas_kernels.sparse_indexer_loss(
    index, attended, x["indices"], SCALE
  )
  return with_gradients(op, pallas_kernels.Index(*x["index"]))


def dense_indexer_loss(x):
  (_, lse), _ = dense_mla(x)
  attended = pallas_kernels.Attended(*x["expanded"][:2], lse)
  op = lambda index: pallas_kernels.dense_indexer_loss(
    index, attended, *x["ranges"], SCALE
  )
  return with_gradients(op, pallas_kernels.Index(*x["index"]))


OPS = (
  indexer_topk,
  sparse_mla,
  dense_mla,
  sparse_indexer_loss,
  dense_indexer_loss,
)


@pytest.mark.parametrize("op", OPS)
def test_gives_what_a_cpu_gives(op):
  expected = jax.jit(op)(make_inputs())
  with (
    mock.patch.object(jax, "default_backend", return_value="gpu"),
    mock.patch.object(pallas_kernels.dispatch, "_warn_portable"),
  ):
    lowered = jax.jit(op).lower(make_inputs())
  actual = lowered.compile()(make_inputs())
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    rows.assert_close(x, y, 3e-6, 1e-6)
