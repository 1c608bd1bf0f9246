"""Masks logits by bits, in the layout of a WGMMA accumulator.

A thread holds two rows of a tile, 8 apart, and two adjacent columns of every 8,
see `hopper.fragments`. It reads the words of its rows from device memory and
shifts them once, so that all threads then test the same bit positions.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import fragments
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32


def load(mask_bits: Any, row: Int[Array, ""], n: int) -> Int[Array, " numbers"]:
  """Loads the mask bits of 64 rows into the threads that need them.

  Args:
    mask_bits: In device memory, int32[rows, n].
    row: The first row.
    n: Words per row, 2 or 4.
  """

  @threads.code(threads.REF, threads.NUMBER, returns=fragments.numbers(2 * n))
  def emit(mask_bits, row):
    return fragments.of_numbers(load_words(Place.of(mask_bits), row, n))

  return emit(mask_bits, row)


def load_words(mask_bits: Place, row: U32, n: int) -> list[U32]:
  """Loads the n words of both rows that this thread has.

  They are loaded where this is written, before the work that hides how long it
  takes.
  """
  warp, below, _ = fragments.place()
  mine = mask_bits.step(below + (warp << 4) + row, 4 * n)
  halves = [
    mine.load_constants(n, offset=8 * half * 4 * n) for half in range(2)
  ]
  return [word for words in halves for word in words]


def apply(
  logits: Float[Array, "64 columns"], bits: Int[Array, " numbers"]
) -> Float[Array, "64 columns"]:
  """Masks logits with -inf where the bit is clear; `bits` come from `load`."""
  columns = logits.shape[1]

  @threads.code(
    *(tiles.MATRIX, fragments.numbers(columns // 16).layout),
    returns=fragments.matrix(columns, jnp.float32),
  )
  def emit(logits, bits):
    words = fragments.words(bits)
    return fragments.of_floats(masked(fragments.floats(logits), words))

  return emit(logits, bits)


def masked(logits: Sequence[F32], words: Sequence[U32]) -> list[F32]:
  """Masks this thread's logits by the words of `load_words`."""
  _, _, pair = fragments.place()
  words = [x >> (pair << 1) for x in words]
  n = len(words) // 2
  kept = []
  for i, logit in enumerate(logits):
    eight, half, column = i // 4, i // 2 % 2, i % 2
    word = words[half * n + eight // 4]
    bit = word & (1 << 8 * (eight % 4) + column)
    kept.append(bit.differs(0).where_float(logit, -float("inf")))
  return kept
