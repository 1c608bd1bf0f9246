"""Execution counts of the parts of a kernel's schedule, from its inputs.

The compiler's bundles give the cost of a loop iteration, but not the number of
iterations, which depends on data. It is given here for each kernel, for the
blocks of `bundles.Block` in the order of its source. Where the schedule has
other blocks, the kernel has changed, and there is no estimate.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import Final

import numpy as np

from pallas_kernels import shapes
from pallas_kernels.bench import cases
from pallas_kernels.bench.estimate import bundles
from pallas_kernels.ops.sparse_indexer_loss.mosaic_tpu import op as sparse_loss
from pallas_kernels.tpu import heads

# A branch with no more bundles of its own around one loop is the loop's guard.
_GUARD: Final = 12
# A branch of fewer bundles is not distinguished from its surroundings.
_SMALL: Final = 20
# Searches of indexer_topk for the threshold of 32 rows of normally distributed
# scores: iterations in the sample, twice, and in all keys.
_TURNS: Final = 13, 13, 14


class Unknown(ValueError):
  """Raised when a kernel differs from the one that was counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """Counts of one call, over all cores."""

  steps: int
  """Steps of the grid."""
  ends: int
  """Runs of the prologue or epilogue of a loop over keys: branches without a
  loop or a product."""
  blocks: tuple[int, ...]
  """Iterations of the loops, and runs of the other branches, in order.

  The grid's loop, branches that are a whole step, loops with constant bounds,
  and anything in a block that never runs are left out.
  """
  bytes: int
  """Bytes copied from and to HBM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """Parameters of the counts."""

  shape: shapes.Shape
  visible: cases.Visible
  union: float | None
  """Keys that a block of neighbouring queries reads, over K; None: they have
  none in common."""
  cores: int = 1
  """Cores of the device."""


@dataclasses.dataclass(frozen=True)
class Work:
  """Instructions that a kernel issues, over all cores."""

  cycles: int
  matmuls: int


def work(kernel: bundles.Block, counts: Counts) -> Work:
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


def _size(block: bundles.Block) -> int:
  return block.last - block.first + 1


def _is_guard(block: bundles.Block) -> bool:
  return (
    block.kind == "branch"
    and block.own <= _GUARD
    and [x.kind for x in block.inside] == ["loop"]
  )


def _is_decisive(block: bundles.Block) -> bool:
  return any(x.kind == "loop" or x.units["matmul"] for _, x in block.walk())


def counts(name: str, call: Call) -> Counts | None:
  """Counts of a kernel by its name with tiles; None if it is unknown."""
  for prefix, count in _KERNELS.items():
    if prefix in name:
      tiles = dict(re.findall(r"_([a-z])(\d+)", name))
      return count(call, *map(int, tiles.values()))
  return None


def _spans(call: Call, rows: int, keys: int) -> tuple[int, int]:
  """Tiles of rows x keys that some query sees, and that all see in full."""
  start, end = (
    np.asarray(x)[0] for x in cases.ranges(call.shape, call.visible)
  )
  seen = whole = 0
  for first in range(0, len(start), rows):
    s, e = start[first : first + rows], end[first : first + rows]
    s, e = s[s < e], e[s < e]
    if len(s):
      seen += -(-int(e.max()) // keys) - int(s.min()) // keys
      whole += max(int(e.min()) // keys - -(-int(s.max()) // keys), 0)
  return seen, whole


def _dense_forward(call: Call, bT: int, bS: int, chunk: int) -> Counts:
  shape = call.shape
  N, width = shape.N, heads.width(shape.H + shape.R) + shape.U
  nT = -(-shape.T // bT)
  seen, whole = _spans(call, bT, min(2 * chunk, bS))
  tiles, _ = _spans(call, bT, bS)
  longest = -(-shape.S // bS)
  steps = N * nT * longest
  return Counts(
    steps=steps,
    ends=N * nT,
    blocks=(N * seen, N * whole, N * (seen - whole)),
    bytes=2 * N * width * (tiles * bS + nT * bT),
  )


def _masked_forward(call: Call, bT: int, bS: int, chunk: int) -> Counts:
  """Counts with a mask, one word per query and 32 keys."""
  plain = _dense_forward(call, bT, bS, chunk)
  seen, _, _ = plain.blocks
  words = 4 * call.shape.N * _spans(call, bT, 32 * 128)[0] * bT * 128
  return dataclasses.replace(plain, blocks=(seen,), bytes=plain.bytes + words)


def _dense_backward(call: Call, bT: int, bS: int, chunk: int) -> Counts:
  shape = call.shape
  N, HR = shape.N, heads.width(shape.H + shape.R)
  width = 2 * (HR + shape.U)
  nT, nS = -(-shape.T // bT), -(-shape.S // bS)
  seen, whole = _spans(call, bT, chunk)
  tiles, _ = _spans(call, bT, bS)
  return Counts(
    steps=N * nS * nT,
    ends=N * nS,
    blocks=(N * tiles * (bS // chunk), N * whole, N * (seen - whole)),
    bytes=N * width * (tiles * bT + 2 * nS * bS) + 2 * N * nT * bT * HR,
  )


def _masked_backward(call: Call, bT: int, bS: int, chunk: int) -> Counts:
  plain = _dense_backward(call, bT, bS, chunk)
  chunks, whole, part = plain.blocks
  words = 4 * call.shape.N * _spans(call, bT, bS)[0] * bT * 128
  return dataclasses.replace(
    plain, blocks=(chunks, whole + part), bytes=plain.bytes + words
  )


def _mask_bits(call: Call, bQ: int) -> Counts:
  shape = call.shape
  words = 128 * -(-shape.S // (32 * 128))  # of a query
  return Counts(
    steps=-(-shape.T // bQ),
    ends=0,
    blocks=(),
    bytes=4 * shape.T * (shape.K + words),
  )


def _indexer_topk(call: Call, bQ: int, bS: int) -> Counts:
  shape = call.shape
  M, I = shape.M, shape.I
  nQ, nS = -(-shape.T // bQ), -(-shape.S // bS)
  seen, _ = _spans(call, bQ, bS)
  low, high, exact = _TURNS
  places = seen + nQ * shape.K // 128  # every tile, and every full register
  return Counts(
    steps=nQ * nS,
    ends=nQ,
    blocks=(
      seen * bS // 512,
      nQ,
      *(nQ * low, seen * low),
      *(nQ * high, seen * high),
      *(nQ * exact, seen * exact),
      0,  # there are no ties
      *(seen, places),
    ),
    bytes=2 * seen * bS * I + nQ * bQ * (2 * M * I + 4 * shape.K),
  )


def _reads(call: Call, bQ: int, bK: int) -> tuple[int, int, int]:
  """Tiles of rows: all, those of unions, those of single queries."""
  K, nQ = call.shape.K, -(-call.shape.T // bQ)
  if call.union is None:
    tiles = nQ * bQ * -(-K // bK)
    return tiles, 0, tiles
  tiles = nQ * -(-round(call.union * K) // bK)
  return tiles, tiles, 0


def _sparse_forward(call: Call, bQ: int, bK: int) -> Counts:
  shape = call.shape
  nQ, D, C = -(-shape.T // bQ), shape.C + shape.R, shape.C
  tiles, union, apart = _reads(call, bQ, bK)
  return Counts(
    steps=nQ,
    ends=nQ,
    blocks=(
      call.cores,  # before each one's first block
      *(tiles, union * _groups(shape.N, bQ), apart),
    ),
    bytes=tiles * bK * _row_bytes(D) + 2 * nQ * bQ * shape.N * (D + C),
  )


def _sparse_backward(call: Call, bQ: int, bK: int) -> Counts:
  shape = call.shape
  nQ, D, C = -(-shape.T // bQ), shape.C + shape.R, shape.C
  tiles, union, apart = _reads(call, bQ, bK)
  sums = 2 * 4 * 128 * -(-D // 128)  # a row is read and written
  return Counts(
    steps=nQ,
    ends=nQ,
    blocks=(
      call.cores,  # before each one's first block
      *(tiles, union, apart),
      0,  # no key stands twice in a tile
    ),
    bytes=tiles * bK * (_row_bytes(D) + sums)
    + 2 * nQ * bQ * shape.N * (2 * D + C),
  )


def _dense_loss_scores(call: Call, bT: int, bS: int) -> Counts:
  shape, M, I = call.shape, call.shape.M, call.shape.I
  tiles, chunks = _chunks(call, bT, bS)
  return Counts(
    steps=tiles,
    ends=chunks,
    blocks=(),
    bytes=tiles * bS * (2 * I + 4 * bT)
    + 2 * chunks * bT * M * I
    + 4 * shape.T * M,
  )


def _dense_loss_target(call: Call, bT: int, bS: int, bN: int) -> Counts:
  shape = call.shape
  tiles, _ = _chunks(call, bT, bS)
  steps = tiles * (shape.N // bN)
  HR = shape.H + shape.R
  of_heads = bT * bN * heads.width(HR) + bS * heads.width(HR, bN)
  return Counts(
    steps=steps,
    ends=tiles,
    blocks=(steps * bN,),
    bytes=2 * steps * of_heads + 4 * tiles * bS * bT,
  )


def _dense_loss_gradients(call: Call, bT: int, bS: int) -> Counts:
  M, I = call.shape.M, call.shape.I
  tiles, chunks = _chunks(call, bT, bS)
  return Counts(
    steps=tiles,
    ends=chunks,
    blocks=(),
    # Of a tile: keys both ways, their sums in and out, scores and target.
    bytes=tiles * bS * (2 * 2 * I + 2 * 4 * I + 2 * 4 * bT)
    + chunks * bT * M * I * (2 + 2 + 4),
  )


def _chunks(call: Call, bT: int, bS: int) -> tuple[int, int]:
  """Tiles of keys that chunks of queries see, and chunks, over all cores."""
  rows = call.cores * bT
  seen, _ = _spans(call, rows, bS)
  return call.cores * seen, call.cores * -(-call.shape.T // rows)


def _sparse_loss_distributions(call: Call, bQ: int, bK: int) -> Counts:
  shape = call.shape
  index = 2 * bQ * shape.M * shape.I
  keys = _row_bytes(128 * -(-(shape.C + shape.R) // 128) + shape.I)
  return _sparse_loss(
    *(call, bQ, bK, keys),
    index + 2 * bQ * shape.N * (shape.C + shape.R),
    2,
  )


def _sparse_loss_gradients(call: Call, bQ: int, bK: int) -> Counts:
  shape = call.shape
  sums = 2 * 4 * 128 * -(-shape.I // 128)  # a row is read and written
  index = (2 + 2 + 4) * bQ * shape.M * shape.I
  return _sparse_loss(call, bQ, bK, _row_bytes(shape.I) + sums, index, 1)


def _sparse_loss(
  call: Call, bQ: int, bK: int, row: int, block: int, arrays: int
) -> Counts:
  """Counts, from bytes per row and per block and `arrays` [places, bQ, bK]."""
  nQ = -(-call.shape.T // bQ)
  tiles, union, apart = _reads(call, bQ, bK)
  longest = min(sparse_loss.LONGEST_UNION, bQ)
  places = -(-longest * call.shape.K // bK)
  return Counts(
    steps=nQ,
    ends=nQ,
    blocks=(call.cores, tiles, union, apart),
    bytes=tiles * bK * row + nQ * (block + 4 * arrays * places * bQ * bK),
  )


def _groups(N: int, bQ: int) -> int:
  """Number of products of a union's tile, each of up to 512 rows."""
  return -(-bQ // max(1, 512 // N))


def _row_bytes(D: int) -> int:
  """Bytes of a row of keys, bf16, as it is copied."""
  return 512 * -(-D // 256)


_KERNELS: Final[dict[str, Callable[..., Counts]]] = {
  "dense_mla_forward": _dense_forward,
  "dense_mla_backward": _dense_backward,
  "dense_mla_masked_forward": _masked_forward,
  "dense_mla_masked_backward": _masked_backward,
  "dense_mla_mask_bits": _mask_bits,
  "indexer_topk": _indexer_topk,
  "sparse_mla_forward": _sparse_forward,
  "sparse_mla_backward": _sparse_backward,
  "dense_indexer_loss_scores": _dense_loss_scores,
  "dense_indexer_loss_target": _dense_loss_target,
  "dense_indexer_loss_gradients": _dense_loss_gradients,
  "sparse_indexer_loss_distributions": _sparse_loss_distributions,
  "sparse_indexer_loss_gradients": _sparse_loss_gradients,
}
