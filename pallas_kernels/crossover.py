"""Decides between forms of attention that compute the same.

Attention to selected keys is sparse, or dense with a mask. `sparse_mla` reads K
rows for each query, `dense_mla` with `indices` all that the query sees: up to
some length, many pairs in wide products take less time than few in narrow ones.

Dense attention to cached latents expands them to each head's keys and values,
or is absorbed: a pair then costs more, but a key nothing.
"""

from typing import Final

from pallas_kernels import devices
from pallas_kernels import dispatch

# Cost in a training step, at DeepSeek's widths, of expanding a latent to all
# heads' keys and values, 3 x 2 C (H+U), in pairs of 2 (4 (H+R) + 3 U) FLOPs a
# head.
EXPANSION: Final = 341.0
# FLOPs of a head at these widths, forward: of expanding a key's latent,
# 2 C (H+U), of a pair that is expanded, 2 (H+R) + 2 U, and of one that is
# absorbed, 2 (C+R) + 2 C.
_OF_A_KEY: Final = 262_144
_OF_A_PAIR: Final = 640
_OF_AN_ABSORBED_PAIR: Final = 2176


def dense_is_faster(T: int, S: int, K: int, *, cached: bool = False) -> bool:
  """Whether dense attention is faster for causal attention to selected keys.

  Never on a device of which `devices` has no `dense_pairs`.

  Args:
    T: Queries on a device, of a sequence of S.
    S: Keys of the sequence; a query sees half of them on average.
    K: Selected keys per query.
    cached: The queries are the last T of the S keys, the others are cached, and
      there is no backward pass. A query sees all keys but half of T on average.
  """
  device = devices.of(dispatch.device_kind())
  if device is None or device.dense_pairs is None:
    return False
  pairs, expansion = T * S / 2, EXPANSION
  if cached:
    pairs, expansion = T * (S - T / 2), _OF_A_KEY / _OF_A_PAIR
  return pairs + expansion * S < device.dense_pairs * T * K


def expanding_is_faster(T: int) -> bool:
  """Whether dense attention to cached latents is faster if it expands them.

  At DeepSeek's widths from 171 queries on. Each of them makes a pair with every
  key, as good as, where most of the keys are cached.

  Args:
    T: Queries of a sequence that are attended at once.
  """
  return T * (_OF_AN_ABSORBED_PAIR - _OF_A_PAIR) > _OF_A_KEY
