"""Products of blocks of rows with the matrices of their groups, on Hopper.

Reading the matrices is all the time there is. So the thread blocks, one for
each multiprocessor, go through all tiles of the results, a tile being some
columns of a block of rows, and a warpgroup copies the matrices' tiles into a
ring of shared memory, on and on across the tiles of the results. One or two
other warpgroups multiply.

A tensor core's product has 64 rows at least, which are the matrix's columns:
yᵀ = wᵀ xᵀ, of as many columns as there are rows in a block.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import tiles

ROWS: Final = (8, 16, 32, 64, 128)  # of a block
COLUMNS: Final = 128  # the matrices' widths are multiples of it
_BLOCKS: Final = 132  # multiprocessors of an H100 or H200
_WIDTH: Final = 64  # of a tile of a matrix: the rows of a product
_TILE_BYTES: Final = 32 << 10  # of the matrices in a slot of the ring
_MOST_ROWS_ALONE: Final = 16  # that one warpgroup multiplies


def product(
  x: Float[Array, "P D"],
  weights: tuple[Float[Array, "X D F"], ...],
  group: Int[Array, " G"],
  count: Int[Array, " 1"],
) -> Float[Array, "P F"]:
  """Computes `x w` for each block of rows and the matrix of its group.

  Of two matrices it computes `silu(x w) * (x v)`, and rounds the products and
  the result.

  Args:
    x: Rows; P / G, one of `ROWS`, are a block's. bfloat16.
    weights: One matrix or two of each group; D and F are multiples of
      `COLUMNS`.
    group: Each block's.
    count: The number of blocks; of those beyond it the results are undefined.
  """
  (P, D), F = x.shape, weights[0].shape[2]
  plan = _Plan.of(P // len(group), D, F, len(weights))
  return plgpu.kernel(
    functools.partial(_kernel, plan=plan),
    out_type=jax.ShapeDtypeStruct((P, F), x.dtype),
    grid=(_BLOCKS,),
    grid_names=("block",),
    num_threads=plan.warpgroups + 1,
    thread_name="warpgroup",
    scratch_types=[_Shared.types(plan)],
    compiler_params=tiles.BY_HAND,
    kernel_name="grouped_mlp",
  )(_Operands(x, weights, group, count))


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Sizes of a kernel's tiles."""

  rows: int
  """Of a block."""
  matrices: int
  warpgroups: int
  """That multiply."""
  depth: int
  """Of a tile in the contracted dimension."""
  steps: int
  """Tiles of the contracted dimension."""
  columns: int
  """Tiles of the result's columns."""

  @classmethod
  def of(cls, rows: int, D: int, F: int, matrices: int) -> "_Plan":
    # With two, x is read half as often; with one, the tiles are more, so that
    # the thread blocks have about equally many of them.
    warpgroups = 1 if rows <= _MOST_ROWS_ALONE else 2
    row_bytes = 2 * matrices * warpgroups * _WIDTH
    depth = min(_TILE_BYTES // row_bytes, COLUMNS)  # which divides D
    return cls(
      rows=rows,
      matrices=matrices,
      warpgroups=warpgroups,
      depth=depth,
      steps=D // depth,
      columns=F // (warpgroups * _WIDTH),
    )

  @property
  def stages(self) -> int:
    """Slots of the ring."""
    width = self.matrices * self.warpgroups * _WIDTH + self.rows
    out = self.warpgroups * self.rows * _WIDTH
    return (tiles.SHARED_MEMORY - 2 * out) // (2 * self.depth * width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Operands:
  """Arguments of `product` in device memory."""

  x: Any
  weights: Any
  group: Any
  count: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shared:
  """Shared memory, and barriers there; slots of the ring come first."""

  x: Any
  weights: Any  # by warpgroup, for each matrix
  out: Any  # by warpgroup
  full: Any
  free: Any

  @classmethod
  def types(cls, plan: _Plan) -> Any:
    n, depth, warpgroups = plan.stages, plan.depth, plan.warpgroups
    tile = tiles.shared((n, warpgroups, depth, _WIDTH))
    copies = 1 + warpgroups * plan.matrices
    return cls(
      x=tiles.shared((n, plan.rows, depth)),
      weights=(tile,) * plan.matrices,
      out=tiles.shared((warpgroups, plan.rows, _WIDTH)),
      full=plgpu.Barrier(num_barriers=n, num_arrivals=copies),
      free=plgpu.Barrier(num_barriers=n, num_arrivals=warpgroups),
    )


def _kernel(operands, out, shared, *, plan):
  wg = lax.axis_index("warpgroup")
  walk = _Walk(plan, operands.count[0], lax.axis_index("block"))

  @pl.when(wg == plan.warpgroups)
  def _():
    if plan.warpgroups > 1:  # one has few rows, and registers enough
      plgpu.set_max_registers(40, action="decrease")
    _copy(operands, shared, walk)

  @pl.when(wg < plan.warpgroups)
  def _():
    if plan.warpgroups > 1:
      plgpu.set_max_registers(232, action="increase")
    acc = plgpu.ACC((_WIDTH, plan.rows), jnp.float32)
    pl.run_scoped(
      lambda *accs: _multiply(out, shared, walk, wg, accs),
      *(acc,) * plan.matrices,
    )


@dataclasses.dataclass(frozen=True)
class _Walk:
  """A thread block's way through the tiles of the results."""

  plan: _Plan
  count: Int[Array, ""]
  """Blocks of rows."""
  first: Int[Array, ""]
  """Tile."""

  def visit(self, body: Callable[[Any, Any, Any], None]) -> None:
    """Calls `body(i, block of rows, tile of columns)` for this block's i-th."""
    all_tiles = self.count * self.plan.columns
    mine = lax.div(all_tiles - self.first + _BLOCKS - 1, _BLOCKS)

    def step(i, _):
      tile = self.first + i * _BLOCKS
      columns = self.plan.columns
      body(i, lax.div(tile, columns), lax.rem(tile, columns))

    lax.fori_loop(0, mine, step, None)

  def slot(self, step: Int[Array, ""]) -> Int[Array, ""]:
    return lax.rem(step, self.plan.stages)

  def column(self, tile: Int[Array, ""], wg: Any) -> Any:
    """Slice of a warpgroup's columns."""
    return pl.ds((tile * self.plan.warpgroups + wg) * _WIDTH, _WIDTH)


def _copy(operands, shared, walk):
  """Copies the tiles of rows and matrices into the ring."""
  plan = walk.plan

  def copy_all(i, block, tile):
    group = operands.group[block]
    rows = pl.ds(block * plan.rows, plan.rows)

    def step(k, _):
      at = i * plan.steps + k
      slot = walk.slot(at)
      full = shared.full.at[slot]
      pl.when(at >= plan.stages)(
        lambda: plgpu.barrier_wait(shared.free.at[slot])
      )
      depth = pl.ds(k * plan.depth, plan.depth)
      for source, target in zip(operands.weights, shared.weights, strict=True):
        for wg in range(plan.warpgroups):
          plgpu.copy_gmem_to_smem(
            source.at[group, depth, walk.column(tile, wg)],
            target.at[slot, wg],
            full,
          )
      plgpu.copy_gmem_to_smem(
        operands.x.at[rows, depth], shared.x.at[slot], full
      )

    lax.fori_loop(0, plan.steps, step, None)

  walk.visit(copy_all)


def _multiply(out, shared, walk, wg, accs):
  """Multiplies a warpgroup's columns of each tile."""
  plan = walk.plan

  def multiply_all(i, block, tile):
    for acc in accs:
      acc[...] = tiles.zeros(plan.rows)

    def step(k, _):
      slot = walk.slot(i * plan.steps + k)
      plgpu.barrier_wait(shared.full.at[slot])
      x = shared.x.at[slot].transpose((1, 0))
      for acc, weights in zip(accs, shared.weights, strict=True):
        plgpu.wgmma(acc, weights.at[slot, wg].transpose((1, 0)), x)
      plgpu.wgmma_wait(len(accs))  # for the step before

      @pl.when(k > 0)
      def _():
        free(i * plan.steps + k - 1)

    def free(at):
      plgpu.barrier_arrive(shared.free.at[walk.slot(at)])

    lax.fori_loop(0, plan.steps, step, None)
    products = [plgpu.wgmma_accumulator_load(acc) for acc in accs]
    free((i + 1) * plan.steps - 1)
    # The tile before may still be being written.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    result = plgpu.layout_cast(
      _combine(products).astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED
    )
    shared.out.at[wg].transpose((1, 0))[...] = result
    plgpu.commit_smem()
    rows = pl.ds(block * plan.rows, plan.rows)
    plgpu.copy_smem_to_gmem(
      shared.out.at[wg], out.at[rows, walk.column(tile, wg)]
    )

  walk.visit(multiply_all)
  plgpu.wait_smem_to_gmem(0)


def _combine(products):
  """The product itself; of two, `silu` of the first times the second."""
  if len(products) == 1:
    return products[0]
  gate, up = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in products)
  return jax.nn.silu(gate) * up
