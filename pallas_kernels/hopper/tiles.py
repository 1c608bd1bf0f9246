"""Layouts of a kernel's arrays: tiles in shared memory, and registers."""

from typing import Any, Final

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

ROWS: Final = 64  # of a product, by one warpgroup
# Tiles for tensor cores, in shared memory: eights of rows of 128 bytes, whose
# 16-byte pieces are permuted within their row; NARROW: of rows of 64 bytes.
SWIZZLED: Final = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
NARROW: Final = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))
# The same of 8-bit numbers; and of float32, for TMA.
BYTES: Final = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
FLOATS: Final = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
_BY_SIZE: Final = {1: BYTES, 2: SWIZZLED, 4: FLOATS}
# A product's rows and columns, as a warpgroup holds them.
MATRIX: Final = plgpu.Layout.WGMMA
BY_ROW: Final = MATRIX.reduce(1)
BY_COLUMN: Final = MATRIX.reduce(0)
# Shared memory of a block in bytes, less the compiler's share.
SHARED_MEMORY: Final = 224 * 1024
# Parameters of kernels that place their barriers themselves, with exponentials
# and quotients to about 22 bits.
BY_HAND: Final = plgpu.CompilerParams(
  approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
)


def shared(shape: tuple[int, ...], dtype: DTypeLike = jnp.bfloat16) -> Any:
  """Scratch for tiles whose rows have 128 bytes."""
  return plgpu.SMEM(shape, dtype, transforms=transforms(dtype))


def transforms(dtype: DTypeLike) -> tuple[Any, ...]:
  """Layout of such tiles: `BYTES`, `SWIZZLED` or `FLOATS`."""
  return _BY_SIZE[jnp.dtype(dtype).itemsize]


def zeros(columns: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """Zeros of a product's layout, [64, columns]."""
  return plgpu.layout_cast(jnp.zeros((ROWS, columns), dtype), MATRIX)


def by_row(value: float) -> Float[Array, "64"]:
  """A number for each row of a product."""
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), BY_ROW)


def over_columns(x: Shaped[Array, "64"], columns: int) -> jax.Array:
  """Repeats each row's number over the columns: [64, columns]."""
  return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def over_rows(x: Shaped[Array, " columns"]) -> jax.Array:
  """Repeats each column's number over the rows: [64, columns]."""
  return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])


def load(ref: Any, layout: Any) -> jax.Array:
  """Loads an array into a layout, from device memory too."""
  return plgpu.load(ref, layout=layout, optimized=False)
