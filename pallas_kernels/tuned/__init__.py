"""Tiles that were found best, by chip, op and shape: a table for each chip.

<chip>.json is {op: [{"shape": {"N": 128, "K": 2048}, "tiles": {"bQ": 8}}]}. An
entry is for every shape that has its numbers, whatever the others are; the
first that fits is taken. What no table has is left to the op's heuristic.
"""

import functools
from importlib import resources
import json
from typing import Any


def tiles(op: str, chip: str, **shape: int) -> dict[str, int] | None:
  """The tiles of an op for a shape on a chip; None if no entry fits.

  Args:
    op: The op's name.
    chip: As `tpu.Chip.name` has it. One without a table has no entries.
    **shape: Sizes by letter, at least those that the op's entries name.
  """
  for entry in _table(chip).get(op, []):
    if all(shape[letter] == size for letter, size in entry["shape"].items()):
      return dict(entry["tiles"])
  return None


@functools.cache
def _table(chip: str) -> dict[str, list[dict[str, Any]]]:
  file = resources.files(__name__) / f"{chip}.json"
  return json.loads(file.read_text("utf-8")) if file.is_file() else {}
