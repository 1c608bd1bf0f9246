"""Runs on a CPU what a kernel's threads do: a double of `hopper`, in numpy.

The same names as in `threads`, `memory`, `copies`, `signals` and
`instructions`, computed at once for all threads of one block, or of one
warpgroup. `Memory` tells when a word is read or overwritten that another warp
has touched since the last barrier. Other waits return at once, and copies have
arrived when they have started.
"""

import functools
from typing import Any, Final
from unittest import mock

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import copies as copies_lib
from pallas_kernels.hopper import memory as memory_lib
from pallas_kernels.hopper import threads as threads_lib

WARP = threads_lib.WARP
WARPGROUP = threads_lib.WARPGROUP
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
  names: dict[str, Any] = {"threads": _Namespace(globals())}
  names |= {x.__name__: x for x in (Bool, U32, F32, Memory, Place, LazyRow)}
  names |= {x.__name__: x for x in (copies, signals, instructions)}
  names = {x: double for x, double in names.items() if hasattr(module, x)}
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

  def where_float(self, yes, no):
    return F32(np.where(self.value, F32(yes).value, F32(no).value))

  def in_any_lane(self):
    warps = self.value.reshape(-1, WARP).any(1, keepdims=True)
    return Bool(np.broadcast_to(warps, (warps.size, WARP)).reshape(-1))


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

  def signed_max(self, other):
    return U32(np.maximum(self.value.astype(np.int32), other))

  def is_natural(self):
    return Bool(self.value.astype(np.int32) >= 0)

  def _floats(self):
    return np.ascontiguousarray(self.value).view(np.float32)

  def float(self):
    return F32(self._floats())

  def pick_bytes(self, other, pattern):
    both = self.value.astype(np.uint64) | other.value.astype(np.uint64) << 32
    pattern = U32(pattern).value.astype(np.uint64)
    total = np.zeros_like(both)
    for i in range(4):
      digit = pattern >> np.uint64(4 * i) & 15
      byte = both >> 8 * (digit & 7) & 255
      sign = np.where(byte >> 7, 255, 0).astype(np.uint64)
      total |= np.where(digit & 8, sign, byte) << np.uint64(8 * i)
    return U32(total)

  def min_halves(self, other):
    halves = [
      np.minimum(self.value >> i & 0xFFFF, other.value >> i & 0xFFFF) << i
      for i in (0, 16)
    ]
    return U32(halves[0] | halves[1])

  def positive_halves(self):
    halves = np.ascontiguousarray(self.value).view(jnp.bfloat16)
    masks = np.where(halves > 0, 0xFFFF, 0).astype(np.uint16)
    return U32(masks.view(np.uint32))

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

  def differs(self, other):
    return ~self.equals(other)


class F32(threads_lib.F32):
  def __init__(self, value):
    if isinstance(value, F32):
      value = value.value
    value = np.asarray(value, np.float32)
    self.value = np.broadcast_to(value, (_block.n,))

  def __add__(self, other):
    return F32(self.value + other.value)

  def __mul__(self, other):
    return F32(self.value * other.value)

  def __abs__(self):
    return F32(np.abs(self.value))

  def max(self, other):
    return F32(np.maximum(self.value, F32(other).value))

  def multiply_add(self, factor, term):
    exact = self.value.astype(np.float64) * factor.value
    return F32(exact + term.value)

  def pack(self, high):
    pair = np.stack([self.value, high.value], 1).astype(jnp.bfloat16)
    return U32(pair.view(np.uint32)[:, 0])

  def differs(self, other):
    return Bool(self.value != F32(other).value)

  def bits(self):
    return U32(np.ascontiguousarray(self.value).view(np.uint32))


def _operator(name, result):
  def apply(self, other):
    return result(getattr(np.ndarray, name)(self.value, U32(other).value))

  return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"):
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


class Memory(memory_lib.Memory):
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


class Place(memory_lib.Place):
  """Byte of an array, which it changes, for each thread."""

  def __init__(self, array, is_shared=False, at=0):
    self.array = array.reshape(-1).view(np.uint8)
    self.is_shared = is_shared
    at = at.value if isinstance(at, U32) else at
    self.at = np.broadcast_to(np.asarray(at, np.int64), (_block.n,))

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

  def _bytes(self, offset, n, where=None, turn=0):
    """Threads that take part, and the n bytes that each has."""
    active = _block.active if where is None else _block.active & where.value
    at = (self.at[active] ^ turn) + offset
    assert (at % min(n, 16) == 0).all(), "not a multiple of its size"
    assert (0 <= at).all() and (at + n <= self.array.size).all(), at.max()
    return active, at[:, None] + np.arange(n)

  def _read(self, offset, n, dtype, turn=0):
    active, at = self._bytes(offset, 4 * n, turn=turn)
    out = np.zeros((_block.n, n), dtype)
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

  def store(self, values, offset=0, where=None, turn=0):
    active, at = self._bytes(offset, 4 * len(values), where, turn)
    assert np.unique(at).size == at.size, "two threads store one byte"
    words = np.stack([x.value for x in values], 1)[active]
    self.array[at] = np.ascontiguousarray(words).view(np.uint8)

  def add(self, values, offset=0, where=None):
    assert not self.is_shared and len(values) == 4
    active, at = self._bytes(offset, 16, where)
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


class copies:
  """Double of `hopper.copies`."""

  BYTES = copies_lib.BYTES

  @staticmethod
  def start(
    target, source, size=None, *, prefetch=None, to=0, at=0, where=None
  ):
    del prefetch
    assert target.is_shared and not source.is_shared
    size = np.broadcast_to(16 if size is None else size.value, (_block.n,))
    assert np.isin(size, (0, 16)).all()
    active, to = target._bytes(to, 16, where)
    assert np.unique(to).size == to.size, "two threads copy to one byte"
    _, at = source._bytes(at, 16, where)
    # Where nothing is read, zeros.
    target.array[to] = np.where(size[active, None], source.array[at], 0)

  @staticmethod
  def wait_all():
    pass

  commit = wait_all

  @staticmethod
  def wait(in_flight):
    del in_flight


class signals:
  """Double of `hopper.signals`: nobody waits."""

  @staticmethod
  def _nothing(*_, **__):
    pass

  meet = announce = meet_warp = start = open_all = _nothing
  arrive = arrive_after_copies = expect = wait = fence_async = _nothing


class instructions:
  """Double of `hopper.instructions`."""

  @staticmethod
  def thread():
    return thread_of_warpgroup()

  @staticmethod
  def multiply_add(x, y, z):
    return x.multiply_add(y, z)

  @staticmethod
  def exp2(x):
    return F32(np.exp2(x.value))

  @staticmethod
  def exchange(x, distance):
    return exchange(x, distance)

  @staticmethod
  def pack(low, high):
    return low.pack(high)

  @staticmethod
  def unpack(pair):
    return (pair << 16).float(), (pair & -(2**16)).float()


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


def thread_of_warpgroup():
  return thread() & (WARPGROUP - 1)


def exchange(x, distance):
  assert _block.active.all()
  return F32(x.value[np.arange(_block.n) ^ distance])


def barrier():
  assert _block.active.all(), "not every thread comes to the barrier"
  _block.barriers += 1


def when(condition):
  def run(body):
    with _only(_block.active & condition.value):
      if _block.active.any():
        body()

  return run


def loop(times, body, carried):
  for i in range(times.value[_block.active].max()):
    running = times > i
    with _only(_block.active & running.value):
      after = body(U32(i), *carried)
    pairs = zip(after, carried, strict=True)
    carried = [_either(running, x, before) for x, before in pairs]
  return list(carried)


def _either(condition, x, y):
  return type(y)(np.where(condition.value, x.value, y.value))


def _uniform(x):
  [value] = np.unique(x.value)
  return value


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
