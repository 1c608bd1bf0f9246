"""Public entry point: selects an implementation."""

from typing import Final

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.ops.dense_mla import chunked_xla
from pallas_kernels.ops.dense_mla import reference
from pallas_kernels.ops.dense_mla.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.ops.dense_mla.mosaic_tpu import op as mosaic_tpu

IMPLEMENTATIONS: Final = {
  "mosaic_tpu": mosaic_tpu.dense_mla,
  "mosaic_gpu": mosaic_gpu.dense_mla,
  "chunked_xla": chunked_xla.dense_mla,
  "reference": reference.dense_mla,
}


def dense_mla(
  q: Float[Array, "B T N HR"],
  k: Float[Array, "B S N HR"],
  v: Float[Array, "B S N U"],
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  scale: float,
  indices: Int[Array, "B T K"] | None = None,
  *,
  implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
  """Attention of each query to the keys in [start, end), in expanded MLA form.

  Softmax and accumulation in fp32. Differentiable in `q`, `k` and `v`, through
  both results. Memory is O(T + S) and one tile of queries x keys, and
  T x S bits with `indices`; except for `reference`.

  Args:
    q: Queries `[q_nope; q_rope]`, H+R wide.
    k: Keys `[c Wuk; kr]` of each head.
    v: Values `c Wuv` of each head.
    start: First key that each query sees.
    end: One past the last key it sees; with `start >= end` it sees none.
    scale: Multiplies the logits: (H+R)^-1/2 m^2.
    indices: If given, only these keys of [start, end) are read. Each may occur
      once; entries outside [0, S) are ignored, at any position. The work is
      still that of all keys in the range: `crossover` says when that is less
      than `sparse_mla`'s.
    implementation: A name; `None` takes the fastest, see `dispatch.call`.

  Returns:
    The output in q's dtype, and the logsumexp (natural, fp32) of the scaled
    logits. A query that sees no key gives 0 and -inf.
  """
  args = q, k, v, start, end, scale, indices
  return dispatch.call("dense_mla", IMPLEMENTATIONS, implementation, *args)
