"""Bits of active heads: the heads of which a query and a key have q.k > 0.

A pair of a query and a key has a word for every `WORD` heads. Of these, bit
h // 2 belongs to head h if it is even, bit 16 + h // 2 if it is odd.

The bits are made in 16-bit halves, of two neighbouring keys to a register. They
mask d scores by a bitwise and, to give for each head m

  g[t, m, s] = d scores[t, s] where the head is active, else 0

as the left operand of a product. It is 0 where the bits are, whatever d scores
holds there.
"""

from collections.abc import Sequence
from typing import Any, Final

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import fragments
from pallas_kernels.hopper import memory
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper import widths
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32

HEADS: Final = widths.M
WORD: Final = 32
HALF: Final = WORD // 2
WORDS: Final = HEADS // WORD
# Patterns of `U32.pick_bytes`. Of two registers, the lower or the upper halves:
_LOWER: Final = 0x5410
_UPPER: Final = 0x7632
# Of a register's halves, all of the first or second byte's bits are its sign.
_SIGNS: Final = 0xAA88, 0xBB99


def head(step: Int[Array, ""]) -> Int[Array, ""]:
  """Head of a step: of each word the even heads, then the odd ones, the highest
  first, since each bit shifts the earlier ones to the left."""
  group, i = lax.div(step, HALF), lax.rem(step, HALF)
  highest = WORD - 2 + lax.rem(group, 2)
  return lax.div(group, 2) * WORD + highest - 2 * i


def add_head(
  similarity: Float[Array, "64 bS"],
  half_w: Float[Array, "64 bS"],
  scores: Float[Array, "64 bS"],
  halves: Int[Array, "64 bS"],
) -> tuple[Float[Array, "64 bS"], Int[Array, "64 bS"]]:
  """Adds half_w (x + |x|) to the scores, shifts the bit of x > 0 into halves.

  Args:
    similarity: x, f32.
    half_w: Half of the head's weight.
    scores: Sum over the heads before, f32.
    halves: Bits of the heads before, int16.
  """
  columns = scores.shape[1]

  @threads.code(
    *[tiles.MATRIX] * 4,
    returns=(
      fragments.matrix(columns, jnp.float32),
      fragments.matrix(columns, jnp.int16),
    ),
  )
  def emit(similarity, half_w, scores, halves):
    new_scores, new_halves = add_head_registers(
      fragments.floats(similarity),
      fragments.floats(half_w),
      fragments.floats(scores),
      fragments.words(halves),
    )
    return (
      fragments.of_floats(new_scores),
      fragments.of_words(new_halves, jnp.int16),
    )

  return emit(similarity, half_w, scores, halves)


def add_head_registers(
  similarity: Sequence[F32],
  half_w: Sequence[F32],
  scores: Sequence[F32],
  halves: Sequence[U32],
) -> tuple[list[F32], list[U32]]:
  """Does `add_head` in this thread's registers."""
  new_scores, new_halves = [], []
  one = U32(0x00010001)
  for i, old in enumerate(halves):
    twice = []
    for at in (2 * i, 2 * i + 1):
      x = similarity[at]
      twice.append(x + abs(x))
      new_scores.append(half_w[at].multiply_add(twice[-1], scores[at]))
    # The upper halves of two f32: positive or 0, as integers too.
    bits = twice[0].bits().pick_bytes(twice[1].bits(), _UPPER).min_halves(one)
    new_halves.append(old + old + bits)
  return new_scores, new_halves


def join(even: Int[Array, "64 bS"], odd: Int[Array, "64 bS"]) -> jax.Array:
  """Joins the bits of even heads, low, and odd ones, high: int32 [64, bS]."""

  @threads.code(
    *[tiles.MATRIX] * 2, returns=fragments.matrix(even.shape[1], jnp.int32)
  )
  def emit(even, odd):
    words = join_registers(fragments.words(even), fragments.words(odd))
    return fragments.of_integers(words)

  return emit(even, odd)


def join_registers(even: Sequence[U32], odd: Sequence[U32]) -> list[U32]:
  """Does `join` in this thread's registers."""
  return [
    low.pick_bytes(high, half)
    for low, high in zip(even, odd, strict=True)
    for half in (_LOWER, _UPPER)
  ]


def heads_by_keys(d_scores: Any, active: Any) -> jax.Array:
  """g of one query, [64 heads, keys] in bfloat16.

  Args:
    d_scores: Of the query's keys, in shared memory, bfloat16.
    active: The keys' words, [2, keys] in shared memory.
  """
  [keys] = d_scores.shape

  @threads.code(
    *[threads.REF] * 2, returns=fragments.matrix(keys, jnp.bfloat16)
  )
  def emit(d_scores, active):
    g = heads_by_keys_registers(
      memory.Array(d_scores), memory.Array(active), keys
    )
    return fragments.of_words(g)

  return emit(d_scores, active)


def heads_by_keys_registers(
  d_scores: memory.Array, active: memory.Array, keys: int
) -> list[U32]:
  """This thread's registers of `heads_by_keys`: see `fragments`.

  The bit of head r of the warp's 16 is number r // 2 of its byte, that of head
  r + 8 is 4 further. The parity of r says which half of the word has the byte,
  that of the warp which one of the half it is.
  """
  warp, r, c = fragments.place()
  odd, second = r & 1, warp & 1
  word = warp >> 1
  half = odd.differs(0).where(_UPPER, _LOWER)
  shift = 3 - (r >> 1)
  signs = second.differs(0).where(_SIGNS[1], _SIGNS[0])
  g = []
  for i in range(keys // 8):
    key = 8 * i + (c << 1)
    left, right = active.load_words(2, word, key)
    [d] = d_scores.load_words(1, key)
    eighth = left.pick_bytes(right, half) << shift
    for bits in (eighth << 4, eighth):
      g.append(bits.pick_bytes(bits, signs) & d)
  return g


def keys_by_heads(d_scores: Any, active: Any) -> jax.Array:
  """g of one query, [64 keys, 64 heads] in bfloat16; see `heads_by_keys`."""

  @threads.code(
    *[threads.REF] * 2, returns=fragments.matrix(HEADS, jnp.bfloat16)
  )
  def emit(d_scores, active):
    g = keys_by_heads_registers(memory.Array(d_scores), memory.Array(active))
    return fragments.of_words(g)

  return emit(d_scores, active)


def keys_by_heads_registers(
  d_scores: memory.Array, active: memory.Array
) -> list[U32]:
  """This thread's registers of `keys_by_heads`: see `fragments`."""
  warp, r, c = fragments.place()
  shift = 3 - c
  rows = []
  for half in range(2):
    key = (warp << 4) + r + 8 * half
    d = d_scores.load(key)
    d = d.pick_bytes(d, 0x1010)
    row = []
    for word in range(WORDS):
      # Heads 2 c + 8 i and the next: bits c + 4 i of the two halves.
      odd = active.load(word, key) << shift
      even = odd << 4
      for i in range(4):
        bits = (even, odd)[i % 2]
        row.append(bits.pick_bytes(bits, _SIGNS[i // 2]) & d)
    rows.append(row)
  return [register for pair in zip(*rows) for register in pair]
