"""Test cases of the ops on random data: inputs, calls and required work.

The batch is 1. Where there are enough queries, one sees no key and one only a
few, which costs no time and shows in the check.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

import pallas_kernels
from pallas_kernels import shapes

type Order = Literal["random", "ascending"]
type Visible = Literal["causal", "all"]
type ScoreDType = Literal["float8_e4m3fn"]

# A multiplication and an addition.
_FLOP: Final = 2
# Queries whose keys are drawn at once: 64 x S random numbers.
_DRAWN: Final = 64
_DEAD, _SPARE, _FEWEST = 1, 2, 8
# Keys and values, and one over it the queries: logits have a deviation of
# about 1.7, and the results are of a size where the limits of check.py tell.
_KEYS: Final = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """An op on one set of inputs."""

  op: str
  call: Callable[..., Any]
  """Function called as call(*inputs, implementation=...)."""
  inputs: dict[str, Array]
  """Inputs by name, in the order of `call`."""
  differentiated: int = 0
  """Number of inputs, from the first, that have a gradient."""
  shared: tuple[str, ...]
  """Inputs that all queries read; the others have a row for each query."""
  outputs: tuple[str, ...]
  flops: int
  """FLOPs of the forward pass."""
  flops_backward: int = 0
  score_dtype: ScoreDType | None = None
  """In 8 bits, the forward pass computes at twice the peak."""
  bytes_per_query: int
  """Bytes per query of the reference's largest temporary."""

  def split(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Splits off the inputs that have a gradient from the others."""
    inputs = (*self.inputs.values(),)
    return inputs[: self.differentiated], inputs[self.differentiated :]

  def forward(self, implementation: str | None) -> Callable[..., Any]:
    return functools.partial(self.call, implementation=implementation)

  def forward_keeping(self, implementation: str | None) -> Callable[..., Any]:
    """Returns a function: inputs -> outputs and their pullback."""
    call, n = self.forward(implementation), self.differentiated

    def keeping(*inputs):
      return jax.vjp(lambda *xs: call(*xs, *inputs[n:]), *inputs[:n])

    return keeping

  def forward_backward(self, implementation: str | None) -> Callable[..., Any]:
    """Returns a function: inputs, cotangents -> outputs, gradients."""
    keeping = self.forward_keeping(implementation)

    def both(inputs, cotangents):
      out, pullback = keeping(*inputs)
      return out, pullback(cotangents)

    return both


def cotangents(case: Case, key: jax.Array) -> Any:
  """Draws cotangents in the shapes of the op's results."""
  out = jax.eval_shape(case.forward("chunked_xla"), *case.inputs.values())
  leaves, tree = jax.tree.flatten(out)
  keys = jax.random.split(key, len(leaves))
  return tree.unflatten(
    jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)
  )


def normal(
  key: jax.Array, *shape: int, scale: float = 1.0
) -> Float[Array, "..."]:
  """Draws normal numbers in bf16, without a copy in fp32."""
  return jax.jit(
    lambda key: scale * jax.random.normal(key, shape, jnp.bfloat16)
  )(key)


def ranges(
  shape: shapes.Shape, visible: Visible
) -> tuple[Int[Array, "1 T"], Int[Array, "1 T"]]:
  """Ranges of the last T queries of a causal sequence of S, or all keys."""
  T, S = shape.T, shape.S
  start_T = np.zeros(T, np.int32)
  end_T = np.arange(S - T, S, dtype=np.int32) + 1
  if visible == "all":
    end_T[:] = S
  if T >= _FEWEST:
    start_T[_DEAD] = end_T[_DEAD] = S // 2
    start_T[_SPARE] = end_T[_SPARE] - min(shape.K // 2 + 1, end_T[_SPARE])
  with jax.ensure_compile_time_eval():  # numbers, where the rest is traced
    return jnp.asarray(start_T[None]), jnp.asarray(end_T[None])


def chosen(
  key: jax.Array, shape: shapes.Shape, order: Order
) -> Int[Array, "1 T K"]:
  """Draws K keys for each query, uniformly from S."""
  T, S, K = shape.T, shape.S, shape.K

  @jax.jit
  def draw(keys):
    def query(key):
      _, indices_K = jax.lax.top_k(jax.random.uniform(key, (S,)), min(K, S))
      return jnp.sort(indices_K) if order == "ascending" else indices_K

    return jax.lax.map(query, keys, batch_size=_DRAWN)

  indices_TK = draw(jax.random.split(key, T))
  indices_TK = jnp.pad(
    indices_TK, [(0, 0), (0, K - indices_TK.shape[1])], constant_values=-1
  )
  if T >= _FEWEST:
    place_K = jnp.arange(K)
    indices_TK = indices_TK.at[_DEAD].set(jnp.where(place_K % 2, -1, S))
    spare_K = jnp.where(place_K % 3 == 1, -1, indices_TK[_SPARE])
    indices_TK = indices_TK.at[_SPARE].set(spare_K)
  return indices_TK[None]


def pairs(start: Array, end: Array) -> int:
  """Counts pairs of a query and a key that it sees."""
  return int(np.maximum(np.asarray(end) - np.asarray(start, np.int64), 0).sum())


def selected(indices: Array, S: int) -> int:
  """Counts pairs of a query and a key selected for it."""
  if isinstance(indices, jax.core.Tracer):
    return indices.size  # none is known; nearly all are keys
  return int(jnp.sum((indices >= 0) & (indices < S)))


def index_inputs(key: jax.Array, shape: shapes.Shape) -> dict[str, Array]:
  q, k, w = jax.random.split(key, 3)
  w_TM = jax.random.normal(w, (1, shape.T, shape.M))
  return {
    "q_index": normal(q, 1, shape.T, shape.M, shape.I),
    "k_index": normal(k, 1, shape.S, shape.I),
    "w": w_TM * (shape.M * shape.I) ** -0.5,
  }


def indexer_topk(
  index: dict[str, Array],
  shape: shapes.Shape,
  visible: Visible,
  score_dtype: ScoreDType | None,
) -> Case:
  start, end = ranges(shape, visible)

  def call(q_index, k_index, w, start, end, *, implementation):
    return pallas_kernels.indexer_topk(
      *(pallas_kernels.Index(q_index, k_index, w), start, end, shape.K),
      score_dtype=score_dtype,
      implementation=implementation,
    )

  return Case(
    op="indexer_topk",
    call=call,
    inputs={**index, "start": start, "end": end},
    shared=("k_index",),
    outputs=("indices", "scores"),
    flops=_FLOP * shape.M * shape.I * pairs(start, end),
    score_dtype=score_dtype,
    bytes_per_query=4 * shape.S * (shape.M + 8),
  )


def sparse_mla(
  key: jax.Array, shape: shapes.Shape, indices: Int[Array, "1 T K"]
) -> Case:
  C, CR, N = shape.C, shape.C + shape.R, shape.N
  q, kv = jax.random.split(key)

  def call(q, kv, indices, *, implementation):
    return pallas_kernels.sparse_mla(
      q, kv, indices, C, shape.scale, implementation=implementation
    )

  num_selected = selected(indices, shape.S)
  return Case(
    op="sparse_mla",
    call=call,
    inputs={
      "q": normal(q, 1, shape.T, N, CR, scale=1 / _KEYS),
      "kv": normal(kv, 1, shape.S, CR, scale=_KEYS),
      "indices": indices,
    },
    differentiated=2,
    shared=("kv",),
    outputs=("out", "lse"),
    flops=_FLOP * num_selected * N * (CR + C),
    flops_backward=_FLOP * num_selected * N * (3 * CR + 2 * C),
    bytes_per_query=4 * shape.K * (4 * CR + 6 * N),
  )


def dense_mla(
  key: jax.Array,
  shape: shapes.Shape,
  visible: Visible,
  indices: Int[Array, "1 T K"] | None = None,
) -> Case:
  """Counts the FLOPs of all visible keys, also where few are selected."""
  HR, U, N = shape.H + shape.R, shape.U, shape.N
  start, end = ranges(shape, visible)
  q, k, v = jax.random.split(key, 3)

  def call(q, k, v, start, end, *indices, implementation):
    return pallas_kernels.dense_mla(
      *(q, k, v, start, end, shape.scale, *indices),
      implementation=implementation,
    )

  num_pairs = pairs(start, end)
  return Case(
    op="dense_mla",
    call=call,
    inputs={
      "q": normal(q, 1, shape.T, N, HR, scale=1 / _KEYS),
      "k": normal(k, 1, shape.S, N, HR, scale=_KEYS),
      "v": normal(v, 1, shape.S, N, U, scale=_KEYS),
      "start": start,
      "end": end,
    }
    | ({} if indices is None else {"indices": indices}),
    differentiated=3,
    shared=("k", "v"),
    outputs=("out", "lse"),
    flops=_FLOP * num_pairs * N * (HR + U),
    flops_backward=_FLOP * num_pairs * N * (3 * HR + 2 * U),
    bytes_per_query=4 * shape.S * 6 * N,
  )


def sparse_indexer_loss(
  index: dict[str, Array],
  attention: Case,
  lse: Float[Array, "1 T N"],
  shape: shapes.Shape,
  measure: bool,
) -> Case:
  """Compares with `attention`, sparse, which returned `lse`."""
  constants: dict[str, Any] = dict(scale=shape.scale, measure=measure)

  def call(q_index, k_index, w, indices, q, kv, lse, *, implementation):
    index = pallas_kernels.Index(q_index, k_index, w)
    attended = pallas_kernels.Attended(q, kv, lse)
    return pallas_kernels.sparse_indexer_loss(
      *(index, attended, indices), implementation=implementation, **constants
    )

  indices = attention.inputs["indices"]
  num_selected = selected(indices, shape.S)
  target, score = shape.N * (shape.C + shape.R), shape.M * shape.I
  return Case(
    op="sparse_indexer_loss",
    call=call,
    inputs={
      **index,
      "indices": indices,
      "q": attention.inputs["q"],
      "kv": attention.inputs["kv"],
      "lse": lse,
    },
    differentiated=3,
    shared=("k_index", "kv"),
    outputs=("loss",),
    flops=_FLOP * num_selected * (target + score) * measure,
    flops_backward=_FLOP * num_selected * (target + 3 * score),
    bytes_per_query=4
    * shape.K
    * (4 * (shape.C + shape.R) + 4 * (shape.N + shape.M)),
  )


def sparse_mla_with_loss(
  index: dict[str, Array], attention: Case, shape: shapes.Shape, measure: bool
) -> Case:
  """`attention`, sparse, together with its loss.

  Of the loss's backward pass, the attention's knows the target already.
  """

  def call(q, kv, q_index, k_index, w, indices, *, implementation):
    return pallas_kernels.sparse_mla_with_loss(
      *(q, kv, indices, pallas_kernels.Index(q_index, k_index, w)),
      *(shape.C, shape.scale),
      measure=measure,
      implementation=implementation,
    )

  indices = attention.inputs["indices"]
  num_selected = selected(indices, shape.S)
  target, score = shape.N * (shape.C + shape.R), shape.M * shape.I
  return Case(
    op="sparse_mla_with_loss",
    call=call,
    inputs={
      "q": attention.inputs["q"],
      "kv": attention.inputs["kv"],
      **index,
      "indices": indices,
    },
    differentiated=5,
    shared=("kv", "k_index"),
    outputs=("out", "lse", "loss"),
    flops=attention.flops + _FLOP * num_selected * (target + score) * measure,
    flops_backward=attention.flops_backward + _FLOP * num_selected * 3 * score,
    bytes_per_query=attention.bytes_per_query
    + 4 * shape.K * (4 * (shape.C + shape.R) + 4 * (shape.N + shape.M)),
  )


def dense_indexer_loss(
  index: dict[str, Array],
  attention: Case,
  lse: Float[Array, "1 T N"],
  shape: shapes.Shape,
  measure: bool,
) -> Case:
  """Compares with `attention`, dense, which returned `lse`."""
  constants: dict[str, Any] = dict(scale=shape.scale, measure=measure)

  def call(q_index, k_index, w, start, end, q, k, lse, *, implementation):
    index = pallas_kernels.Index(q_index, k_index, w)
    attended = pallas_kernels.Attended(q, k, lse)
    return pallas_kernels.dense_indexer_loss(
      *(index, attended, start, end),
      implementation=implementation,
      **constants,
    )

  start, end = attention.inputs["start"], attention.inputs["end"]
  num_pairs = pairs(start, end)
  target, score = shape.N * (shape.H + shape.R), shape.M * shape.I
  return Case(
    op="dense_indexer_loss",
    call=call,
    inputs={
      **index,
      "start": start,
      "end": end,
      "q": attention.inputs["q"],
      "k": attention.inputs["k"],
      "lse": lse,
    },
    differentiated=3,
    shared=("k_index", "k"),
    outputs=("loss",),
    flops=_FLOP * num_pairs * (target + score) * measure,
    flops_backward=_FLOP * num_pairs * (target + 3 * score),
    bytes_per_query=4 * shape.S * (3 * shape.N + 4 * shape.M),
  )
