"""Public entry point: selects an implementation."""

from typing import Final, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels import operands
from pallas_kernels.ops.indexer_topk import chunked_xla
from pallas_kernels.ops.indexer_topk import reference
from pallas_kernels.ops.indexer_topk.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.ops.indexer_topk.mosaic_tpu import op as mosaic_tpu

IMPLEMENTATIONS: Final = {
  "mosaic_tpu": mosaic_tpu.indexer_topk,
  "mosaic_gpu": mosaic_gpu.indexer_topk,
  "chunked_xla": chunked_xla.indexer_topk,
  "reference": reference.indexer_topk,
}


def indexer_topk(
  index: operands.Index,
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  top_k: int,
  *,
  pages: Int[Array, "B P"] | None = None,
  score_dtype: Literal["float8_e4m3fn"] | None = None,
  implementation: dispatch.Implementation | None = None,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
  """Selects the `top_k` keys of highest index score for each query.

  Products and sums of the scores are in fp32. Ties go to the lowest key. The
  result is the same for every tiling, wherever pages lie, with and without jit,
  grad and remat, up to scores that differ by no more than the matmul's
  rounding. It has no gradient: the loss recomputes the scores.

  Memory: O(T K) and one tile of queries x S, except for `reference`; that of
  `chunked_xla` is of some thousands of keys at most. `mosaic_tpu` also copies
  keys that lie in pages.

  Args:
    index: Factors of the scores. Keys may be in 8 bits already, with their
      scales (`k_scale`): then the products are, too, as with `score_dtype`, and
      only queries are rotated and rounded here.
    start: First key that each query sees.
    end: One past the last key it sees; with `start >= end` it sees none.
    top_k: K, at least 1; may exceed S.
    pages: Each row's pages in order, in a pool [pages, page, I] that `index.k`
      then is: key s is `index.k[pages[b, s // page], s % page]`, and S is P
      page. Rows may share pages. A number is not used, and may be any, if no
      query of the row sees a key of that page. `None`: `index.k` has each row's
      keys.
    score_dtype: Dtype of queries and keys in their product; `None` keeps their
      own. In 8 bits they are rotated and scaled first, as in DeepSeek-V3.2
      (`fp8.quantize`; I must be a power of 2): Hopper's tensor cores are twice
      as fast, and the scores a few percent off. The same for every
      implementation.
    implementation: A name; `None` takes the fastest, see `dispatch.call`.

  Returns:
    Indices below S, int32, ascending, padded with -1 at the end where a query
    sees fewer than K keys; and their scores, fp32, -inf there.

  Raises:
    ValueError: `top_k` is below 1; or keys are in 8 bits without their scales,
      or have scales, but more bits.
  """
  if top_k < 1:
    raise ValueError(f"indexer_topk: {top_k=} must be at least 1.")
  if (index.k.dtype == jnp.float8_e4m3fn) != (index.k_scale is not None):
    given = "no k_scale" if index.k_scale is None else "k_scale"
    raise ValueError(
      f"indexer_topk: index.k.dtype={index.k.dtype} with {given}: keys in 8 "
      "bits come with their scales, and others without; give both results of "
      "fp8.quantize."
    )
  if index.k_scale is not None:
    score_dtype = "float8_e4m3fn"
  args = index, start, end, top_k
  return dispatch.call(
    "indexer_topk",
    IMPLEMENTATIONS,
    implementation,
    *args,
    pages=pages,
    score_dtype=score_dtype,
  )
