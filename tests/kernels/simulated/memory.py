"""Double of `hopper.memory`, on arrays.

`Memory` tells when a word is read or overwritten that another warp has touched
since the last barrier.
"""

from typing import Any, Final

import numpy as np

from pallas_kernels.hopper import memory as memory_lib
from pallas_kernels.hopper.threads import WARP
from tests.kernels.simulated import block
from tests.kernels.simulated.threads import F32
from tests.kernels.simulated.threads import U32


class Memory(memory_lib.Memory):
  """`words`: an array, which it changes. `shared`: threads may race for it."""

  # What another warp must not have done to a word since the last barrier.
  _AGAINST: Final = {
    "read": ("stored", "added"),
    "stored": ("read", "stored", "added"),
    "added": ("read", "stored"),
  }

  blocks: Any  # those words of each block of the cluster

  def __init__(self, words, shared=False):
    self.words = words.view(np.uint32)
    self._shared = shared
    self._barriers = -1

  def _touch(self, what, i, threads):
    """Notes which warps do this to the words."""
    assert (i < self.words.size).all(), i.max()
    if not self._shared:
      return
    if self._barriers != block.now.barriers:
      self._barriers = block.now.barriers
      self._warps = {x: np.zeros_like(self.words) for x in self._AGAINST}
    warp = np.uint32(1) << (np.flatnonzero(threads) // WARP).astype(np.uint32)
    for other in self._AGAINST[what]:
      race = (self._warps[other][i] & ~warp) != 0
      assert not race.any(), f"word {i[race][0]} is {other}, then {what}"
    np.bitwise_or.at(self._warps[what], i, warp)

  def load(self, i):
    i = np.where(block.now.active, U32(i).value, 0).astype(int)
    self._touch("read", i[block.now.active], block.now.active)
    return U32(self.words[i])

  def load4s(self, starts):
    assert all((U32(i).value % 4 == 0).all() for i in starts)
    return [[self.load(U32(i) + e) for e in range(4)] for i in starts]

  def append(self, cursor, words, flags, bit, stride):
    where = (flags & (1 << bit)) > 0
    for i, word in enumerate(words):
      self.store(cursor + stride * i, word, where=where)
    return where.where(cursor + 1, cursor)

  def cursor(self, i):
    return i

  def in_block(self, block):
    [number] = np.unique(block.value)
    return self.blocks[number]

  def _targets(self, what, i, where):
    write = (
      block.now.active if where is None else block.now.active & where.value
    )
    i = U32(i).value.astype(int)[write]
    self._touch(what, i, write)
    return write, i

  def store(self, i, word, where=None):
    write, i = self._targets("stored", i, where)
    assert np.unique(i).size == i.size, "two threads store one word"
    self.words[i] = U32(word).value[write]

  def add(self, i, word, where=None):
    write, i = self._targets("added", i, where)
    np.add.at(self.words, i, U32(word).value[write])


class Place(memory_lib.Place):
  """Byte of an array, which it changes, for each thread."""

  def __init__(self, array, is_shared=False, at=0):
    self.array = array.reshape(-1).view(np.uint8)
    self.is_shared = is_shared
    at = at.value if isinstance(at, U32) else at
    self.at = np.broadcast_to(np.asarray(at, np.int64), (block.now.n,))

  @classmethod
  def of(cls, ref):
    """Tests give places where a kernel gives arrays."""
    return ref

  def _further(self, offset):
    return Place(self.array, self.is_shared, self.at + offset)

  def __add__(self, offset):
    return self._further(offset.value if isinstance(offset, U32) else offset)

  def step(self, index, stride):
    return self._further(index.value.astype(np.int64) * stride)

  def touched(self, offset, n, where=None, turn=0):
    """Threads that take part, and the n bytes that each has."""
    active = (
      block.now.active if where is None else block.now.active & where.value
    )
    at = (self.at[active] ^ turn) + offset
    assert (at % min(n, 16) == 0).all(), "not a multiple of its size"
    assert (0 <= at).all() and (at + n <= self.array.size).all(), at.max()
    return active, at[:, None] + np.arange(n)

  def _read(self, offset, n, dtype, turn=0):
    active, at = self.touched(offset, 4 * n, turn=turn)
    out = np.zeros((block.now.n, n), dtype)
    out[active] = self.array[at].view(dtype)
    return out.T

  def load(self, offset=0):
    return U32(self._read(offset, 1, np.uint32)[0])

  load_constant = load

  def load_words(self, n, offset=0, turn=0) -> Any:
    return [U32(x) for x in self._read(offset, n, np.uint32, turn)]

  load_constants = load_words

  def load_floats(self, n, offset=0, turn=0) -> Any:
    return [F32(x) for x in self._read(offset, n, np.float32, turn)]

  def prefetch(self, offset, where):
    assert not self.is_shared
    self.touched(offset, 1, where)

  def store(self, values, offset=0, where=None, turn=0):
    active, at = self.touched(offset, 4 * len(values), where, turn)
    assert np.unique(at).size == at.size, "two threads store one byte"
    words = np.stack([x.value for x in values], 1)[active]
    self.array[at] = np.ascontiguousarray(words).view(np.uint8)

  def add(self, values, offset=0, where=None):
    assert not self.is_shared and len(values) == 4
    active, at = self.touched(offset, 16, where)
    numbers = np.stack([x.value for x in values], 1)[active]
    np.add.at(self.array.view(np.float32), at[:, ::4] // 4, numbers)


class Array(memory_lib.Array):
  """Array of 16- or 32-bit numbers, of any shape."""

  def __init__(self, array):
    self.array = array

  def load(self, *at):
    bits = self.array.view(f"u{self.array.itemsize}")
    return U32(bits[tuple(U32(i).value for i in at)])

  def load_words(self, n, *at) -> Any:
    at = tuple(U32(i).value for i in at)
    byte = np.ravel_multi_index(at, self.array.shape) * self.array.itemsize
    assert (byte % (4 * n) == 0).all(), "not a multiple of its size"
    words = self.array.reshape(-1).view(np.uint32)
    return [U32(words[byte // 4 + i]) for i in range(n)]


class LazyRow(memory_lib.LazyRow):
  def _put(self, action, values, offset):
    place = self.array.step(self.number + self.further, self.size)
    put = place.store if action.startswith("st") else place.add
    put(values, offset, where=self.key < self.keys)
