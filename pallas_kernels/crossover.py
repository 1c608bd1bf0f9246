"""Decides between sparse attention and dense attention with a mask.

Both compute the same attention to selected keys. `sparse_mla` reads K rows for
each query, `dense_mla` with `indices` all that the query sees: up to some
length, many pairs in wide products take less time than few in narrow ones.
"""

from typing import Final

from pallas_kernels import devices
from pallas_kernels import dispatch

# Cost in a training step, at DeepSeek's widths, of expanding a latent to all
# heads' keys and values, 3 x 2 C (H+U), in pairs of 2 (4 (H+R) + 3 U) FLOPs a
# head.
EXPANSION: Final = 341.0


def dense_is_faster(T: int, S: int, K: int) -> bool:
  """Whether dense attention is faster for causal attention to selected keys.

  Never on a device of which `devices` has no `dense_pairs`.

  Args:
    T: Queries on a device, of a sequence of S.
    S: Keys of the sequence; a query sees half of them on average.
    K: Selected keys per query.
  """
  device = devices.of(dispatch.device_kind())
  if device is None or device.dense_pairs is None:
    return False
  return T * S / 2 + EXPANSION * S < device.dense_pairs * T * K
