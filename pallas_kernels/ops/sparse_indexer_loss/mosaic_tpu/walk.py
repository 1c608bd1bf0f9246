"""Loop of the TPU kernels over the keys selected by neighbouring queries.

They read rows of keys as `sparse_mla` does: a block of bQ queries has a list,
whose tiles are a union of their selected keys, or one query's own keys. A tile
is prefetched during the computation of the previous ones.

Between the kernels, a block has `places` tiles [bQ, bK], one for each tile of a
union. Without a union, a query's tiles are its rows of the first ones.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.tpu import chip as tpu
from pallas_kernels.tpu import row_copies as rows_lib
from pallas_kernels.tpu import row_plan as plan_lib

# Most products (queries x heads) with a tile of keys that are computed at once.
_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class Walk:
  """Context shared by the kernels.

  Attributes:
    plan: Keys that the blocks read, [B, nQ, ...].
    tiles: Tile sizes of the plan.
    places: Tiles that a block has between the kernels.
    cores: Cores that share the blocks of a batch row.
  """

  plan: plan_lib.Plan
  tiles: plan_lib.Tiles
  places: int
  cores: int

  def split(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B nQ bQ ..."]:
    """Splits queries into blocks."""
    return x.reshape(x.shape[0], -1, self.tiles.bQ, *x.shape[2:])

  def run(
    self,
    name: str,
    body: Callable[..., None],
    keys: Float[Array, "B S D"],
    blocks: Sequence[Shaped[Array, "B nQ ..."]],
    outs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any] = (),
    sums: bool = False,
  ) -> Sequence[jax.Array]:
    """Runs `body(tiles, *refs)` for each block.

    Args:
      name: The kernel's name.
      body: Gets a `Tiles` and then references, to the block's part of `blocks`
        and `outs`, to each core's sums [cores, pieces, 1, 128], and to
        `scratch`.
      keys: Keys whose rows are read.
      blocks: Inputs by block.
      outs: Outputs by block, [B, nQ, ...].
      scratch: Scratch memory of the body.
      sums: Whether the body adds something to rows, float32, that begin as 0.
        They are in HBM, at the same pieces as the keys' rows.

    Returns:
      `outs`, and the sums [B, S, D].
    """
    bQ, bK = self.tiles.bQ, self.tiles.bK
    (B, nQ, _, _), (_, S, D) = self.plan.codes.shape, keys.shape
    steps, n_chunks = nQ // self.cores, -(-D // rows_lib.LANES)
    pitch = n_chunks if sums else rows_lib.parts(D, keys.dtype.itemsize)
    pieces = rows_lib.listed(self.plan, S, self.tiles, self.cores, pitch)
    rows = rows_lib.pack(keys, bK, pitch)
    all_sums = [jnp.zeros((self.cores, *rows.shape), jnp.float32)] * sums
    interpret = tpu.interpret()

    def spec(x, space=None):
      zeros = (0,) * (x.ndim - 2)
      index_map = lambda c, b, i: (b, c * steps + i, *zeros)
      shape = None, None, *x.shape[2:]
      return pl.BlockSpec(shape, index_map, memory_space=space)

    def kernel(*refs):
      (block, pieces, codes, rows), refs = refs[:4], refs[4:]
      given, refs = refs[: len(blocks)], refs[len(blocks) + len(all_sums) :]
      refs, buffers = refs[:-4], refs[-4:]
      stream = rows_lib.Stream(block, pieces, rows, *buffers, interpret)
      body(Tiles(stream, codes), *given, *refs)

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    first_sums = 4 + len(blocks)
    results = pl.pallas_call(
      kernel,
      name=f"sparse_indexer_loss_{name}_q{bQ}_k{bK}",
      grid=(self.cores, B, steps),
      in_specs=[
        spec(self.plan.blocks, pltpu.SMEM),
        spec(pieces, pltpu.SMEM),
        spec(self.plan.codes),
        *(hbm, *map(spec, blocks), *[hbm] * len(all_sums)),
      ],
      out_specs=[*map(spec, outs), *[hbm] * len(all_sums)],
      out_shape=[
        *outs,
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in all_sums),
      ],
      input_output_aliases={
        first_sums + i: len(outs) + i for i in range(len(all_sums))
      },
      scratch_shapes=[
        *scratch,
        *rows_lib.scratch(D, keys.dtype, bK),
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=tpu.chip().vmem,
        # A check for each copy would cost more than the copies.
        disable_bounds_checks=True,
      ),
      interpret=interpret,
    )(
      *(self.plan.blocks, pieces, self.plan.codes),
      *(rows, *blocks, *all_sums),
    )
    if not sums:
      return results
    total = results[-1].sum(0).reshape(B, S + bK, n_chunks * rows_lib.LANES)
    return *results[:-1], total[:, :S, :D]


def places(K: int, tiles: plan_lib.Tiles) -> int:
  """Number of tiles of a block between the kernels, see `Walk.places`."""
  longest = min(tiles.longest_union, tiles.bQ)
  return max(-(-longest * K // tiles.bK), rows_lib.PREFETCHED)


def walk(indices: Int[Array, "B T K"], S: int, tiles: plan_lib.Tiles) -> Walk:
  """Plans the loop; T is a multiple of bQ times the cores."""
  plan = plan_lib.plan(indices, S, tiles)
  return Walk(plan, tiles, places(indices.shape[2], tiles), tpu.chip().cores)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """A block's tiles of keys, inside a kernel.

  Attributes:
    stream: The rows of keys, and which they are.
    codes: Keys and bits of the queries that selected them, as a vector.
  """

  stream: rows_lib.Stream
  codes: Any

  def visit(
    self,
    heads: int,
    bQ: int,
    compute: Callable[[Any, Any, Any, int], None],
    read: Callable[[Any], None] = lambda tile: None,
    start: Callable[[Any, int, int], None] = lambda tile, part, n_parts: None,
    end: Callable[[Any], None] = lambda tile: None,
  ) -> None:
    """Calls `compute(tile, place, first, n)` with each tile of keys.

    Args:
      heads: Heads of a query.
      bQ: Queries of the block.
      compute: Computes the tile `tile` for `n` queries from `first` on; `place`
        is their tile between the kernels.
      read: Called before a tile.
      start: Called before each `compute`, to start part of the prefetch.
      end: Called after a tile.
    """
    stream = self.stream
    is_union, tiles_apart = stream.block[0, 1], self.codes.shape[0] // bQ
    group = min(bQ, 1 << max(_AT_ONCE // heads, 1).bit_length() - 1)
    n_parts = bQ // group
    stream.open()

    @pl.loop(0, stream.n_tiles)
    def _(tile):
      stream.read(tile)
      read(tile)

      @pl.when(is_union == 1)
      def _():
        for part in range(n_parts):
          start(tile, part, n_parts)
          stream.start(tile, part, n_parts)
          compute(tile, tile, part * group, group)

      @pl.when(is_union == 0)
      def _():
        start(tile, 0, 1)
        stream.start(tile)
        compute(tile, tile % tiles_apart, tile // tiles_apart, 1)

      end(tile)

    stream.close()

  def chosen(self, tile: Any, first: Any, n: int) -> Any:
    """Mask [n, bK] of the tile's keys that each of `n` queries selected."""
    shape = n, self.codes.shape[1]
    query = first + jax.lax.broadcasted_iota(self.codes.dtype, shape, 0)
    return (self.codes[pl.ds(tile, 1)] >> query & 1) == 1
