"""Gathers rows of keys from HBM into a TPU's VMEM, with one copy per row.

A copy may start anywhere along a dimension only if that dimension has no tiles.
So a row is stored in HBM as [W, 1, 128], in tiles of 1 x 128 numbers, one after
another; in VMEM each of its W parts goes to a plane of its own, where
consecutive parts form an array [bK, 128]. Two bfloat16 numbers are copied as
one of 32 bits.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Final

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import row_plan

_UNROLLED: Final = 32  # copies in the body of the loop that starts them
PREFETCHED: Final = 2  # tiles


def parts(width: int, itemsize: int) -> int:
  """W, the number of parts of a row, of 128 numbers of 32 bits each."""
  return pl.cdiv(pl.cdiv(width, lanes.LANES), 4 // itemsize)


def pack(
  kv: Float[Array, "B S D"], bK: int, pitch: int
) -> Shaped[Array, "pieces 1 128"]:
  """Packs rows into the layout for copies, `pitch` pieces of 128 numbers apart.

  After the rows of each batch row come `bK` of zeros. Part w of a bfloat16 row
  holds the numbers from 128 w on in its lower bits, those from 128 (w + W) on
  in its upper ones.
  """
  B, S, D = kv.shape
  W, ratio = parts(D, kv.dtype.itemsize), 4 // kv.dtype.itemsize
  kv = jnp.pad(kv, [(0, 0), (0, bK), (0, W * ratio * lanes.LANES - D)])
  kv = kv.reshape(B, S + bK, ratio, W, lanes.LANES)
  if ratio == 1:
    kv = kv[:, :, 0]
  else:
    halves = jax.lax.bitcast_convert_type(kv, jnp.uint16).astype(jnp.int32)
    kv = halves[:, :, 0] | halves[:, :, 1] << 16
  kv = jnp.pad(kv, [(0, 0), (0, 0), (0, pitch - W), (0, 0)])
  return kv.reshape(-1, 1, lanes.LANES)


def listed(
  plan: row_plan.Plan, S: int, tiles: row_plan.Tiles, cores: int, pitch: int
) -> Int[Array, "B nQ nL bK"]:
  """First piece, in the layout of `pack`, of each row that a block reads.

  The last two tiles are the first ones of the next block on the same core;
  after the last of all, rows of zeros. Computed in advance, since the scalar
  unit, which starts the copies, has no time to spare for it.
  """
  bK = tiles.bK
  B, nQ, nK, _ = plan.codes.shape
  batch = jnp.arange(B, dtype=jnp.int32)[:, None, None, None]
  pieces = ((plan.codes >> tiles.bQ) + (S + bK) * batch) * pitch
  # A core has consecutive blocks of each batch row.
  begin = pieces[:, :, :PREFETCHED].reshape(B, cores, -1, PREFETCHED, bK)
  begin = begin.swapaxes(0, 1).reshape(cores, -1, PREFETCHED, bK)
  zeros = (S + jnp.arange(bK, dtype=jnp.int32)) * pitch
  zeros = jnp.broadcast_to(zeros, (cores, 1, PREFETCHED, bK))
  following = jnp.concatenate([begin[:, 1:], zeros], 1)
  following = following.reshape(cores, B, -1, PREFETCHED, bK).swapaxes(0, 1)
  return jnp.concatenate([pieces, following.reshape(B, nQ, PREFETCHED, bK)], 2)


def start(
  copy: Callable[[Any, Any], Any],
  pieces: Any,
  itemsize: int,
  part: Any = 0,
  n_parts: int = 1,
) -> None:
  """Starts `copy(piece, place)` for a part of a tile's list, pieces[bK].

  bfloat16 rows are paired, the second in the upper bits: the first of each pair
  is copied to the first half of a plane, the second to the other.

  There is no loop, so that starting copies and computing are scheduled together
  in one basic block.
  """
  bK, pair = pieces.shape[0], 4 // itemsize
  size = bK // n_parts
  first = (
    part * size if isinstance(part, int) else pl.multiple_of(part * size, size)
  )
  # Offsets from here on are constants of the instructions.
  some = pieces.at[pl.ds(first, size)]
  place = part * (size // pair)
  for j in range(size):
    copy(some[j], place + (j % pair * (bK // pair) + j // pair)).start()


def start_all(
  copy: Callable[[Any, Any], Any], pieces: Any, itemsize: int
) -> None:
  """Starts all copies at once, where there is no computation to overlap."""
  n_parts = max(pieces.shape[0] // _UNROLLED, 1)

  @pl.loop(0, n_parts)
  def _(part):
    start(copy, pieces, itemsize, part, n_parts)


def wait(buffer: Any, semaphore: Any) -> None:
  """Waits for copies that fill, or empty, a whole buffer."""
  pltpu.make_async_copy(buffer, buffer, semaphore).wait()


def planes(buffer: Any, interpret: Any) -> Any:
  """Views a buffer [W, bK, 1, 128] as [W, bK, 128]."""
  # Interpret mode does not support reshaped references, nor need them.
  if interpret:
    return buffer.at[:, :, 0]
  return buffer.reshape(*buffer.shape[:2], lanes.LANES)


def unpack(planes: Any, keys: Any) -> None:
  """Unpacks copied rows into keys [bK, nD 128]."""
  W, bK, _ = planes.shape
  n_chunks = keys.shape[1] // lanes.LANES

  def put(chunk, x):
    if chunk < n_chunks:
      keys[:, pl.ds(chunk * lanes.LANES, lanes.LANES)] = x

  for w in range(W):
    if keys.dtype.itemsize == 4:
      put(w, planes[w])
      continue
    even, odd = planes[w, : bK // 2], planes[w, bK // 2 :]
    lower = even & 0xFFFF | odd << 16
    upper = jax.lax.shift_right_logical(even, 16) | odd & ~0xFFFF
    put(w, pltpu.bitcast(lower, keys.dtype))
    put(w + W, pltpu.bitcast(upper, keys.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lists:
  """What a kernel has of a block's plan."""

  block: Any
  """Entry of `Plan.blocks`, as scalars."""
  pieces: Any
  """Entry of `listed`, as scalars: [nK + 2, bK]."""
  codes: Any
  """Entry of `Plan.codes`, as vectors: [nK, bK]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scratch:
  """Scratch memory of a `Stream`."""

  buffers: Any
  """Buffers of two tiles, as copied."""
  semaphores: Any
  """Semaphores of the copies."""
  turn: Any
  """Buffer of the block's first tile."""
  keys: Any
  """Current tile, [bK, D], D padded to whole registers."""


def scratch(D: int, dtype: Any, bK: int) -> Scratch:
  """Scratch of a `Stream` of rows of D numbers."""
  copied = jnp.int32 if dtype.itemsize == 2 else dtype
  W = parts(D, dtype.itemsize)
  return Scratch(
    buffers=pltpu.VMEM((PREFETCHED, W, bK, 1, lanes.LANES), copied),
    semaphores=pltpu.SemaphoreType.DMA((PREFETCHED,)),
    turn=pltpu.SMEM((1,), jnp.int32),
    keys=pltpu.VMEM((bK, lanes.whole(D)), dtype),
  )


@dataclasses.dataclass(frozen=True)
class Stream:
  """Stream of a block's tiles of rows, each prefetched two tiles in advance.

  The copies of the second next tile start when a tile has left its buffer, so
  that none is waited for right after its start; that tile may be one of the
  next block.
  """

  lists: Lists
  rows: Any
  """Result of `pack`, in HBM."""
  scratch: Scratch
  interpret: Any

  @property
  def keys(self) -> Any:
    """Current tile, see `Scratch.keys`."""
    return self.scratch.keys

  @property
  def n_tiles(self) -> Any:
    """Number of tiles, at least the prefetched ones, which may have no keys."""
    return jnp.maximum(self.lists.block[0, 0], PREFETCHED)

  def open(self) -> None:
    """Begins the block; called first."""

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
      self.scratch.turn[0] = 0
      for tile in range(PREFETCHED):
        pieces = self.lists.pieces.at[tile]
        start_all(self._copy(tile), pieces, self.keys.dtype.itemsize)

  def read(self, tile: Any) -> None:
    """Writes a tile's rows to `keys`; `start` must be called next."""
    slot = self._slot(tile)
    self._wait(slot)
    buffer = self.scratch.buffers.at[slot]
    unpack(planes(buffer, self.interpret), self.keys)

  def start(self, tile: Any, part: Any = 0, n_parts: int = 1) -> None:
    """Starts part of the copies of the second tile after `tile`."""
    prefetched, n_tiles = tile + PREFETCHED, self.n_tiles
    nK = self.lists.pieces.shape[0] - PREFETCHED
    prefetched = jnp.where(
      prefetched < n_tiles, prefetched, nK + prefetched - n_tiles
    )
    itemsize = self.keys.dtype.itemsize
    copy = self._copy(self._slot(tile))
    start(copy, self.lists.pieces.at[prefetched], itemsize, part, n_parts)

  def close(self) -> None:
    """Ends the block; called last."""
    self.scratch.turn[0] = self._slot(self.n_tiles)
    ends = [pl.program_id(i) == pl.num_programs(i) - 1 for i in (1, 2)]

    @pl.when(ends[0] & ends[1])
    def _():
      for slot in range(PREFETCHED):
        self._wait(slot)

  def _slot(self, tile):
    return (self.scratch.turn[0] + tile) % PREFETCHED

  def _wait(self, slot):
    wait(self.scratch.buffers.at[slot], self.scratch.semaphores.at[slot])

  def _copy(self, slot):
    W = self.scratch.buffers.shape[1]
    return lambda piece, place: pltpu.make_async_copy(
      self.rows.at[pl.ds(piece, W)],
      self.scratch.buffers.at[slot, :, place],
      self.scratch.semaphores.at[slot],
    )
