"""Rows of results, and what ends a mode that finds a wrong one."""

from collections.abc import Callable
import json
import time

import jax


class Wrong(Exception):
  """A result is not what it must be."""


def say(**row: object) -> None:
  """Prints a row, a line of JSON."""
  print(json.dumps(row, default=str), flush=True)


def timed(run: Callable[[], object], times: int = 5) -> float:
  """Median seconds, after a first run that is not counted."""
  jax.block_until_ready(run())
  seconds = []
  for _ in range(times):
    begin = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - begin)
  return sorted(seconds)[times // 2]
