"""Double of `hopper.instructions`."""

import numpy as np

from tests.kernels.simulated import threads


def thread():
  return threads.thread_of_warpgroup()


def zero():
  return threads.U32(0)


def multiply_add(x, y, z):
  return x.multiply_add(y, z)


def exp2(x):
  return threads.F32(np.exp2(x.value))


def log2(x):
  with np.errstate(divide="ignore"):
    return threads.F32(np.log2(x.value))


def exchange(x, distance):
  return threads.exchange(x, distance)


def pack(low, high):
  return low.pack(high)


def unpack(pair):
  return (pair << 16).float(), (pair & -(2**16)).float()
