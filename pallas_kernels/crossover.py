"""Sparse attention, or dense attention with a mask? The one place to choose.

Both compute the same attention to chosen keys. `sparse_mla` reads K rows for
each query, `dense_mla` with `indices` all that the query sees: up to some
length, many pairs in wide products take less time than few in narrow ones.
"""

from typing import Final

from pallas_kernels import dispatch

# How many visible pairs dense_mla does in the time of one chosen pair of
# sparse_mla, forward and backward, by the start of a device's name; the first
# that fits. A device that is not here has no figure yet: there, attention is
# always sparse. N = 128, K = 2048, by the benchmark `crossover`:
#   H200  measured: 3.2, 3.6 and 4.1 at S = 4K, 8K and 24K; matters at 15K
#   H100  measured: 3.9 at 16K
#   TPUs  estimated, none was run: 5.5 to 5.7 at 8K, 6.1 to 6.3 at 32K, if 8
#         neighbouring queries choose 2 K keys; matters at 22K
DENSE_PAIRS: Final[dict[str, float]] = {
  "NVIDIA H100": 3.8,
  "NVIDIA H200": 3.8,
  "TPU v5 lite": 0.0,  # has no kernels
  "TPU v5": 5.5,
  "TPU v6": 5.5,
  "TPU7x": 5.5,
}

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
