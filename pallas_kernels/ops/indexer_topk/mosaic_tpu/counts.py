"""Counts of the kernel's blocks, for static estimates of its time."""

from collections.abc import Mapping
from typing import Final

from pallas_kernels.cases import counts

# Searches for the threshold of 32 rows of normally distributed scores:
# iterations in the sample, twice, and in all keys.
_TURNS: Final = 13, 13, 14


def select(call: counts.Call, bQ: int, bS: int) -> counts.Counts:
  shape = call.shape
  M, I = shape.M, shape.I
  nQ, nS = -(-shape.T // bQ), -(-shape.S // bS)
  seen, _ = counts.spans(call, bQ, bS)
  low, high, exact = _TURNS
  places = seen + nQ * shape.K // 128  # every tile, and every full register
  return counts.Counts(
    steps=nQ * nS,
    ends=nQ,
    blocks=(
      seen * bS // 512,
      nQ,
      *(nQ * low, seen * low),
      *(nQ * high, seen * high),
      *(nQ * exact, seen * exact),
      0,  # there are no ties
      *(seen, places),
    ),
    bytes=2 * seen * bS * I + nQ * bQ * (2 * M * I + 4 * shape.K),
  )


KERNELS: Final[Mapping[str, counts.Count]] = {"indexer_topk": select}
