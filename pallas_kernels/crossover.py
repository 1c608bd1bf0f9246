"""Sparse attention, or dense attention with a mask? The one place to choose.

Both compute the same attention to chosen keys. `sparse_mla` reads K rows for
each query, `dense_mla` with `indices` all that the query sees: up to some
length, many pairs in wide products take less time than few in narrow ones.
"""

from typing import Final

from pallas_kernels import dispatch

# How many visible pairs dense_mla does in the time of one chosen pair of
# sparse_mla, forward and backward, by the start of a device's name. A device
# that is not here has no figure yet: there, attention is always sparse. On an
# H200 3.2, 3.6 and 4.1 at S = 4K, 8K and 24K, on an H100 3.9 at 16K (N = 128,
# K = 2048, by the benchmark `crossover`); it matters at about 15K.
DENSE_PAIRS: Final[dict[str, float]] = {"NVIDIA H100": 3.8, "NVIDIA H200": 3.8}

# Of a training step, with DeepSeek's widths: making all heads' keys and values
# of one latent, 3 x 2 C (H+U), in pairs of 2 (4 (H+R) + 3 U) FLOPs a head.
EXPANSION: Final = 341.0


def dense_is_faster(T: int, S: int, K: int) -> bool:
  """Whether a device should do causal attention to chosen keys densely.

  Args:
    T: Its queries, of a sequence of S.
    S: The keys of the sequence; a query sees half of them, on an average.
    K: The keys chosen for each.
  """
  kind = dispatch.device_kind()
  pairs = next((x for k, x in DENSE_PAIRS.items() if kind.startswith(k)), 0.0)
  return T * S / 2 + EXPANSION * S < pairs * T * K
