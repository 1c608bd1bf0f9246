"""What a workload of several ops asks of the benchmark that runs it.

It is a module of `workloads` with two functions:

  measure(runner: Runner) -> None
  estimate(estimator: Estimator) -> None
"""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pallas_kernels.cases import contract
from pallas_kernels.cases import setting as setting_lib


class Seconds(NamedTuple):
  forward: float
  both: float
  """Forward and backward together; 0 unless requested."""


@runtime_checkable
class Runner(Protocol):
  """Checks and times on the device that is there."""

  @property
  def setting(self) -> setting_lib.Setting: ...

  @property
  def grad(self) -> bool: ...

  def run(self, case: contract.Case) -> None:
    """Checks and times one op, beside another implementation."""
    ...

  def forward(self, case: contract.Case) -> Callable[..., Any]:
    """The op, as it is measured."""
    ...

  def cotangents(self, case: contract.Case) -> Any: ...

  def check(self, case: contract.Case, *, grad: bool = False) -> None:
    """Compares some queries, with `grad` also their gradients.

    Raises:
      Exception: A result is wrong, which ends the run.
    """
    ...

  def time(
    self, case: contract.Case, *, grad: bool = False, backward: bool = False
  ) -> Seconds:
    """Times the forward pass; with `grad` also forward and backward together,
    and then, with `backward`, the latter alone."""
    ...

  def time_together(
    self,
    what: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    flops: int,
    *,
    flops_8_bits: int = 0,
  ) -> float:
    """Times a program of several ops; returns seconds."""
    ...

  def ratio(self, what: str, value: float) -> None:
    """Reports a ratio of times."""
    ...


@runtime_checkable
class Estimator(Protocol):
  """Estimates for a TPU that is not there."""

  @property
  def setting(self) -> setting_lib.Setting: ...

  @property
  def grad(self) -> bool: ...

  def estimate(
    self, make: Callable[[], contract.Case], *, grad: bool = False
  ) -> float | None:
    """Estimates the forward pass, with `grad` also backward; in seconds, None
    if a kernel's is unknown."""
    ...

  def ratio(self, what: str, part: float | None, whole: float | None) -> None:
    """Reports part / whole."""
    ...


def total(seconds: Iterable[float | None]) -> float | None:
  """Sum of all; None if one is unknown, or there are none."""
  known = []
  for x in seconds:
    if x is None:
      return None
    known.append(x)
  return sum(known) if known else None
