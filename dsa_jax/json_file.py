"""JSON that others made: an object, or a line that says why it is none."""

import collections
import json
import math
import pathlib
import re
from typing import Any, Final

from dsa_jax import ranges
from dsa_jax import regular_file

_MAX_BYTES: Final = 2**24  # the index of the 671B model has half as many
# The largest tokenizer.json has half as many; more take seconds.
_MAX_VALUES: Final = 2**22
_MAX_DEPTH: Final = 32  # of objects and lists within each other
_SHOWN: Final = 80  # characters of a key that an error shows
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_MAX_DIGITS: Final = 300  # a float holds a number of as many


def read(file: pathlib.Path, most: int = _MAX_BYTES) -> dict[str, Any]:
  """The object in a file of at most so many bytes.

  Raises:
    ValueError: It is none, is too large, or is no regular file; names the file.
    OSError: It is missing or unreadable.
  """
  return parse(regular_file.read(file, most), str(file))


def parse(raw: bytes, source: str) -> dict[str, Any]:
  """The object that `raw` spells, in UTF-8.

  A byte order mark is no harm. What JSON does not have is refused, a key that
  stands twice, a number that is infinite or none, and half a character; and so
  is what is nested very deeply, or has millions of values.

  Raises:
    ValueError: It is none; begins with `source`.
  """
  if not raw.strip():
    raise ValueError(f"{source} is empty.")
  # One of these precedes each value, but for a few in text.
  if sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_VALUES:
    raise ValueError(f"{source} has more than {_MAX_VALUES:,} values.")
  try:
    value = json.loads(
      raw.decode("utf-8-sig"),
      object_pairs_hook=_object,
      parse_int=lambda x: int(x) if len(x) <= _MAX_DIGITS else math.inf,
    )
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{source} is no JSON: {e}.") from e
  if not isinstance(value, dict):
    raise ValueError(f"{source} is no JSON object.")
  if wrong := _wrong(value, _MAX_DEPTH):
    *keys, what = wrong
    raise ValueError(f"{source}: {dotted(keys)} {what}.")
  return value


def dotted(keys: list[str]) -> str:
  """The place of a value, on one line however odd its keys are: a.b.c."""
  text = json.dumps(".".join(keys))[1:-1]
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    [(twice, _)] = collections.Counter(k for k, _ in pairs).most_common(1)
    raise ValueError(f"the key {ranges.shown(twice)} stands twice")
  return found


def _wrong(value: Any, depth: int) -> list[str]:
  """The keys of a value that is refused, and why it is; [] if none is."""
  if isinstance(value, float) and not math.isfinite(value):
    return [f"is no finite number of at most {_MAX_DIGITS} digits"]
  if isinstance(value, str) and _SURROGATE.search(value):
    return ["has half of a surrogate pair, which is no character"]
  if not isinstance(value, (dict, list)):
    return []
  if not depth:
    return [f"lies within more than {_MAX_DEPTH} objects and lists"]
  pairs = value.items() if isinstance(value, dict) else enumerate(value)
  for key, x in pairs:
    # Most are none of these, or empty: a call for each would take seconds.
    named = isinstance(key, str) and _wrong(key, 0)
    if wrong := named or (x and type(x) is not int and _wrong(x, depth - 1)):
      return [str(key), *wrong]
  return []
