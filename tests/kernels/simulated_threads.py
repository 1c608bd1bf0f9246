"""Runs on a CPU what a kernel emits through `threads_lib`.

The same names, computed by numpy at once for all threads of one block. Shared
memory tells when a word is read or overwritten that another warp has touched
since the last barrier.
"""

import functools
from typing import Final
from unittest import mock

import numpy as np

from pallas_kernels.hopper import threads as threads_lib

WARP = threads_lib.WARP
MINUS_INFINITY = threads_lib.MINUS_INFINITY


class _Block:
  """The threads that run, and how many barriers they have passed."""

  def __init__(self, n):
    self.n = n
    self.active = np.ones(n, bool)
    self.barriers = 0


_block = _Block(0)


def simulate(module, n: int):
  """Patches a module that uses threads: its code runs as one block of n."""
  global _block
  _block = _Block(n)
  this = globals()
  names = {"threads": _Namespace(this), "U32": U32, "Bool": Bool}
  return mock.patch.multiple(module, **names)


class _Namespace:
  def __init__(self, names):
    self.__dict__.update(names)


class Bool(threads_lib.Bool):
  def __init__(self, value):
    self.value = np.broadcast_to(np.asarray(value, bool), (_block.n,))

  def __and__(self, other):
    return Bool(self.value & other.value)

  def __or__(self, other):
    return Bool(self.value | other.value)

  def __invert__(self):
    return Bool(~self.value)

  def number(self):
    return U32(self.value)

  def where(self, yes, no):
    return U32(np.where(self.value, U32(yes).value, U32(no).value))


class U32(threads_lib.U32):
  def __init__(self, value):
    if isinstance(value, U32):
      value = value.value
    if isinstance(value, int):
      value %= 2**32
    self.value = np.broadcast_to(
      np.asarray(value).astype(np.uint32), (_block.n,)
    )

  def min(self, other):
    return U32(np.minimum(self.value, U32(other).value))

  def max(self, other):
    return U32(np.maximum(self.value, U32(other).value))

  def signed_clamp(self, low, high):
    return U32(self.value.astype(np.int32).clip(low, high))

  def sign(self):
    return U32(self.value.astype(np.int32) >> 31)

  def _floats(self):
    return self.value.view(np.float32)

  def float_order(self):
    with np.errstate(invalid="ignore"):
      bits = U32((self._floats() + np.float32(0)).view(np.uint32))
    return bits ^ (bits.sign() | 2**31)

  def float_at_least(self, other):
    return Bool(self._floats() >= other._floats())

  def leading_zeros(self):
    return U32([32 - int(x).bit_length() for x in self.value])

  def bit_count(self):
    return U32([int(x).bit_count() for x in self.value])

  def with_bit(self, bit, where):
    return self | (where.number() << bit)

  def opaque(self):
    return self

  def equals(self, other):
    return Bool(self.value == U32(other).value)


def _operator(name, result):
  def apply(self, other):
    return result(getattr(np.ndarray, name)(self.value, U32(other).value))

  return apply


for _name in ("add", "sub", "mul", "floordiv", "and", "or", "xor"):
  setattr(U32, f"__{_name}__", _operator(f"__{_name}__", U32))
for _name in ("lt", "le", "gt", "ge"):
  setattr(U32, f"__{_name}__", _operator(f"__{_name}__", Bool))
for _name in ("lshift", "rshift"):

  def _shift(self, other, name=f"__{_name}__"):
    distance = U32(other).value
    assert (distance < 32).all(), distance.max()
    return U32(getattr(np.ndarray, name)(self.value, distance))

  setattr(U32, f"__{_name}__", _shift)
U32.__radd__ = U32.__add__
U32.__rsub__ = lambda self, other: U32(other) - self


class Memory(threads_lib.Memory):
  """`words`: an array, which it changes. `shared`: threads may race for it."""

  # What another warp must not have done to a word since the last barrier.
  _AGAINST: Final = {
    "read": ("stored", "added"),
    "stored": ("read", "stored", "added"),
    "added": ("read", "stored"),
  }

  def __init__(self, words, shared=False):
    self.words = words.view(np.uint32)
    self._shared = shared
    self._barriers = -1

  def _touch(self, what, i, threads):
    """Notes which warps do this to the words."""
    assert (i < self.words.size).all(), i.max()
    if not self._shared:
      return
    if self._barriers != _block.barriers:
      self._barriers = _block.barriers
      self._warps = {x: np.zeros_like(self.words) for x in self._AGAINST}
    warp = np.uint32(1) << (np.flatnonzero(threads) // WARP).astype(np.uint32)
    for other in self._AGAINST[what]:
      race = (self._warps[other][i] & ~warp) != 0
      assert not race.any(), f"word {i[race][0]} is {other}, then {what}"
    np.bitwise_or.at(self._warps[what], i, warp)

  def load(self, i):
    i = np.where(_block.active, U32(i).value, 0).astype(int)
    self._touch("read", i[_block.active], _block.active)
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

  def _targets(self, what, i, where):
    write = _block.active if where is None else _block.active & where.value
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


class _only:
  def __init__(self, active):
    self._new = active

  def __enter__(self):
    self._old, _block.active = _block.active, self._new

  def __exit__(self, *_):
    _block.active = self._old


def thread():
  return U32(np.arange(_block.n))


def warp():
  return thread() >> 5


def lane():
  return thread() & (WARP - 1)


def barrier():
  assert _block.active.all(), "not every thread comes to the barrier"
  _block.barriers += 1


def when(condition):
  def run(body):
    with _only(_block.active & condition.value):
      if _block.active.any():
        body()

  return run


def _uniform(x):
  [value] = np.unique(x.value)
  return value


def loop(times, body, carried):
  for i in range(_uniform(times)):
    carried = body(U32(i), *carried)
  return list(carried)


def loop_while(condition, body, carried):
  while _uniform(condition(*carried)):
    carried = body(*carried)
  return list(carried)


def _by_warp(compute):
  def run(x):
    assert _block.active.all()
    warps = x.value.reshape(-1, WARP)
    result = compute(warps, axis=1)
    if result.ndim == 1:
      result = result[:, None]
    return U32(np.broadcast_to(result, warps.shape).reshape(-1))

  return run


last_lane = _by_warp(lambda x, axis: x[:, -1])
warp_sums = _by_warp(functools.partial(np.cumsum, dtype=np.uint32))
warp_sum = _by_warp(functools.partial(np.sum, dtype=np.uint32))
