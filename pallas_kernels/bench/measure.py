"""Time of calls on the device, and what the device can do at best."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import statistics
import time
from typing import Any, Final

import jax
import jax.numpy as jnp

# A batch of back-to-back calls is waited for once: long enough to hide that.
_BATCH_SECONDS: Final = 0.05
_ALL_SECONDS: Final = 0.5
_MOST_CALLS, _FEWEST_BATCHES, _MOST_BATCHES = 50, 3, 9
# Above the second-level cache of any GPU so far, twice.
_CACHE_BYTES: Final = 256 << 20
_MOST_COPIES: Final = 16


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds a call, over batches of `calls`."""

  seconds: float
  """The median."""
  lowest: float
  highest: float
  batches: int
  calls: int


@dataclasses.dataclass(frozen=True)
class Peak:
  """What the device reaches here and now."""

  flops: float
  """FLOP/s of a large bf16 matmul."""
  bytes: float
  """Bytes/s of a large copy, reads and writes together."""


def num_bytes(tree: Any) -> int:
  """Of arrays, or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def run(function: Callable[..., Any], *args: Any) -> Any:
  """One call, compiled if it was not before."""
  return jax.jit(function)(*args)


def copies(arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
  """The arguments, as often as none of them is in a cache when it is next."""
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

  run(len(arguments))  # loads the program, and wakes the device up
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
  """Measures both: a matmul and a copy, of random numbers."""
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
