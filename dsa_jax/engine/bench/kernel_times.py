"""What the device itself says of its time, by the profiler."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import pathlib
import tempfile
from typing import Any, Final

import jax

_CALLS: Final = 5


def kernel_times(
  function: Callable[..., object], arguments: Sequence[tuple[Any, ...]]
) -> dict[str, float]:
  """Microseconds a call of each kernel that a GPU ran, longest first.

  Args:
    function: What was compiled before.
    arguments: Of calls, which are made in turn.

  Returns:
    By name, kernels of one name together; nothing without a GPU.
  """
  if jax.default_backend() != "gpu":
    return {}
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for i in range(_CALLS):
        jax.block_until_ready(function(*arguments[i % len(arguments)]))
    file = next(pathlib.Path(folder).rglob("*.xplane.pb"))
    data = jax.profiler.ProfileData.from_file(str(file))
    return sums(data.planes, _CALLS)


def sums(planes: Iterable[Any], calls: int) -> dict[str, float]:
  """The same of a profile's planes, over so many calls."""
  found: dict[str, float] = {}
  for plane in planes:
    for line in plane.lines if "GPU" in plane.name else ():
      for event in line.events if "Stream" in line.name else ():
        us = event.duration_ns / calls / 1e3
        found[event.name] = found.get(event.name, 0.0) + us
  longest_first = sorted(found.items(), key=lambda x: -x[1])
  return {name: round(us, 2) for name, us in longest_first}
