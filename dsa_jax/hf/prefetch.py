"""Prefetching: threads work a few items ahead of where results are used."""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent import futures
import os

# Reading, turning and casting release the interpreter for most of their time;
# twice as many threads as cores, since some wait for the disk.
_THREADS = min(16, 2 * (os.cpu_count() or 1))


def prefetch[T, R](work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
  """`map(work, items)`, in order, with a few results waiting at most."""
  pending: collections.deque[futures.Future[R]] = collections.deque()
  with futures.ThreadPoolExecutor(_THREADS) as threads:
    try:
      for item in items:
        pending.append(threads.submit(work, item))
        if len(pending) > _THREADS:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      for later in pending:
        later.cancel()
