"""Attention mask of the selected keys, one bit for each query and key.

Bit i of word j says whether the query reads key 32 j + i: an array of T x S
bits, for S so small that this is no more than the indices of the selected keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

BITS = 32


def from_indices(
  indices: Int[Array, "B T K"], S: int
) -> UInt32[Array, "B T W"]:
  """Sets the bit of each index; indices outside [0, S) are ignored.

  An index may occur at most once in a row.
  """
  B, T, _ = indices.shape
  W = -(-S // BITS)
  valid = (indices >= 0) & (indices < S)
  at = jnp.where(valid, indices // BITS, W)  # W: dropped
  bit = jnp.uint32(1) << (indices % BITS).astype(jnp.uint32)

  def row(at, bit):
    # Each bit is added at most once, so the sum is the bitwise or.
    return jnp.zeros(W, jnp.uint32).at[at].add(bit, mode="drop")

  return jax.vmap(row)(at.reshape(B * T, -1), bit.reshape(B * T, -1)).reshape(
    B, T, W
  )


def unpack(
  mask_bits: UInt32[Array, "T W"], keys: Int[Array, " S"]
) -> Bool[Array, "T S"]:
  """Unpacks the bits of `keys`; keys beyond the last word are False."""
  taken = jnp.take(mask_bits, keys // BITS, axis=-1, mode="fill", fill_value=0)
  return (taken >> (keys % BITS).astype(jnp.uint32)[None]) & 1 != 0


def within(
  mask_bits: UInt32[Array, "B T W"],
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
) -> UInt32[Array, "B T W"]:
  """Clears the bits of all keys outside [start, end)."""
  first = BITS * jnp.arange(mask_bits.shape[-1], dtype=jnp.int32)[None, None]

  def below(bound):
    """Bits of the keys below `bound`."""
    n = jnp.clip(bound[..., None].astype(jnp.int32), first, first + BITS)
    n = (n - first).astype(jnp.uint32)
    some = (jnp.uint32(1) << jnp.minimum(n, BITS - 1)) - 1
    return jnp.where(n == BITS, ~jnp.uint32(0), some)

  return mask_bits & below(end) & ~below(start)


def transpose(mask_bits: UInt32[Array, "B T W"]) -> UInt32[Array, "B S V"]:
  """Swaps queries and keys: S = 32 W keys, V = ceil(T / 32) words each."""
  B, T, W = mask_bits.shape
  V = -(-T // BITS)
  mask_bits = jnp.pad(mask_bits, [(0, 0), (0, BITS * V - T), (0, 0)])
  words_BVQW = mask_bits.reshape(B, V, BITS, W)  # Q: query within its word
  i_BVQWK = jax.lax.broadcasted_iota(jnp.uint32, (1, 1, 1, 1, BITS), 4)
  q_BVQWK = i_BVQWK.swapaxes(2, 4)
  bits_BVQWK = (words_BVQW[..., None] >> i_BVQWK) & 1
  words_BVWK = jnp.sum(bits_BVQWK << q_BVQWK, axis=2, dtype=jnp.uint32)
  return words_BVWK.reshape(B, V, BITS * W).swapaxes(1, 2)
