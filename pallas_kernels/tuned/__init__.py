"""Tuned tile sizes by chip, op and shape, with one table per chip.

<chip>.json is {op: [{"shape": {"N": 128, "K": 2048}, "tiles": {"bQ": 8}}]}. An
entry applies to every shape with its sizes, whatever the others are; the first
match counts. Without a match the op uses its heuristic.
"""

import functools
from importlib import resources
import json
from typing import Any


def tiles(op: str, chip: str, **shape: int) -> dict[str, int] | None:
  """Looks up the tiles of an op for a shape on a chip; None without a match.

  Args:
    op: The op's name.
    chip: A `devices.Device.name`. A chip without a table has no entries.
    **shape: Sizes by letter, at least those in the op's entries.
  """
  for entry in _table(chip).get(op, []):
    if all(shape[letter] == size for letter, size in entry["shape"].items()):
      return dict(entry["tiles"])
  return None


@functools.cache
def _table(chip: str) -> dict[str, list[dict[str, Any]]]:
  file = resources.files(__name__) / f"{chip}.json"
  return json.loads(file.read_text("utf-8")) if file.is_file() else {}
