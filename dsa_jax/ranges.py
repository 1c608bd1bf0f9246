"""Ranges of config fields, stated in their types and checked in one way.

A field says what it may be: `steps: Annotated[int, ranges.AtLeast(1)]`; a
config's `__post_init__` calls `check`. Of `Annotated[int, ...] | None`, None is
allowed.
"""

import dataclasses
import typing
from typing import Annotated, Any, Protocol, runtime_checkable


@runtime_checkable
class Range(Protocol):
  """A set of numbers: `in` tests for it, `str` completes "must be"."""

  def __contains__(self, value: int | float) -> bool: ...


@dataclasses.dataclass(frozen=True)
class AtLeast:
  """Numbers from `least` on."""

  least: int | float

  def __contains__(self, value: int | float) -> bool:
    return value >= self.least

  def __str__(self) -> str:
    return f"at least {self.least}"


@dataclasses.dataclass(frozen=True)
class Above:
  """Numbers greater than `bound`."""

  bound: int | float

  def __contains__(self, value: int | float) -> bool:
    return value > self.bound

  def __str__(self) -> str:
    return f"above {self.bound}"


@dataclasses.dataclass(frozen=True)
class Between:
  """Numbers from `least` to `most`, both included."""

  least: int | float
  most: int | float

  def __contains__(self, value: int | float) -> bool:
    return self.least <= value <= self.most

  def __str__(self) -> str:
    return f"in {self.least}..{self.most}"


Count = Annotated[int, AtLeast(1)]
NonNegative = Annotated[float, AtLeast(0)]
Positive = Annotated[float, Above(0)]
Fraction = Annotated[float, Between(0, 1)]


def check(config: Any, prefix: str = "", error: type[Exception] = ValueError):
  """Raises `error` for the first field of a dataclass outside its range.

  Args:
    config: A dataclass whose fields may be `Annotated` with ranges.
    prefix: The path of the config on the command line, such as "guard.".
    error: The exception to raise; its text names the field, the value and the
      range.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value is None:
      continue
    for allowed in _ranges(field.type):
      if value not in allowed:
        raise error(f"{prefix}{field.name}={value} must be {allowed}.")


def _ranges(kind: Any) -> list[Range]:
  """Ranges in an annotation, also inside `... | None`."""
  if typing.get_origin(kind) is Annotated:
    return [x for x in kind.__metadata__ if isinstance(x, Range)]
  return [found for part in typing.get_args(kind) for found in _ranges(part)]
