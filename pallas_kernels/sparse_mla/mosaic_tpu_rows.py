"""How rows of keys come from HBM into the VMEM of a TPU: one copy for each.

A copy may start anywhere along a dimension only if that dimension has no tiles.
So a row lies in HBM as [W, 1, 128], whose tiles are of 1 x 128 numbers, one
after another; and in VMEM each of its W parts goes to a plane of its own, where
parts that follow each other are what an array [bK, 128] is made of. Two
bfloat16 numbers travel as one of 32 bits.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

LANES = 128
_UNROLLED = 32  # copies in the body of the loop that starts them


def parts(width: int, itemsize: int) -> int:
  """W: how many times 128 numbers of 32 bits a row takes."""
  return pl.cdiv(pl.cdiv(width, LANES), 4 // itemsize)


def pack(kv: Float[Array, "B S D"], bK: int) -> Shaped[Array, "B rows W 1 128"]:
  """Rows as they are copied from, and `bK` rows of zeros after them.

  Part w of a bfloat16 row holds the numbers from 128 w on in its lower bits,
  those from 128 (w + W) on in its upper ones.
  """
  B, S, D = kv.shape
  W, ratio = parts(D, kv.dtype.itemsize), 4 // kv.dtype.itemsize
  kv = jnp.pad(kv, [(0, 0), (0, bK), (0, W * ratio * LANES - D)])
  kv = kv.reshape(B, S + bK, ratio, W, 1, LANES)
  if ratio == 1:
    return kv[:, :, 0]
  halves = jax.lax.bitcast_convert_type(kv, jnp.uint16).astype(jnp.int32)
  return halves[:, :, 0] | halves[:, :, 1] << 16


def start(copy: Callable[[Any, Any], Any], keys: Any, itemsize: int) -> None:
  """Starts `copy(key, place)` for each entry of a tile's list, keys[bK].

  bfloat16 rows come to lie in pairs, the second in the upper bits: the first of
  each pair is copied to the first half of a plane, the second to the other.
  """
  bK, pair = keys.shape[0], 4 // itemsize
  unrolled = min(_UNROLLED, bK)

  @pl.loop(0, bK // unrolled)
  def _(i):
    # Offsets from here on are constants of the instructions.
    some = keys.at[pl.ds(pl.multiple_of(i * unrolled, unrolled), unrolled)]
    place = i * (unrolled // pair)
    for j in range(unrolled):
      copy(some[j], place + (j % pair * (bK // pair) + j // pair)).start()


def wait(buffer: Any, semaphore: Any) -> None:
  """Waits for copies that fill, or empty, a whole buffer."""
  pltpu.make_async_copy(buffer, buffer, semaphore).wait()


def planes(buffer: Any, interpret: Any) -> Any:
  """A buffer [W, bK, 1, 128] as [W, bK, 128]: the same bytes."""
  W, bK, _, lanes = buffer.shape
  # Interpret mode knows no reshaped references; it does not need them either.
  return buffer.at[:, :, 0] if interpret else buffer.reshape(W, bK, lanes)


def unpack(planes: Any, keys: Any) -> None:
  """Writes the rows that were copied as keys [bK, nD 128]."""
  W, bK, _ = planes.shape
  n_chunks = keys.shape[1] // LANES

  def put(chunk, x):
    if chunk < n_chunks:
      keys[:, pl.ds(chunk * LANES, LANES)] = x

  for w in range(W):
    if keys.dtype.itemsize == 4:
      put(w, planes[w])
      continue
    even, odd = planes[w, : bK // 2], planes[w, bK // 2 :]
    lower = even & 0xFFFF | odd << 16
    upper = jax.lax.shift_right_logical(even, 16) | odd & ~0xFFFF
    put(w, pltpu.bitcast(lower, keys.dtype))
    put(w + W, pltpu.bitcast(upper, keys.dtype))
