"""Attention mask of the selected keys, in the bit order that TPUs unpack.

Bit b of word [w, l] is key 4096 w + 128 b + l, so that one shift of 128 words
unpacks the mask of 128 adjacent keys.

Bits are set without a scatter. A selected key is the outer product of a column,
which holds the power of two of its bit at its half of a word, and a row, which
holds a one at its lane; one matrix product sums these over all selected keys.
It is exact: bfloat16 represents powers of two, and sums stay below 2^16.
"""

from typing import Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products

_HALF: Final = 16  # bits
_QUERIES: Final = 32  # per grid step


def from_indices(
  indices: Int[Array, "B T K"],
  start: Int[Array, "B T"],
  end: Int[Array, "B T"],
  S: int,
) -> Int[Array, "B T nW 128"]:
  """Sets the bits of the indices in [start, end); none may occur twice."""
  B, T, _ = indices.shape
  nW = -(-S // (2 * _HALF * lanes.LANES))
  rows = -(-nW // 8) * 8
  inside = (indices >= start[..., None]) & (indices < end[..., None])
  indices = jnp.where(inside, indices, -1).astype(jnp.int32)
  indices = lanes.pad(indices, _QUERIES, lanes.LANES, fill=-1)
  _, paddedT, K = indices.shape
  packed = pl.pallas_call(
    _kernel,
    grid=(B, paddedT // _QUERIES),
    in_specs=[pl.BlockSpec((None, _QUERIES, K), lambda b, i: (b, i, 0))],
    out_specs=pl.BlockSpec(
      (None, _QUERIES, rows, lanes.LANES), lambda b, i: (b, i, 0, 0)
    ),
    out_shape=jax.ShapeDtypeStruct((B, paddedT, rows, lanes.LANES), jnp.int32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel")
    ),
    interpret=tpu.interpret(),
    name=f"dense_mla_mask_bits_q{_QUERIES}",
  )(indices)
  return packed[:, :T, :nW]


def _kernel(indices, packed):
  rows, K = packed.shape[1], indices.shape[1]
  # First the lower halves of all words, then the upper halves.
  row = lax.broadcasted_iota(jnp.int32, (2 * rows, K), 0)
  half_of_row = jnp.where(row < rows, 2 * row, 2 * (row - rows) + 1)
  column = lax.broadcasted_iota(jnp.int32, (lanes.LANES, K), 0)

  @pl.loop(0, _QUERIES, unroll=2)
  def _(t):
    index = indices[pl.ds(t, 1)]
    bit = (index >> 7) & (_HALF - 1)
    power = lax.bitcast_convert_type((bit + 127) << 23, jnp.float32)
    halves = jnp.where(
      half_of_row == index >> 11, power, 0.0
    ).astype(jnp.bfloat16)  # fmt: skip
    columns = jnp.where(column == (index & (lanes.LANES - 1)), 1.0, 0.0).astype(
      jnp.bfloat16
    )
    sums = products.dot(halves, columns, products.NT).astype(jnp.int32)
    packed[t] = sums[:rows] | (sums[rows:] << _HALF)


def unpack(
  mask_bits: Int[Array, "X Y"], first_key: Int[Array, ""], keys: int, axis: int
) -> Bool[Array, "..."]:
  """Unpacks the mask of the `keys` keys from `first_key` on.

  Args:
    mask_bits: The words that hold these keys; 128 along `axis`.
    first_key: A multiple of `keys`.
    keys: Number of keys; a multiple of 128.
    axis: Axis of the keys in the result.
  """
  bit = first_key // lanes.LANES % 32
  # The bit becomes the sign.
  parts = [mask_bits << (31 - bit - x) < 0 for x in range(keys // lanes.LANES)]
  return jnp.concatenate(parts, axis)
