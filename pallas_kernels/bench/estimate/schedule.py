"""Parses the TPU compiler's schedule of a kernel, bundle by bundle.

A bundle holds the instructions that a core issues in one cycle. The compiler
writes the final bundles of each kernel into a folder if libtpu is loaded with
`DUMP`; loops and the targets of branches can be parsed from them. Cycles are
thus counts of bundles, each as often as it is issued: known from a loop's
bounds where these are constants; otherwise given by the caller.

Not covered: waiting for copies (of inputs, outputs, rows), memory and its
contention, and time between kernels. A static count is a lower bound of a
core's time, and no measurement.
"""

import collections
from collections.abc import Iterator
import dataclasses
import pathlib
import re
from typing import Final

DUMP: Final = (
  "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
  "--xla_jf_dump_llo_pass_label_regex=final_bundles"
)
_SUFFIX: Final = "-final_bundles.txt"
# A line of a bundle: address, label, a ">" for each loop around it.
_LINE: Final = re.compile(
  r"^\s*(0x[0-9a-f]+|0)\s+(LB|PF|LH|LE|PB|CT)?\s*: ((?:> ?|>)*)\s*\{(.*)$"
)
_STARTS: Final = re.compile(r"(?:Start|empty) region (\d+)")
_BRANCH: Final = re.compile(r"sbr\.rel (?:\(([^)]*)\) )?target = \$region(\d+)")
# Bundles after a branch that are issued before it is taken, where there is no
# loop that shows how many.
_DELAY: Final = 4
# Units to count in a bundle, by prefix of an instruction's name.
_UNITS: Final = {
  "matmul": re.compile(r"\bvmatmul\."),
  "push": re.compile(r"\bvmatpush\d?\."),
  "copy": re.compile(r"\bdma\.\w+"),
  "vector": re.compile(r"%v\d+(?:_v\d+)? = v(?!ld|pop|matpush|matmul)[a-z]"),
}


@dataclasses.dataclass
class Block:
  """Consecutive bundles: a kernel, a loop's body, or a skipped branch.

  Bundles of the blocks inside are not counted as its own.
  """

  kind: str
  """Either kernel, loop or branch."""
  first: int
  last: int
  trips: int | None = None
  """Number of iterations of a loop with constant bounds."""
  own: int = 0
  units: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  """Instructions of its own bundles."""
  inside: list["Block"] = dataclasses.field(default_factory=list)

  def walk(self, depth: int = 0) -> Iterator[tuple[int, "Block"]]:
    """Yields this block and all inside it, in order, with their depths."""
    yield depth, self
    for block in self.inside:
      yield from block.walk(depth + 1)


def dumped(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Finds the newest file of final bundles of each kernel in a folder."""
  files = sorted(
    x for x in folder.glob(f"*{_SUFFIX}") if "schedule-analysis" not in x.name
  )
  return {_name(x): x for x in files}


def _name(file: pathlib.Path) -> str:
  """TIME-NAME-NUMBER-final_bundles.txt -> NAME"""
  return file.name.removesuffix(_SUFFIX).partition("-")[2].rpartition("-")[0]


def parse(text: str) -> Block:
  """Parses a kernel's final bundles."""
  rows = []
  for line in text.splitlines():
    if match := _LINE.match(line):
      address, label, depth, body = match.groups()
      # An empty bundle does not say what loops are around: those of the last.
      empty = body.startswith("}")
      depth = rows[-1][2] if empty and rows else depth.count(">")
      rows.append((int(address, 16), label, depth, body))
  if not rows or [x[0] for x in rows] != [*range(len(rows))]:
    raise ValueError(
      f"These are {len(rows)} bundles that are not numbered from 0 on; is this "
      "a file of final bundles, whole?"
    )
  starts = {
    int(region): address
    for address, _, _, body in reversed(rows)
    for region in _STARTS.findall(body)
  }
  branches = [
    (address, starts[int(region)], predicate.lstrip("!"))
    for address, _, _, body in rows
    for predicate, region in _BRANCH.findall(body)
    if int(region) in starts
  ]
  delay = _delay(rows, branches)
  blocks = []
  for address, target, predicate in branches:
    if target <= address:
      loop = Block("loop", target, address + delay)
      loop.trips = _trips(rows, address, predicate)
      blocks.append(loop)
    else:
      first = address + 1
      while first <= address + delay and not rows[first][1]:
        first += 1
      if first < target:
        blocks.append(Block("branch", first, target - 1))
  kernel = Block("kernel", 0, len(rows) - 1)
  _nest(kernel, blocks)
  _count(kernel, rows)
  return kernel


def _delay(rows, branches) -> int:
  """Bundles after a branch that are issued before it is taken.

  They are the last ones of a loop: at most as many as there are until another
  branch, a label, or where fewer loops are around.
  """

  def ends(at, depth):
    _, label, around, body = rows[at]
    return label or around < depth or _BRANCH.search(body)

  found = []
  for address, target, _ in branches:
    if target <= address:
      after = range(address + 1, len(rows))
      depth = rows[address][2]
      end = next((x for x in after if ends(x, depth)), len(rows))
      found.append(end - 1 - address)
  return min(found, default=_DELAY)


def _trips(rows, address: int, predicate: str) -> int | None:
  """Iterations of the loop that ends here, if its bounds are constants."""
  text = "\n".join(x[3] for x in rows[: address + 1])
  test = re.findall(
    re.escape(predicate) + r" = scmp\.ge\.s32\.totalorder "
    r"(%s\w+), (\d+)\b",
    text,
  )
  if not test:
    return None
  counter, limit = re.escape(test[-1][0]), int(test[-1][1])
  step = re.search(rf"{counter} = sadd\.s32 (\d+), ", text)
  begin = re.search(rf" = sphi (%s\w+), {counter}\b", text)
  if step is None or begin is None:
    return None
  begin = re.search(
    re.escape(begin[1]) + r" = smov\.u32 (?:\([^)]*\), )?(\d+)\b", text
  )
  if begin is None:
    return None
  return -(-(limit - int(begin[1])) // int(step[1]))


def _nest(kernel: Block, blocks: list[Block]) -> None:
  """Puts each block into the smallest one that contains it."""
  stack = [kernel]
  order = lambda x: (x.first, -x.last, x.kind)  # a branch is around a loop
  for block in sorted(blocks, key=order):
    while block.first > stack[-1].last:
      stack.pop()
    # A branch out of a loop ends with the loop.
    block.last = min(block.last, stack[-1].last)
    stack[-1].inside.append(block)
    stack.append(block)


def _count(block: Block, rows) -> None:
  own = set(range(block.first, block.last + 1))
  for inner in block.inside:
    own -= set(range(inner.first, inner.last + 1))
    _count(inner, rows)
  block.own = len(own)
  for address in own:
    for unit, pattern in _UNITS.items():
      block.units[unit] += len(pattern.findall(rows[address][3]))
