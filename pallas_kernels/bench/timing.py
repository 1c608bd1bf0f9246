"""Times of calls, waited for in batches."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import statistics
import time
from typing import Any, Final

import jax
import jax.numpy as jnp

# A batch of back-to-back calls is waited for once, and long enough to hide it.
_BATCH_SECONDS: Final = 0.05
_ALL_SECONDS: Final = 0.5
_MOST_CALLS, _FEWEST_BATCHES, _MOST_BATCHES = 50, 3, 9
# More than twice the L2 cache of any GPU so far.
_CACHE_BYTES: Final = 256 << 20
_MOST_COPIES: Final = 16


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per call, over batches of `calls`."""

  seconds: float
  """Median seconds per call."""
  lowest: float
  highest: float
  batches: int
  calls: int


def num_bytes(tree: Any) -> int:
  """Bytes of arrays, or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def copies(arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
  """Copies the arguments often enough that each is out of cache when used."""
  if jax.default_backend() == "cpu":
    return [arguments]
  count = min(-(-_CACHE_BYTES // num_bytes(arguments)), _MOST_COPIES)
  others = (jax.tree.map(jnp.copy, arguments) for _ in range(count - 1))
  return [arguments, *others]


def measure(
  function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
) -> Timing:
  """Times a compiled function on each of the arguments in turn."""

  def run(calls: int) -> float:
    result, start = None, time.perf_counter()
    for i in range(calls):
      result = None  # its memory is for the next one
      result = function(*arguments[i % len(arguments)])
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls

  run(len(arguments))  # loads the program and wakes the device
  first = max(run(1), 1e-6)
  calls = min(max(round(_BATCH_SECONDS / first), 1), _MOST_CALLS)
  batches = round(_ALL_SECONDS / (first * calls))
  batches = min(max(batches, _FEWEST_BATCHES), _MOST_BATCHES)
  # One call of half a batch or more is a batch.
  times = [first if calls == 1 else run(calls)]
  times += [run(calls) for _ in range(batches - 1)]
  return Timing(
    statistics.median(times), min(times), max(times), batches, calls
  )
