"""Selection of keys by the indexer, judged by their scores."""

from collections.abc import Iterator
import functools
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from pallas_kernels import contraction
from pallas_kernels import operands
from pallas_kernels.cases import contract
from pallas_kernels.cases import data
from pallas_kernels.cases import setting as setting_lib
from pallas_kernels.ops.indexer_topk import api
from pallas_kernels.ops.indexer_topk import fp8
from pallas_kernels.ops.indexer_topk.mosaic_tpu import counts

# Of sum_j |w_j| relu(q_j . k), the largest of a query's: what summing in
# another order may change.
SCORE: Final = 1e-5
# Tensor cores sum products of 8 bits to about 14 of them.
SCORE_8_BITS: Final = 1e-3


def make(setting: setting_lib.Setting) -> contract.Case:
  shape, score_dtype = setting.shape, setting.score_dtype
  start, end = data.ranges(shape, setting.visible)

  def call(q_index, k_index, w, start, end, *, implementation):
    return api.indexer_topk(
      *(operands.Index(q_index, k_index, w), start, end, shape.K),
      score_dtype=score_dtype,
      implementation=implementation,
    )

  flops = 2 * shape.M * shape.I * data.pairs(start, end)
  return contract.Case(
    op="indexer_topk",
    call=call,
    inputs={**data.index(setting), "start": start, "end": end},
    shared=("k_index",),
    outputs={"indices": None, "scores": None},
    judge=functools.partial(_selection, score_dtype=score_dtype),
    flops=flops,
    flops_8_bits=0 if score_dtype is None else flops,
    bytes_per_query=4 * shape.S * (shape.M + 8),
    kernels=counts.KERNELS,
  )


def _selection(
  case: contract.Case,
  rows: np.ndarray,
  actual: tuple[Int[Array, "1 T K"], Float[Array, "1 T K"]],
  expected: tuple[Int[Array, "1 T K"], Float[Array, "1 T K"]],
  score_dtype: setting_lib.ScoreDType | None,
) -> Iterator[contract.Finding]:
  """Checks that the best keys were selected, up to ties within rounding.

  The lists have the right length, ascend, and hold visible keys only. No key
  that was left out scores above one that was taken, by more than rounding.
  """
  indices, scores = actual
  wrong, errors, scored = 0.0, [], []
  judge = jax.jit(functools.partial(_judge, score_dtype=score_dtype))
  with jax.default_matmul_precision("highest"):
    for part in case.tiles(rows):
      bad_T, swapped_T, off_T = judge(
        indices[:, part], scores[:, part], **case.rows(rows[part])
      )
      wrong += float(bad_T.sum())
      errors.append(float(swapped_T.max()))
      scored.append(float(off_T.max()))
  count, same = len(rows), (indices == expected[0]).all(-1).sum()
  limit = SCORE if score_dtype is None else SCORE_8_BITS
  yield contract.Finding("indices", count, wrong, 0.0, "lists out of order")
  yield contract.Finding(
    *("indices", count, max(errors), limit),
    f"a key left out over one taken ({int(same)} rows as the reference's)",
  )
  yield contract.Finding("scores", count, max(scored), limit, "of the largest")


def _judge(
  indices: Int[Array, "1 T K"],
  scores: Float[Array, "1 T K"],
  q_index: Float[Array, "1 T M I"],
  k_index: Float[Array, "1 S I"],
  w: Float[Array, "1 T M"],
  start: Int[Array, "1 T"],
  end: Int[Array, "1 T"],
  score_dtype: setting_lib.ScoreDType | None,
) -> tuple[Bool[Array, "1 T"], Float[Array, "1 T"], Float[Array, "1 T"]]:
  """Judges each query: a wrong list; errors of its keys and of its scores."""
  S, K = k_index.shape[1], indices.shape[2]
  true_BTS, largest_BT = _true_scores(q_index, k_index, w, score_dtype)
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


def _true_scores(
  q: Float[Array, "1 T M I"],
  k: Float[Array, "1 S I"],
  w: Float[Array, "1 T M"],
  score_dtype: setting_lib.ScoreDType | None,
) -> tuple[Float[Array, "1 T S"], Float[Array, "1 T"]]:
  """Scores in float32, and the largest of each query's without signs."""
  k_scale_BS = jnp.ones(k.shape[:2])
  if score_dtype is not None:
    (q, q_scale_BTM), (k, k_scale_BS) = fp8.quantize(q), fp8.quantize(k)
    w = w * q_scale_BTM
    # Else XLA may leave out a conversion to 8 bits and back.
    q, k = jax.lax.optimization_barrier((q, k))
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  relu = jax.nn.relu(contraction.einsum("BTMI,BSI->BTMS", q, k))
  relu = relu * k_scale_BS[:, None, None]
  scores_BTS = contraction.einsum("BTMS,BTM->BTS", relu, w)
  largest_BT = contraction.einsum("BTMS,BTM->BTS", relu, jnp.abs(w)).max(-1)
  return scores_BTS, jnp.maximum(largest_BT, jnp.finfo(jnp.float32).tiny)
