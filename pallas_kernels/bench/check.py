"""Compares an op with its reference in float32, query by query.

The reference holds much for each query, so it sees a sample of them, some at a
time. Cotangents are zero outside the sample: then the gradient of what all
queries share is that of the sample, too.
"""

from collections.abc import Iterator
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from pallas_kernels.cases import contract

# 1 - 2 <x, y> / (|x|^2 + |y|^2), which is |x - y|^2 / (|x|^2 + |y|^2), of all.
GRADIENT: Final = 1e-4
# The same of one row. A row far below the others is what rounding leaves where
# large terms cancel: it is held to a share of their mean square, of all rows
# and of the heads of its own query. (A query of two keys may weigh one of them
# by nearly 1: then the exact gradient is far below the rounding of `out`.)
GRADIENT_ROW: Final = 1e-3
ROW_FLOOR: Final = 1e-2
HEAD_FLOOR: Final = 0.3


def sample(T: int, count: int, seed: int) -> np.ndarray:
  """Samples `count` of T queries, with the first few and the last."""
  count = min(count, T)
  rng = np.random.default_rng(seed)
  some_T = rng.permutation(T)
  special = [*range(min(4, T)), T - 1]
  some_T = np.concatenate([special, some_T])
  _, first = np.unique(some_T, return_index=True)
  return np.sort(some_T[np.sort(first)][:count])


def check(
  case: contract.Case,
  implementation: str | None,
  rows: np.ndarray,
  cotangents: Any | None,
) -> list[contract.Finding]:
  """Compares the queries `rows`; given cotangents, their gradients too."""
  if cotangents is None:
    call = jax.jit(case.forward(implementation))
    out, gradients = call(*case.inputs.values()), ()
    expected, expected_gradients = _reference(case, rows, None)
  else:
    masked = jax.tree.map(functools.partial(_mask, rows=rows), cotangents)
    both = jax.jit(case.forward_backward(implementation))
    out, gradients = both((*case.inputs.values(),), masked)
    expected, expected_gradients = _reference(case, rows, _take(masked, rows))
  actual = _take(out, rows)
  findings = [*_results(case, actual, expected)]
  if case.judge is not None:
    findings += case.judge(case, rows, actual, expected)
  for name, x, y in zip(case.inputs, gradients, expected_gradients):
    findings += _gradient(name, x if name in case.shared else x[:, rows], y)
  return findings


def _take(tree: Any, rows: np.ndarray | slice) -> Any:
  return jax.tree.map(lambda x: x[:, rows], tree)


def _mask(x: Array, rows: np.ndarray) -> Array:
  kept_T = np.zeros(x.shape[1], bool)
  kept_T[rows] = True
  kept = jnp.asarray(kept_T).reshape(1, -1, *[1] * (x.ndim - 2))
  return jnp.where(kept, x, 0)


def _float32(tree: Any) -> Any:
  """Casts floating-point arrays to fp32."""

  def convert(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float32) if floating else x

  return jax.tree.map(convert, tree)


def _reference(
  case: contract.Case, rows: np.ndarray, cotangents: Any | None
) -> tuple[Any, list[Array]]:
  """Computes the reference's results and gradients for the queries `rows`.

  Args:
    case: The op and its inputs.
    rows: The queries.
    cotangents: Cotangents of the results for `rows`.
  """

  @jax.jit
  def tile(inputs, cotangents):
    if not case.flops_8_bits:  # else it rounds what it gets
      inputs, cotangents = _float32((inputs, cotangents))
    if cotangents is None:
      return case.forward("reference")(*inputs), ()
    return case.forward_backward("reference")(inputs, cotangents)

  outs, gradients = [], []
  with jax.default_matmul_precision("highest"):  # a GPU would take tf32
    for part in case.tiles(rows):
      inputs = (*case.rows(rows[part]).values(),)
      masked = None if cotangents is None else _take(cotangents, part)
      out, gradient = tile(inputs, masked)
      outs.append(out)
      gradients.append(gradient)
  join = lambda *xs: jnp.concatenate(xs, 1)
  return jax.tree.map(join, *outs), [
    functools.reduce(jnp.add, parts) if name in case.shared else join(*parts)
    for name, parts in zip(case.inputs, zip(*gradients))
  ]


def _results(
  case: contract.Case, actual: Any, expected: Any
) -> Iterator[contract.Finding]:
  actual = actual if isinstance(actual, tuple) else (actual,)
  expected = expected if isinstance(expected, tuple) else (expected,)
  for (name, limits), x, y in zip(case.outputs.items(), actual, expected):
    if limits is None:
      continue
    count = x.shape[1]
    error = _excess(x, y, limits.absolute, limits.relative, limits.rms)
    yield contract.Finding(
      *(name, count, float(error), 1.0), "over what is allowed for a number"
    )
    if limits.cosine is not None:
      error = float(_cosine(x, y))
      yield contract.Finding(
        name, count, error, limits.cosine, "1 - cosine of a row"
      )


@jax.jit(static_argnames=("absolute", "relative", "rms"))
def _excess(
  x: Array, y: Array, absolute: float, relative: float, rms: float | None
) -> Float[Array, ""]:
  """Largest ratio of error to limit; NaN if any result is NaN."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  limit = jnp.maximum(absolute, relative * jnp.abs(y))
  if rms is not None:
    size = jnp.sqrt(jnp.mean(jnp.square(y), -1, keepdims=True))
    limit = jnp.maximum(limit, absolute * size / rms)
  error = jnp.abs(x - y) / limit
  # -inf is right where it is expected, and only there.
  error = jnp.where(x == y, 0.0, error)
  return jnp.max(jnp.where(jnp.isnan(error), jnp.inf, error))


@jax.jit
def _cosine(x: Array, y: Array) -> Float[Array, ""]:
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  norms = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y, axis=-1)
  x, y = (
    z / jnp.where(norm > 0, norm, 1.0)[..., None]
    for z, norm in zip((x, y), norms)
  )
  # Half of |x - y|^2: what 1 - x . y would lose to rounding.
  return jnp.max(jnp.sum(jnp.square(x - y), -1) / 2)


@jax.jit
def _distances(x: Array, y: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  apart = jnp.sum(jnp.square(x - y), -1)
  size = jnp.sum(jnp.square(x) + jnp.square(y), -1)
  floor = ROW_FLOOR * jnp.mean(size)
  if x.ndim == 4:  # has heads
    heads = jnp.mean(size, -1, keepdims=True)
    floor = jnp.maximum(floor, HEAD_FLOOR * heads)
  row = apart / jnp.maximum(size, floor)
  return jnp.max(row), jnp.sum(apart) / jnp.sum(size)


def _gradient(name: str, x: Array, y: Array) -> Iterator[contract.Finding]:
  row, whole = _distances(x, y)
  rows = x.size // x.shape[-1]
  what = "1 - similarity"
  yield contract.Finding(f"d {name}", rows, float(whole), GRADIENT, what)
  yield contract.Finding(
    f"d {name}", rows, float(row), GRADIENT_ROW, f"{what} of a row"
  )
