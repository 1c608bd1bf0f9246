"""The gradients that the oracles write by hand are those of their values."""

from collections.abc import Callable
import functools

import numpy as np
import pytest

from tests.kernels import inputs
from tests.kernels import oracles

T, S, K, C = 7, 9, 5, inputs.C
CR = inputs.C + inputs.R


def slope(
  value: Callable[..., float], xs: list[np.ndarray], steps: list[np.ndarray]
) -> float:
  """The derivative of `value` at `xs` along `steps`."""
  size = 1e-5
  ahead = value(*(x + size * step for x, step in zip(xs, steps)))
  behind = value(*(x - size * step for x, step in zip(xs, steps)))
  return (ahead - behind) / (2 * size)


def assert_gradients(value, xs, gradients):
  rng = np.random.default_rng(3)
  for i, (x, gradient) in enumerate(zip(xs, gradients)):
    for _ in range(3):
      steps = [np.zeros_like(x) for x in xs]
      steps[i] = rng.normal(size=x.shape)
      expected = np.sum(steps[i] * gradient)
      assert slope(value, xs, steps) == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def normals():
  """Draws arrays of these shapes, for each row of the batch."""
  rng = np.random.default_rng(0)
  return lambda *shapes: [rng.normal(size=(inputs.B, *x)) for x in shapes]


def test_sparse_mla(normals):
  N = inputs.N
  q, kv, d_out, d_lse = normals((T, N, CR), (S, CR), (T, N, C), (T, N))
  for kind in ("plain", "twice"):
    indices = inputs.choices(kind, T, S, K)

    op = functools.partial(
      oracles.sparse_mla,
      indices=indices,
      latent_rank=C,
      scale=inputs.SCALE,
      d_out=d_out,
      d_lse=d_lse,
    )

    def value(q, kv, op=op):
      out, lse, _, _ = op(q, kv)
      return np.sum(out * d_out) + np.sum(lse * d_lse)

    assert_gradients(value, [q, kv], op(q, kv)[2:])


def test_dense_mla(normals):
  N, HR, U = inputs.N, inputs.H + inputs.R, inputs.U
  q, k, v = normals((T, N, HR), (S, N, HR), (S, N, U))
  d_out, d_lse = normals((T, N, U), (T, N))
  start, end = inputs.ranges("causal", T, S)

  def op(q, k, v):
    return oracles.dense_mla(q, k, v, start, end, inputs.SCALE, d_out, d_lse)

  def value(q, k, v):
    out, lse, _, _, _ = op(q, k, v)
    return np.sum(out * d_out) + np.sum(lse * d_lse)

  assert_gradients(value, [q, k, v], op(q, k, v)[2:])


def test_sparse_indexer_loss(normals):
  N, M, I = inputs.N, inputs.M, inputs.I
  q_index, k_index, w = normals((T, M, I), (S, I), (T, M))
  q, kv, lse, d_loss = normals((T, N, CR), (S, CR), (T, N), (T,))
  indices = inputs.choices("plain", T, S, K)

  def op(q_index, k_index, w):
    return oracles.sparse_indexer_loss(
      q_index, k_index, w, indices, q, kv, lse, inputs.SCALE, d_loss
    )

  def value(q_index, k_index, w):
    return np.sum(op(q_index, k_index, w)[0] * d_loss)

  xs = [q_index, k_index, w]
  assert_gradients(value, xs, op(*xs)[1:])


def test_dense_indexer_loss(normals):
  N, M, I, HR = inputs.N, inputs.M, inputs.I, inputs.H + inputs.R
  q_index, k_index, w = normals((T, M, I), (S, I), (T, M))
  q, k, d_loss = normals((T, N, HR), (S, N, HR), (T,))
  start, end = inputs.ranges("causal", T, S)
  no_values = np.zeros((inputs.B, S, N, 1)), np.zeros((inputs.B, T, N, 1))
  _, lse, *_ = oracles.dense_mla(
    q, k, no_values[0], start, end, inputs.SCALE, no_values[1], q[..., 0]
  )

  def op(q_index, k_index, w):
    return oracles.dense_indexer_loss(
      q_index, k_index, w, start, end, q, k, lse, inputs.SCALE, d_loss
    )

  def value(q_index, k_index, w):
    return np.sum(op(q_index, k_index, w)[0] * d_loss)

  xs = [q_index, k_index, w]
  assert_gradients(value, xs, op(*xs)[1:])
