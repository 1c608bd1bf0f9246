"""Ranges of config fields, stated in their types and checked in one way.

A field says what it may be, and how large: `steps: Annotated[int,
ranges.Interval(1, 100)]`, `Literal["a", "b"]`, `tuple[Stage, ...]`, or one of
these `| None`; a config's `__post_init__` calls `check`. What a field does not
name is refused: True is no number, 2.0 no whole one, and NaN and infinity are
in no range.
"""

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, Final, Literal, Protocol, runtime_checkable

import numpy as np

_SHOWN: Final = 80  # characters of a value that an error shows


@runtime_checkable
class Range(Protocol):
  """A set of values: `in` tests for it, `str` completes "must be"."""

  def __contains__(self, value: Any) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Interval:
  """Numbers from `least` to `most`, without the ends that are `open`.

  A number that fp32 cannot tell from an open end is left out with it: it would
  become 1, or 0, on the device.
  """

  least: int | float
  most: int | float
  open: Literal["", "low", "high", "both"] = ""

  def __contains__(self, value: int | float) -> bool:
    if not self.least <= value <= self.most:
      return False
    ends = [self.least] * (self.open in ("low", "both"))
    ends += [self.most] * (self.open in ("high", "both"))
    return all(_in_fp32(value) != _in_fp32(end) for end in ends)

  def __str__(self) -> str:
    low = "above" if self.open in ("low", "both") else "at least"
    high = "below" if self.open in ("high", "both") else "at most"
    return f"{low} {self.least} and {high} {self.most}"


@dataclasses.dataclass(frozen=True)
class Length:
  """Texts of so many characters, or tuples of so many entries."""

  least: int
  most: int
  of: Literal["characters", "entries"] = "characters"

  def __contains__(self, value: str | tuple[Any, ...]) -> bool:
    return self.least <= len(value) <= self.most

  def __str__(self) -> str:
    return f"{self.least} to {self.most} {self.of} long"


# Steps are counted in int32; 2^32 would be the seed 0 again.
Count = Annotated[int, Interval(1, 2**31 - 1)]
Index = Annotated[int, Interval(0, 2**31 - 1)]
Seed = Annotated[int, Interval(0, 2**32 - 1)]
Positive = Annotated[float, Interval(0, 1e9, open="low")]
Weight = Annotated[float, Interval(0, 1000)]
Fraction = Annotated[float, Interval(0, 1)]
Text = Annotated[str, Length(1, 4096)]


def check(config: Any, error: type[Exception] = ValueError) -> None:
  """Raises `error` for the first field that is not what its type says.

  Args:
    config: A dataclass whose fields have types that `violation` knows.
    error: The exception to raise; its text names the field, the value and the
      range.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if wrong := violation(type(config), field.name, value):
      raise error(f"{field.name}={shown(value)} {wrong}.")


def require(name: str, value: Any, kind: Any) -> None:
  """Raises a ValueError if an argument's value is not what `kind` says."""
  if wanted := _wanted(kind, value):
    raise ValueError(f"{name}={shown(value)} must be {wanted}.")


def violation(cls: type[Any], name: str, value: Any) -> str | None:
  """Why a value cannot be that of a dataclass's field: "must be above 0"."""
  kinds = {field.name: field.type for field in dataclasses.fields(cls)}
  wanted = _wanted(kinds[name], value)
  return None if wanted is None else f"must be {wanted}"


def shown(value: Any) -> str:
  """A value as an error shows it: on one line, and not too long."""
  if isinstance(value, int) and value.bit_length() > 64:
    return f"{'-' if value < 0 else ''}2^{value.bit_length() - 1} or more"
  text = repr(value).replace("\n", " ")
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _wanted(kind: Any, value: Any) -> str | None:
  """What a value of this kind must be, unless `value` is one."""
  if isinstance(kind, typing.TypeAliasType):
    return _wanted(kind.__value__, value)
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if origin is Annotated:
    ranges = [x for x in kind.__metadata__ if isinstance(x, Range)]
    outside = (str(allowed) for allowed in ranges if value not in allowed)
    return _wanted(parts[0], value) or next(outside, None)
  if origin is Literal:
    found = any(type(value) is type(x) and value == x for x in parts)
    shown = (f'"{x}"' if isinstance(x, str) else str(x) for x in parts)
    return None if found else " or ".join(shown)
  if origin in (typing.Union, types.UnionType):
    wanted = [_wanted(part, value) for part in parts]
    known = [x for x in wanted if x is not None]
    return ", or ".join(known) if len(known) == len(wanted) else None
  if origin is tuple:
    return _wanted_of_tuple(parts[0], value)
  return _wanted_of_class(kind, value)


def _wanted_of_tuple(part: Any, value: Any) -> str | None:
  if not isinstance(value, tuple):
    return "a tuple"
  for i, entry in enumerate(value):
    if wanted := _wanted(part, entry):
      return f"a tuple of {wanted}; its entry {i} is {shown(entry)}"
  return None


def _wanted_of_class(kind: Any, value: Any) -> str | None:
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if kind is int:
    return None if number and isinstance(value, int) else "a whole number"
  if kind is float:
    # An int may be too large for a float; then no range has it.
    return None if number and _is_finite(value) else "a finite number"
  if kind is str:
    return None if _is_text(value) else "text, in UTF-8 and without NUL"
  if kind is bool:
    return None if isinstance(value, bool) else "True or False"
  if isinstance(value, kind):
    return None
  return "None" if kind is types.NoneType else f"a {kind.__name__}"


def _is_finite(value: int | float) -> bool:
  return isinstance(value, int) or math.isfinite(value)


def _is_text(value: Any) -> bool:
  if not isinstance(value, str) or "\0" in value:
    return False
  try:
    value.encode()
  except UnicodeEncodeError:  # half of a surrogate pair
    return False
  return True


def _in_fp32(value: int | float) -> float:
  """The number that a device computes with; those below its least are 0."""
  rounded = float(np.float32(value))
  return rounded if abs(rounded) >= np.finfo(np.float32).tiny else 0.0
