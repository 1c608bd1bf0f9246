"""How the kernels of a TPU walk over what neighbouring queries chose.

They read rows of keys as `sparse_mla` does: a block of bQ queries has a list,
whose tiles are a union of what they chose, or one query's own keys. A tile is
copied while the one before is computed with.

Between the kernels, a block has `places` tiles [bQ, bK], one for each tile of a
union. Where the keys are apart, a query's tiles are its rows of the first ones.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import tpu
from pallas_kernels.sparse_mla import mosaic_tpu_plan as plan_lib
from pallas_kernels.sparse_mla import mosaic_tpu_rows as rows_lib

# Products (queries x heads) with a tile of keys that are made at once, at most.
_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class Walk:
  """What the kernels have in common.

  Attributes:
    plan: What the blocks read, [B, nQ, ...].
    tiles: What it was made with.
    places: Tiles that a block has between the kernels.
    cores: How many share the blocks of a batch row, in turn.
  """

  plan: plan_lib.Plan
  tiles: plan_lib.Tiles
  places: int
  cores: int

  def split(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B nQ bQ ..."]:
    """By block."""
    return x.reshape(x.shape[0], -1, self.tiles.bQ, *x.shape[2:])

  def run(
    self,
    name: str,
    body: Callable[..., None],
    keys: Float[Array, "B S D"],
    blocks: Sequence[Shaped[Array, "B nQ ..."]],
    outs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any] = (),
    sums: Sequence[Float[Array, "cores B ..."]] = (),
  ) -> Sequence[jax.Array]:
    """`body(tiles, *refs)` for each block.

    Args:
      name: The kernel's name.
      body: Gets a `Tiles` and then references, to the block's part of `blocks`
        and `outs`, to `sums` in HBM, and to `scratch`.
      keys: Whose rows are read.
      blocks: What is given by block.
      outs: What is returned by block, [B, nQ, ...].
      scratch: Memory of the body.
      sums: What one core changes, block after block.

    Returns:
      `outs` and `sums`.
    """
    bQ, bK = self.tiles.bQ, self.tiles.bK
    B, nQ, nK, _ = self.plan.codes.shape
    steps, D = nQ // self.cores, keys.shape[2]
    rows = rows_lib.pack(keys, bK)
    interpret = tpu.interpret()

    def spec(x, space=None):
      zeros = (0,) * (x.ndim - 2)
      index_map = lambda c, b, i: (b, c * steps + i, *zeros)
      shape = None, None, *x.shape[2:]
      return pl.BlockSpec(shape, index_map, memory_space=space)

    def kernel(*refs):
      tile_refs, refs = refs[:4], refs[4:]
      given, refs = refs[: len(blocks)], refs[len(blocks) + len(sums) :]
      refs, buffers = refs[:-3], refs[-3:]
      body(Tiles(*tile_refs, *buffers, interpret), *given, *refs)

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    first_sums = 4 + len(blocks)
    return pl.pallas_call(
      kernel,
      name=f"sparse_indexer_loss_{name}_q{bQ}_k{bK}",
      grid=(self.cores, B, steps),
      in_specs=[
        spec(self.plan.blocks, pltpu.SMEM),
        spec(self.plan.codes, pltpu.SMEM),
        spec(self.plan.codes),
        *(hbm, *map(spec, blocks), *[hbm] * len(sums)),
      ],
      out_specs=[*map(spec, outs), *[hbm] * len(sums)],
      out_shape=[
        *outs,
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums),
      ],
      input_output_aliases={
        first_sums + i: len(outs) + i for i in range(len(sums))
      },
      scratch_shapes=[
        *scratch,
        pltpu.VMEM((2, rows.shape[2], bK, 1, rows_lib.LANES), rows.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((bK, -(-D // rows_lib.LANES) * rows_lib.LANES), keys.dtype),
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=tpu.chip().vmem,
        # A check for each of the copies would cost more than the copies.
        disable_bounds_checks=True,
      ),
      interpret=interpret,
    )(
      *(self.plan.blocks, self.plan.codes >> bQ, self.plan.codes),
      *(rows, *blocks, *sums),
    )


def places(K: int, tiles: plan_lib.Tiles) -> int:
  """`Walk.places`."""
  return -(-min(tiles.longest_union, tiles.bQ) * K // tiles.bK)


def walk(indices: Int[Array, "B T K"], S: int, tiles: plan_lib.Tiles) -> Walk:
  """T is a multiple of bQ times the cores."""
  plan = plan_lib.plan(indices, S, tiles)
  return Walk(plan, tiles, places(indices.shape[2], tiles), tpu.chip().cores)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """A block's tiles of keys, inside a kernel.

  Attributes:
    block: How many there are, and whether they are a union.
    listed: The keys, as scalars.
    codes: Keys and who chose them, as a vector.
    rows: All keys, in HBM.
    buffers: Two tiles of rows, as they are copied.
    semaphores: Of the copies.
    keys: The tile that is computed with: [bK, D], D filled up.
    interpret: Whether the kernel is interpreted.
  """

  block: Any
  listed: Any
  codes: Any
  rows: Any
  buffers: Any
  semaphores: Any
  keys: Any
  interpret: Any

  def visit(
    self,
    heads: int,
    bQ: int,
    compute: Callable[[Any, Any, Any, int], None],
    begin: Callable[[Any], None] = lambda tile: None,
    end: Callable[[Any], None] = lambda tile: None,
  ) -> None:
    """Calls `compute(tile, place, first, n)` with each tile of keys.

    Args:
      heads: What a query has.
      bQ: Queries of the block.
      compute: Does what `n` queries, from `first` on, do with the tile `tile`;
        of the tiles between the kernels, theirs is `place`.
      begin: Called before a tile.
      end: Called after it.
    """
    n_tiles, is_union = self.block[0, 0], self.block[0, 1]
    tiles_apart = self.listed.shape[0] // bQ
    group = min(bQ, 1 << max(_AT_ONCE // heads, 1).bit_length() - 1)

    @pl.when(n_tiles > 0)
    def _():
      self._start(0)

    @pl.loop(0, n_tiles)
    def _(tile):
      @pl.when(tile + 1 < n_tiles)
      def _():
        self._start(tile + 1)

      begin(tile)
      slot = tile % 2
      rows_lib.wait(self.buffers.at[slot], self.semaphores.at[slot])
      planes = rows_lib.planes(self.buffers.at[slot], self.interpret)
      rows_lib.unpack(planes, self.keys)

      @pl.when(is_union == 1)
      def _():
        for first in range(0, bQ, group):
          compute(tile, tile, first, group)

      @pl.when(is_union == 0)
      def _():
        compute(tile, tile % tiles_apart, tile // tiles_apart, 1)

      end(tile)

  def chosen(self, tile: Any, first: Any, n: int) -> Any:
    """Whether each of the `n` queries chose each key of the tile: [n, bK]."""
    shape = n, self.codes.shape[1]
    query = first + jax.lax.broadcasted_iota(self.codes.dtype, shape, 0)
    return (self.codes[pl.ds(tile, 1)] >> query & 1) == 1

  def _start(self, tile):
    slot, batch = tile % 2, pl.program_id(1)
    rows_lib.start(
      lambda key, place: pltpu.make_async_copy(
        self.rows.at[batch, key],
        self.buffers.at[slot, :, place],
        self.semaphores.at[slot],
      ),
      *(self.listed.at[tile], self.keys.dtype.itemsize),
    )
