"""Compares an op with its reference in float32, query by query.

The reference holds much for each query, so it sees a sample of them, some at a
time. Cotangents are zero outside the sample: then the gradient of what all
queries share is that of the sample, too.
"""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from pallas_kernels.bench import cases
from pallas_kernels.bench import measure
from pallas_kernels.ops.indexer_topk import fp8

# What results in bf16 of sums in fp32 may differ by. Of a number: either the
# difference or that over the number; of a row: 1 - cosine.
OUT_ABSOLUTE: Final = 8e-4
# That limit is for averages of many keys. Of few, numbers are larger, and so is
# what bf16 probabilities do to one that is small among them: where the root
# mean square of a row is above this, the limit grows with it.
OUT_SIZE: Final = 0.1
OUT_RELATIVE: Final = 3.01 / 128
OUT_COSINE: Final = 7e-6
# Near zero, which takes few keys, it is a difference of numbers of the logits'
# size: this is about a last bit in fp32 of 16.
LSE_ABSOLUTE: Final = 2e-6
LSE_RELATIVE: Final = 2.01 / 65536
LOSS_ABSOLUTE: Final = 1e-5
LOSS_RELATIVE: Final = 1e-3
# 1 - 2 <x, y> / (|x|^2 + |y|^2), which is |x - y|^2 / (|x|^2 + |y|^2), of all.
GRADIENT: Final = 1e-4
# The same of one row. A row far below the others is what rounding leaves where
# large terms cancel: it is held to a share of their mean square, of all rows
# and of the heads of its own query. (A query of two keys may weigh one of them
# by nearly 1: then the exact gradient is far below the rounding of `out`.)
GRADIENT_ROW: Final = 1e-3
ROW_FLOOR: Final = 1e-2
HEAD_FLOOR: Final = 0.3
# Of sum_j |w_j| relu(q_j . k), the largest of a query's: what summing in
# another order may change.
SCORE: Final = 1e-5
# Tensor cores sum products of 8 bits to about 14 of them.
SCORE_8_BITS: Final = 1e-3
# Limit of the reference's memory.
_BYTES: Final = 2 << 30


@dataclasses.dataclass(frozen=True)
class Finding:
  """Largest error of one result against the reference."""

  name: str
  rows: int
  error: float
  limit: float
  what: str
  """Name of the error measure."""

  @property
  def right(self) -> bool:
    return self.error <= self.limit  # NaN is not


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
  case: cases.Case,
  implementation: str | None,
  rows: np.ndarray,
  cotangents: Any | None,
) -> list[Finding]:
  """Compares the queries `rows`; given cotangents, their gradients too."""
  inputs, rest = case.split()
  if cotangents is None:
    out = measure.run(case.forward(implementation), *inputs, *rest)
    expected, _ = _reference(case, rows, None)
    if case.op == "indexer_topk":
      return [*_selection(case, rows, out, expected)]
    return [*_results(case, _take(out, rows), expected)]
  masked = jax.tree.map(functools.partial(_mask, rows=rows), cotangents)
  out, gradients = measure.run(
    case.forward_backward(implementation), (*inputs, *rest), masked
  )
  expected, expected_gradients = _reference(case, rows, _take(masked, rows))
  findings = [*_results(case, _take(out, rows), expected)]
  for name, x, y in zip(case.inputs, gradients, expected_gradients):
    findings += _gradient(name, x if name in case.shared else x[:, rows], y)
  return findings


def _take(tree: Any, rows: np.ndarray) -> Any:
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
  case: cases.Case, rows: np.ndarray, cotangents: Any | None
) -> tuple[Any, list[Array]]:
  """Computes the reference's results and gradients for the queries `rows`.

  Args:
    case: The op and its inputs.
    rows: The queries.
    cotangents: Cotangents of the results for `rows`.
  """
  n = case.differentiated
  names = [*case.inputs]
  shared = [name in case.shared for name in names]

  def tile(inputs, cotangents):
    if case.score_dtype is None:  # else it rounds what it gets
      inputs, cotangents = _float32((inputs, cotangents))
    call = case.forward("reference")
    if cotangents is None:
      return call(*inputs), ()
    out, pullback = jax.vjp(lambda *xs: call(*xs, *inputs[n:]), *inputs[:n])
    return out, pullback(cotangents)

  outs, gradients = [], []
  bT = max(_BYTES // case.bytes_per_query, 1)
  with jax.default_matmul_precision("highest"):  # a GPU would take tf32
    for first in range(0, len(rows), bT):
      some = rows[first : first + bT]
      inputs = tuple(
        x if is_shared else x[:, some]
        for x, is_shared in zip(case.inputs.values(), shared)
      )
      place = np.arange(first, first + len(some))
      masked = None if cotangents is None else _take(cotangents, place)
      out, gradient = measure.run(tile, inputs, masked)
      outs.append(out)
      gradients.append(gradient)
  join = lambda *xs: jnp.concatenate(xs, 1)
  out = jax.tree.map(join, *outs)
  if cotangents is None:
    return out, []
  return out, [
    functools.reduce(jnp.add, parts) if is_shared else join(*parts)
    for is_shared, parts in zip(shared, zip(*gradients))
  ]


def _results(case: cases.Case, actual: Any, expected: Any) -> Iterator[Finding]:
  tolerances = {
    "out": (OUT_ABSOLUTE, OUT_RELATIVE),
    "lse": (LSE_ABSOLUTE, LSE_RELATIVE),
    "loss": (LOSS_ABSOLUTE, LOSS_RELATIVE),
  }
  actual = actual if isinstance(actual, tuple) else (actual,)
  expected = expected if isinstance(expected, tuple) else (expected,)
  for name, x, y in zip(case.outputs, actual, expected):
    count = x.shape[1]
    yield Finding(
      *(name, count, float(_excess(x, y, *tolerances[name])), 1.0),
      "over what is allowed for a number",
    )
    if name == "out":
      error = float(_cosine(x, y))
      yield Finding(name, count, error, OUT_COSINE, "1 - cosine of a row")


@jax.jit(static_argnames=("absolute", "relative"))
def _excess(
  x: Array, y: Array, absolute: float, relative: float
) -> Float[Array, ""]:
  """Largest ratio of error to limit; NaN if any result is NaN."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  limit = jnp.maximum(absolute, relative * jnp.abs(y))
  if x.ndim == 4:  # B T N C: results; the others have one number for a head
    rms = jnp.sqrt(jnp.mean(jnp.square(y), -1, keepdims=True))
    limit = jnp.maximum(limit, absolute * rms / OUT_SIZE)
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


def _gradient(name: str, x: Array, y: Array) -> Iterator[Finding]:
  row, whole = _distances(x, y)
  rows = x.size // x.shape[-1]
  what = "1 - similarity"
  yield Finding(f"d {name}", rows, float(whole), GRADIENT, what)
  yield Finding(f"d {name}", rows, float(row), GRADIENT_ROW, f"{what} of a row")


def _selection(
  case: cases.Case, rows: np.ndarray, actual: Any, expected: Any
) -> Iterator[Finding]:
  """Checks that the best keys were selected, up to ties within rounding.

  The lists have the right length, ascend, and hold visible keys only. No key
  that was left out scores above one that was taken, by more than rounding.
  """
  indices, scores = _take(actual, rows)
  wrong, errors, scored = 0.0, [], []
  limit = SCORE if case.score_dtype is None else SCORE_8_BITS
  bT = max(_BYTES // case.bytes_per_query, 1)
  x = case.inputs
  judge = functools.partial(_judge, score_dtype=case.score_dtype)
  with jax.default_matmul_precision("highest"):
    for first in range(0, len(rows), bT):
      part = slice(first, first + bT)
      some = rows[part]
      bad_T, swapped_T, off_T = measure.run(
        judge,
        indices[:, part],
        scores[:, part],
        x["q_index"][:, some],
        x["k_index"],
        *(x[name][:, some] for name in ("w", "start", "end")),
      )
      wrong += float(bad_T.sum())
      errors.append(float(swapped_T.max()))
      scored.append(float(off_T.max()))
  count, same = len(rows), (indices == expected[0]).all(-1).sum()
  yield Finding("indices", count, wrong, 0.0, "lists out of order")
  yield Finding(
    *("indices", count, max(errors), limit),
    f"a key left out over one taken ({int(same)} rows as the reference's)",
  )
  yield Finding("scores", count, max(scored), limit, "of the largest")


def _judge(
  indices: Int[Array, "1 T K"],
  scores: Float[Array, "1 T K"],
  q: Float[Array, "1 T M I"],
  k: Float[Array, "1 S I"],
  w: Float[Array, "1 T M"],
  start: Int[Array, "1 T"],
  end: Int[Array, "1 T"],
  score_dtype: cases.ScoreDType | None,
) -> tuple[Bool[Array, "1 T"], Float[Array, "1 T"], Float[Array, "1 T"]]:
  """Judges each query: a wrong list; errors of its keys and of its scores."""
  S, K = k.shape[1], indices.shape[2]
  k_scale_BS = jnp.ones(k.shape[:2])
  if score_dtype is not None:
    (q, q_scale_BTM), (k, k_scale_BS) = fp8.quantize(q), fp8.quantize(k)
    w = w * q_scale_BTM
  q, k = _float32((q, k))
  relu = jax.nn.relu(jnp.einsum("BTMI,BSI->BTMS", q, k))
  relu = relu * k_scale_BS[:, None, None]
  true_BTS = jnp.einsum("BTMS,BTM->BTS", relu, w)
  largest_BT = jnp.einsum("BTMS,BTM->BTS", relu, jnp.abs(w)).max(-1)
  largest_BT = jnp.maximum(largest_BT, jnp.finfo(jnp.float32).tiny)
  key = jnp.arange(S)[None, None]
  visible_BTS = (key >= start[..., None]) & (key < end[..., None])
  valid_BTK = (indices >= 0) & (indices < S)
  safe_BTK = jnp.where(valid_BTK, indices, S)  # S: dropped
  taken_BTS = jax.vmap(
    jax.vmap(lambda i: jnp.zeros(S, bool).at[i].set(True, mode="drop"))
  )(safe_BTK)

  count_BT = valid_BTK.sum(-1)
  place_K = jnp.arange(K)[None, None]
  ascends_BTK = (indices[..., 1:] > indices[..., :-1]) | ~valid_BTK[..., 1:]
  bad_BT = (
    (count_BT != jnp.minimum(visible_BTS.sum(-1), K))
    | (valid_BTK != (place_K < count_BT[..., None])).any(-1)
    | ((indices != -1) & ~valid_BTK).any(-1)
    | ~ascends_BTK.all(-1)
    | (taken_BTS & ~visible_BTS).any(-1)
  )
  lowest_BT = jnp.where(taken_BTS, true_BTS, jnp.inf).min(-1)
  left_BT = jnp.where(visible_BTS & ~taken_BTS, true_BTS, -jnp.inf).max(-1)
  swapped_BT = jnp.maximum(left_BT - lowest_BT, 0.0) / largest_BT

  padded_BTS = jnp.pad(
    true_BTS, [(0, 0), (0, 0), (0, 1)], constant_values=-jnp.inf
  )
  due_BTK = jnp.take_along_axis(padded_BTS, safe_BTK, -1)
  off_BTK = jnp.where(due_BTK == scores, 0.0, jnp.abs(due_BTK - scores))
  off_BTK = jnp.where(jnp.isnan(off_BTK), jnp.inf, off_BTK)
  return bad_BT, swapped_BT, off_BTK.max(-1) / largest_BT
