"""No op holds an array of T x S elements, forward or backward.

Read off the compiled program, which is not run. The references break the law:
what finds nothing in the others is seen to find something.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import operands
from pallas_kernels.ops.dense_indexer_loss import api as dense_indexer_loss
from pallas_kernels.ops.dense_mla import api as dense_mla
from pallas_kernels.ops.indexer_topk import api as indexer_topk
from pallas_kernels.ops.sparse_indexer_loss import api as sparse_indexer_loss
from pallas_kernels.ops.sparse_mla import api as sparse_mla
from tests.kernels import hlo
from tests.kernels import inputs

B, N, C, R, U = 1, inputs.N, inputs.C, inputs.R, inputs.U
HR, CR = inputs.H + R, C + R
M, I, SCALE = inputs.M, inputs.I, inputs.SCALE
# The references of the sparse ops hold T x K x (C+R), which is more than T x S;
# all that is linear in T or S is far less.
T, S, K = 24576, 20480, 1600


def indexer_topk_step(op, q, k, w, start, end):
  def scores(q, k, w):
    indices, scores = op(operands.Index(q, k, w), start, end, K)
    return jnp.sum(scores), indices

  return jax.value_and_grad(scores, argnums=(0, 1, 2), has_aux=True)(q, k, w)


def sparse_mla_step(op, q, kv, d_lse, indices):
  f = lambda q, kv: op(q, kv, indices, C, SCALE)
  (out, lse), pullback = jax.vjp(f, q, kv)
  return out, lse, pullback((out, d_lse))


def dense_mla_step(op, q, k, v, d_lse, start, end):
  f = lambda q, k, v: op(q, k, v, start, end, SCALE)
  (out, lse), pullback = jax.vjp(f, q, k, v)
  return out, lse, pullback((out, d_lse))


def sparse_indexer_loss_step(op, q_index, k_index, w, q, kv, lse, indices):
  attended = operands.Attended(q, kv, lse)
  f = lambda index: jnp.sum(op(index, attended, indices, SCALE))
  return jax.value_and_grad(f)(operands.Index(q_index, k_index, w))


def dense_indexer_loss_step(op, q_index, k_index, w, q, k, lse, start, end):
  attended = operands.Attended(q, k, lse)
  f = lambda index: jnp.sum(op(index, attended, start, end, SCALE))
  return jax.value_and_grad(f)(operands.Index(q_index, k_index, w))


def shapes(op, T, S):
  """Of a step's float32 arguments and of its int32 arguments."""
  index = [(B, T, M, I), (B, S, I), (B, T, M)]
  expanded = [(B, T, N, HR), (B, S, N, HR), (B, S, N, U), (B, T, N)]
  absorbed = [(B, T, N, CR), (B, S, CR), (B, T, N)]
  return {
    "indexer_topk": (index, [(B, T), (B, T)]),
    "sparse_mla": (absorbed, [(B, T, K)]),
    "dense_mla": (expanded, [(B, T), (B, T)]),
    "sparse_indexer_loss": (index + absorbed, [(B, T, K)]),
    "dense_indexer_loss": (
      index + [expanded[0], expanded[1], expanded[3]],
      [(B, T), (B, T)],
    ),
  }[op]


STEPS = {
  "indexer_topk": (indexer_topk, indexer_topk_step),
  "sparse_mla": (sparse_mla, sparse_mla_step),
  "dense_mla": (dense_mla, dense_mla_step),
  "sparse_indexer_loss": (sparse_indexer_loss, sparse_indexer_loss_step),
  "dense_indexer_loss": (dense_indexer_loss, dense_indexer_loss_step),
}


def compile_step(op, implementation, T=T, S=S) -> jax.stages.Compiled:
  """The op's value and all its gradients."""
  api, step = STEPS[op]
  floats, ints = shapes(op, T, S)
  args = [jax.ShapeDtypeStruct(x, jnp.float32) for x in floats]
  args += [jax.ShapeDtypeStruct(x, jnp.int32) for x in ints]
  step = functools.partial(step, api.IMPLEMENTATIONS[implementation])
  return jax.jit(step).lower(*args).compile()


@pytest.mark.parametrize("op", STEPS)
def test_no_array_of_queries_by_keys(op):
  """Nor of an eighth of that, with the tiles of an accelerator."""
  with mock.patch.object(jax, "default_backend", return_value="gpu"):
    compiled = compile_step(op, "chunked_xla")
  assert hlo.arrays_of(compiled, T)
  assert not hlo.arrays_of(compiled, T * S // 8)


@pytest.mark.parametrize("op", STEPS)
def test_the_references_break_it(op):
  compiled = compile_step(op, "reference")
  assert hlo.arrays_of(compiled, T * S)


@pytest.mark.parametrize("op", STEPS)
def test_memory_grows_with_length_not_with_its_square(op):
  short, long = (
    hlo.temporary_bytes(compile_step(op, "chunked_xla", length, length))
    for length in (1024, 2048)
  )
  assert long < 2.6 * short
