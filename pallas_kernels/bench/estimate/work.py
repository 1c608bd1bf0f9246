"""Work of a kernel: what its schedule issues, each block as often as counted.

Blocks are `schedule.Block`s in the order of the kernel's source. Where the
schedule has other blocks, the kernel has changed, and there is no estimate.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Final

from pallas_kernels.bench.estimate import schedule
from pallas_kernels.cases import counts as counts_lib

# A branch with no more bundles of its own around one loop is the loop's guard.
_GUARD: Final = 12
# A branch of fewer bundles is not distinguished from its surroundings.
_SMALL: Final = 20


class Unknown(ValueError):
  """Raised when a kernel differs from the one that was counted."""


@dataclasses.dataclass(frozen=True)
class Work:
  """Instructions that a kernel issues, over all cores."""

  cycles: int
  matmuls: int


def work(kernel: schedule.Block, counts: counts_lib.Counts) -> Work:
  """Counts bundles, each as often as it is issued.

  Raises:
    Unknown: The counts are for other blocks.
  """
  grid = next((x for _, x in kernel.walk() if x.kind == "loop"), None)
  if grid is None:
    raise Unknown("The schedule has no loop over a grid.")
  step = max(grid.inside, key=_size, default=None)
  left, total, matmuls = list(counts.blocks), 0, 0

  def times(block, around):
    if block is grid or block is step:
      return counts.steps
    if around == 0 or _is_guard(block) or any(x is grid for x in block.inside):
      return around
    if block.kind == "loop" and block.trips and not guarded[id(block)]:
      return around * block.trips
    if block.kind == "branch" and not _is_decisive(block):
      if any(x is block for x in grid.inside):
        return around  # fetches and writes of the grid
      return min(around, counts.ends) if _size(block) >= _SMALL else around
    if not left:
      raise Unknown(f"Nothing is known of the block at {block.first:#x}.")
    return left.pop(0)

  guarded = {
    id(inner): _is_guard(block) and block is not step
    for _, block in kernel.walk()
    for inner in block.inside
  }

  def visit(block, around):
    nonlocal total, matmuls
    own = block.own if not _is_guard(block) else 0
    total += own * around
    matmuls += block.units["matmul"] * around
    for inner in block.inside:
      visit(inner, times(inner, around))

  visit(kernel, 1)
  if left:
    raise Unknown(f"{len(left)} blocks are counted that are not there.")
  return Work(total, matmuls)


def counts(
  name: str, kernels: Mapping[str, counts_lib.Count], call: counts_lib.Call
) -> counts_lib.Counts | None:
  """Counts of a kernel by its name with tiles; None if it is unknown."""
  for kernel, count in kernels.items():
    if kernel in name:
      tiles = dict(re.findall(r"_([a-z])(\d+)", name))
      return count(call, *map(int, tiles.values()))
  return None


def _size(block: schedule.Block) -> int:
  return block.last - block.first + 1


def _is_guard(block: schedule.Block) -> bool:
  return (
    block.kind == "branch"
    and block.own <= _GUARD
    and [x.kind for x in block.inside] == ["loop"]
  )


def _is_decisive(block: schedule.Block) -> bool:
  return any(x.kind == "loop" or x.units["matmul"] for _, x in block.walk())
