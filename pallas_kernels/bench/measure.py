"""Measures the time of calls, and the device's peaks."""

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


@dataclasses.dataclass(frozen=True)
class Peak:
  """Peaks of the device, as measured."""

  flops: float
  """Peak FLOP/s: a large bf16 matmul."""
  bytes: float
  """Peak bytes/s: a large copy, reads and writes together."""


def num_bytes(tree: Any) -> int:
  """Bytes of arrays, or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def run(function: Callable[..., Any], *args: Any) -> Any:
  """Runs one call to its end, compiling it if necessary."""
  return jax.jit(function)(*args)


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


def peak() -> Peak:
  """Measures both peaks with random numbers."""
  on_cpu = jax.default_backend() == "cpu"
  side, length = (256, 1 << 20) if on_cpu else (8192, 1 << 30)
  a, b = (
    jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16)
    for i in range(2)
  )
  matmul = measure(jax.jit(jnp.matmul), [(a, b)])
  x = jax.random.bits(jax.random.key(2), (length // 4,), jnp.uint32)
  copy = measure(jax.jit(lambda x: x ^ 1), [(x,)])
  return Peak(2 * side**3 / matmul.seconds, 2 * x.nbytes / copy.seconds)
