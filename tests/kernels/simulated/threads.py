"""Double of `hopper.threads`: a number for each thread, as an array."""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import threads as threads_lib
from tests.kernels.simulated import block

WARP = threads_lib.WARP
WARPGROUP = threads_lib.WARPGROUP
MINUS_INFINITY = threads_lib.MINUS_INFINITY


class Bool(threads_lib.Bool):
  def __init__(self, value):
    self.value = np.broadcast_to(np.asarray(value, bool), (block.now.n,))

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
      np.asarray(value).astype(np.uint32), (block.now.n,)
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

  def times_halves(self, other):
    x, y = (np.ascontiguousarray(z.value) for z in (self, other))
    product = x.view(jnp.bfloat16) * y.view(jnp.bfloat16)
    return U32(product.view(np.uint32))

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
    self.value = np.broadcast_to(value, (block.now.n,))

  def __add__(self, other):
    return F32(self.value + other.value)

  def __sub__(self, other):
    return F32(self.value - other.value)

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


class _only:
  def __init__(self, active):
    self._new = active

  def __enter__(self):
    self._old, block.now.active = block.now.active, self._new

  def __exit__(self, *_):
    block.now.active = self._old


def thread():
  return U32(np.arange(block.now.n))


def warp():
  return thread() >> 5


def lane():
  return thread() & (WARP - 1)


def thread_of_warpgroup():
  return thread() & (WARPGROUP - 1)


def exchange(x, distance):
  assert block.now.active.all()
  return F32(x.value[np.arange(block.now.n) ^ distance])


def barrier():
  assert block.now.active.all(), "not every thread comes to the barrier"
  block.now.barriers += 1


def when(condition):
  def run(body):
    with _only(block.now.active & condition.value):
      if block.now.active.any():
        body()

  return run


def loop(times, body, carried):
  for i in range(times.value[block.now.active].max()):
    running = times > i
    with _only(block.now.active & running.value):
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
    assert block.now.active.all()
    warps = x.value.reshape(-1, WARP)
    result = compute(warps, axis=1)
    if result.ndim == 1:
      result = result[:, None]
    return U32(np.broadcast_to(result, warps.shape).reshape(-1))

  return run


last_lane = _by_warp(lambda x, axis: x[:, -1])
warp_sums = _by_warp(functools.partial(np.cumsum, dtype=np.uint32))
warp_sum = _by_warp(functools.partial(np.sum, dtype=np.uint32))
warp_max = _by_warp(np.max)
