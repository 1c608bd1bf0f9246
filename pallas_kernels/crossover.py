"""Decides between sparse attention and dense attention with a mask.

Both compute the same attention to selected keys. `sparse_mla` reads K rows for
each query, `dense_mla` with `indices` all that the query sees: up to some
length, many pairs in wide products take less time than few in narrow ones.
"""

from typing import Final

from pallas_kernels import dispatch

# Visible pairs that dense_mla computes in the time of one selected pair of
# sparse_mla, forward and backward, by prefix of device_kind; the first match
# counts. A device that is not listed has no figure yet: there, attention is
# always sparse. N = 128, K = 2048, by the benchmark `crossover`:
#   H200  measured: 3.2, 3.6 and 4.1 at S = 4K, 8K and 24K; matters at 15K
#   H100  measured: 3.9 at 16K
#   TPUs  estimated, none was run: 5.5 to 5.7 at 8K, 6.1 to 6.3 at 32K, if 8
#         neighbouring queries select 2 K keys; matters at 22K
DENSE_PAIRS: Final[dict[str, float]] = {
  "NVIDIA H100": 3.8,
  "NVIDIA H200": 3.8,
  "TPU v5 lite": 0.0,  # no kernels
  "TPU v5": 5.5,
  "TPU v6": 5.5,
  "TPU7x": 5.5,
}

# Cost in a training step, at DeepSeek's widths, of expanding a latent to all
# heads' keys and values, 3 x 2 C (H+U), in pairs of 2 (4 (H+R) + 3 U) FLOPs a
# head.
EXPANSION: Final = 341.0


def dense_is_faster(T: int, S: int, K: int) -> bool:
  """Whether dense attention is faster for causal attention to selected keys.

  Args:
    T: Queries on a device, of a sequence of S.
    S: Keys of the sequence; a query sees half of them on average.
    K: Selected keys per query.
  """
  kind = dispatch.device_kind()
  pairs = next((x for k, x in DENSE_PAIRS.items() if kind.startswith(k)), 0.0)
  return T * S / 2 + EXPANSION * S < pairs * T * K
