"""How much each kind of collective of a compiled program moves."""

from collections.abc import Iterator
import dataclasses
import math
import re

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Moved:
  """One kind of collective, over a run of the program."""

  times: int
  """How often it runs."""
  bytes: int
  """Bytes of the results (a reduce-scatter: operands) on one device."""


@dataclasses.dataclass
class _Computation:
  lines: list[str]
  collectives: list[tuple[str, int]]
  calls: list[tuple[str, int]]  # name, times
  sizes: dict[str, int]  # of each instruction's first array


def moved(hlo: str) -> dict[str, Moved]:
  """Returns the traffic of each kind of collective; loops count every turn.

  A loop whose number of rounds is not a constant counts once; of a conditional,
  every branch.

  Args:
    hlo: The text of a compiled program; empty of none.
  """
  if not hlo:
    return {}
  computations, entry = _parse(hlo)
  total: dict[str, Moved] = {}
  for kind, size, times in _walk(computations, entry, 1):
    old = total.get(kind, Moved(0, 0))
    total[kind] = Moved(old.times + times, old.bytes + size * times)
  return total


def _walk(computations, name, times) -> Iterator[tuple[str, int, int]]:
  computation = computations[name]
  for kind, size in computation.collectives:
    yield kind, size, times
  for called, rounds in computation.calls:
    if called in computations:
      yield from _walk(computations, called, times * rounds)


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  entry, current = "", None
  for line in hlo.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations[head[2]] = _Computation([], [], [], {})
      entry = head[2] if head[1] else entry
    elif current is not None:
      current.lines.append(line)
  for computation in computations.values():
    for line in computation.lines:
      _read(line, computation, computations)
  return computations, entry


def _read(line, computation, computations) -> None:
  match = _INSTRUCTION.match(line)
  if not match:
    return
  name, text = match[1], match[2].split(", metadata=")[0]
  if first := _ARRAY.search(text):
    computation.sizes[name] = _bytes(*first.groups())
  for kind in KINDS:
    if f" {kind}(" in text or f" {kind}-start(" in text:
      shape = text.split(f" {kind}")[0]
      # A start's result holds its operands, too: the largest array counts.
      arrays = [_bytes(*array) for array in _ARRAY.findall(shape)]
      if kind == "ragged-all-to-all":
        # One side has room for all that could come, the other just what goes.
        rows = text.split("(", 1)[1] if "-start(" not in text else ""
        sent = computation.sizes.get((_NAME.findall(rows) or [""])[0])
        size = min(arrays[0], sent or arrays[1])
      elif "-start(" in text or kind == "collective-permute":
        size = max(arrays)
      else:
        size = sum(arrays)
      computation.collectives.append((kind, size))
  if " while(" in text:
    body = re.search(r"body=%?([\w.\-]+)", text)
    condition = re.search(r"condition=%?([\w.\-]+)", text)
    if body and condition:
      rounds = _rounds(computations[condition[1]].lines)
      computation.calls.append((body[1], rounds))
    return
  for called in re.findall(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", text
  ):
    computation.calls.append((called, 1))
  # Of a conditional; of what a SparseCore does on the side.
  several = re.search(r"(?:branch|called)_computations=\{([^}]*)\}", text)
  if several:
    computation.calls += [(x, 1) for x in _NAME.findall(several[1])]


def _rounds(condition: list[str]) -> int:
  """How often a loop runs that counts from 0 to a constant; 1 if it is none."""
  text = "\n".join(condition)
  constants = dict(
    re.findall(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", text)
  )
  compared = re.search(r"compare\(([^)]*)\), direction=LT", text)
  bounds = _NAME.findall(compared[1]) if compared else []
  return next((int(constants[x]) for x in bounds if x in constants), 1)


def _bytes(dtype: str, dims: str) -> int:
  bits = 8 if dtype == "pred" else int(_BITS.findall(dtype)[0])
  sizes = [int(x) for x in dims.split(",") if x]
  return math.prod(sizes) * bits // 8
