"""Attention to a range of keys on Hopper, forward.

A thread block takes 128 queries of one head and walks over the tiles of 128
keys that at least one of these queries sees. A producer warpgroup copies keys
and values into a two-stage ring buffer; two consumer warpgroups have 64 queries
each, whose output stays in registers. They ping-pong on the tensor cores:

  warpgroup 0   out += P V, logits of the next tile | softmax
  warpgroup 1   softmax                             | out += P V, logits ...

A tile that all of the block's queries see in full needs no mask: with causal
ranges, that is all but the last. With selected keys, every tile is masked by
bits.
"""

import dataclasses
import functools
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import softmax
from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import tiles
from pallas_kernels.ops.dense_mla.mosaic_gpu import mask_bits as mask_bits_lib
from pallas_kernels.ops.dense_mla.mosaic_gpu import walks

bT: Final = 128
bS: Final = 128
_COLUMNS: Final = 64  # of a tile of queries
_STAGES: Final = 2
_NEVER: Final = -1e30  # initial maximum; finite, since -inf would give NaN


def forward(
  q: Float[Array, "B tileableT N HR"],
  k: Float[Array, "B tileableS N HR"],
  v: Float[Array, "B tileableS N U"],
  start: Int[Array, "B paddedT"],
  end: Int[Array, "B paddedT"],
  plan: Int[Array, "B nT 4"],
  scale: float,
  mask_bits: Int[Array, "B nS paddedT 4"] | None = None,
) -> tuple[Float[Array, "B tileableT N U"], Float[Array, "B N paddedT"]]:
  """Computes the output and the logsumexp.

  Args:
    q: Queries; their number is a multiple of 8, and at least one tile.
    k: Keys; their number is a multiple of 8, and at least one tile.
    v: Values.
    start: First key of each query, padded to whole tiles of queries.
    end: One past the last key, at most S.
    plan: Result of `walks.over_keys`.
    scale: Scale of the logits; positive.
    mask_bits: Bits of the keys that each query reads, all in its range, padded
      to whole tiles of keys. A query that reads none has an empty range.
  """
  (B, T, N, HR), U = q.shape, v.shape[-1]
  nT = plan.shape[1]
  plan = plan.reshape(-1)
  if mask_bits is not None:
    mask_bits = mask_bits.reshape(-1, mask_bits.shape[-1])
  return plgpu.kernel(
    functools.partial(_kernel, scale=scale),
    out_type=(
      jax.ShapeDtypeStruct((B, T, N, U), q.dtype),
      jax.ShapeDtypeStruct((B, N, nT * bT), jnp.float32),
    ),
    # Heads one after the other, so that the blocks that run together share a
    # head's keys in L2.
    grid=(B * N * nT,),
    grid_names=("block",),
    num_threads=3,
    thread_name="wg",
    scratch_types=[_Shared.types(HR, U)],
    compiler_params=tiles.BY_HAND,
    kernel_name="dense_mla_forward",
  )(_Operands(q, k, v, start, end, plan, mask_bits))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Operands:
  """Arguments of `forward` in device memory."""

  q: Any
  k: Any
  v: Any
  start: Any
  end: Any
  plan: Any  # flat
  mask_bits: Any  # [rows, words of a tile], or None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shared:
  """Shared memory, and barriers there; slots of the ring buffer come first."""

  q: Any  # by warpgroup and _COLUMNS; at the end, the output
  k: Any
  v: Any
  lse: Any  # by warpgroup
  q_full: Any  # by warpgroup
  k_full: Any
  v_full: Any
  k_free: Any
  v_free: Any

  @classmethod
  def types(cls, HR: int, U: int) -> Any:
    parts = HR // _COLUMNS
    full = plgpu.Barrier(num_barriers=_STAGES)
    free = plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2)
    return cls(
      q=tiles.shared((2, parts, tiles.ROWS, _COLUMNS)),
      k=tiles.shared((_STAGES, bS, HR)),
      v=tiles.shared((_STAGES, bS, U)),
      lse=plgpu.SMEM((2, tiles.ROWS), jnp.float32),
      q_full=plgpu.Barrier(num_barriers=2, num_arrivals=parts),
      k_full=full,
      v_full=full,
      k_free=free,
      v_free=free,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Accumulators:
  """Accumulators of products, in registers."""

  out: Any
  logits: Any

  @classmethod
  def types(cls, U: int) -> Any:
    return cls(
      out=plgpu.ACC((tiles.ROWS, U), jnp.float32),
      logits=plgpu.ACC((tiles.ROWS, bS), jnp.float32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Softmax:
  """Softmax over the keys so far, of each query."""

  top: Float[Array, "64"]
  """Largest logit, in base 2."""
  total: Float[Array, "64"]
  """Sum of the weights, relative to that of the largest logit."""

  def add(
    self, logits: Float[Array, "64 bS"], scale: float
  ) -> tuple["_Softmax", Float[Array, "64"], Float[Array, "64 bS"]]:
    """Adds a tile of keys.

    Args:
      logits: Not scaled.
      scale: Makes them logits in base 2.

    Returns:
      The softmax with the tile; the factor of what was summed without it; the
      tile's weights.
    """
    top = jnp.maximum(self.top, jnp.max(logits, axis=1) * scale)
    keep = jnp.exp2(self.top - top)
    weights = jnp.exp2(logits * scale - tiles.over_columns(top, bS))
    total = self.total * keep + jnp.sum(weights, axis=1)
    return _Softmax(top, total), keep, weights


def _kernel(operands, out, lse, shared, *, scale):
  B, _, N, U = out.shape
  block, wg = lax.axis_index("block"), lax.axis_index("wg")
  # The last queries first: with causal ranges they take the longest.
  walk = walks.Walk.of_block(block, operands.plan, B, N, last_first=True)
  query = walk.tile * bT + wg * tiles.ROWS

  @pl.when(wg == 2)
  def _produce():
    plgpu.set_max_registers(40, action="decrease")
    _load(operands, shared, walk)

  @pl.when(wg < 2)
  def _consume():
    plgpu.set_max_registers(232, action="increase")
    consumer = _Consumer(operands, out, lse, shared, walk, scale, wg, query)
    consumer.load_queries()
    pl.run_scoped(consumer.attend, _Accumulators.types(U))


def _load(operands, shared, walk):
  """Copies the walk's keys and values into the ring buffer."""

  def step(i, _):
    slot = walk.slot(i, _STAGES)
    keys = pl.ds(i * bS, bS)

    def copy(source, target, full, free):
      pl.when(i - walk.first >= _STAGES)(
        lambda: plgpu.barrier_wait(free.at[slot])
      )
      source = source.at[walk.batch, keys, walk.head]
      plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

    copy(operands.k, shared.k, shared.k_full, shared.k_free)
    copy(operands.v, shared.v, shared.v_full, shared.v_free)

  lax.fori_loop(walk.first, walk.last, step, None)


@dataclasses.dataclass(frozen=True)
class _Consumer:
  """Warpgroup that attends from 64 queries."""

  operands: _Operands
  out: Any
  lse: Any
  shared: _Shared
  walk: walks.Walk
  scale: float
  wg: Int[Array, ""]
  """This one, 0 or 1."""
  query: Int[Array, ""]
  """Its first."""

  @property
  def queries(self) -> Any:
    return pl.ds(self.query, tiles.ROWS)

  def load_queries(self) -> None:
    for part in range(self.shared.q.shape[1]):
      columns = pl.ds(part * _COLUMNS, _COLUMNS)
      plgpu.copy_gmem_to_smem(
        self.operands.q.at[
          self.walk.batch, self.queries, self.walk.head, columns
        ],
        self.shared.q.at[self.wg, part],
        self.shared.q_full.at[self.wg],
      )

  def attend(self, acc: _Accumulators) -> None:
    """Walks over the keys in turns with the other warpgroup."""
    walk, turn = self.walk, barriers.PingPong(self.wg)
    acc.out[...] = tiles.zeros(acc.out.shape[1])
    plgpu.barrier_wait(self.shared.q_full.at[self.wg])
    pl.when(self.wg == 1)(turn.wait)
    self.multiply_logits(acc.logits, walk.first)
    turn.signal()
    so_far = _Softmax(top=tiles.by_row(_NEVER), total=tiles.by_row(0.0))
    step = functools.partial(self.step, acc, turn)
    so_far = lax.fori_loop(walk.first, walk.last - 1, step, so_far)
    so_far = step(walk.last - 1, so_far, is_last=True)
    pl.when(self.wg == 0)(turn.wait)
    self.write(acc.out, so_far)

  def step(
    self,
    acc: _Accumulators,
    turn: barriers.PingPong,
    i: Int[Array, ""],
    so_far: _Softmax,
    *,
    is_last: bool = False,
  ) -> _Softmax:
    """Adds tile `i` to the output, and multiplies the logits of the next."""
    slot = self.walk.slot(i, _STAGES)
    logits = self.logits(acc.logits, i, slot)
    so_far, keep, weights = so_far.add(logits, self.scale * softmax.LOG2E)
    weights = weights.astype(self.out.dtype)
    # Complete, as the logits are: there is nothing to wait for.
    out_TU = plgpu.wgmma_accumulator_load(acc.out, wait_n=None)
    acc.out[...] = out_TU * tiles.over_columns(keep, out_TU.shape[1])
    plgpu.barrier_wait(self.shared.v_full.at[slot])
    turn.wait()
    plgpu.wgmma(acc.out, weights, self.shared.v.at[slot])
    if not is_last:
      self.multiply_logits(acc.logits, i + 1)
    turn.signal()
    if not is_last:
      plgpu.wgmma_wait(self.shared.q.shape[1])  # all but the logits'
      plgpu.barrier_arrive(self.shared.v_free.at[slot])
    return so_far

  def multiply_logits(self, acc: Any, i: Int[Array, ""]) -> None:
    """Starts the products of a tile's logits."""
    slot = self.walk.slot(i, _STAGES)
    acc[...] = tiles.zeros(bS)
    plgpu.barrier_wait(self.shared.k_full.at[slot])
    for part in range(self.shared.q.shape[1]):
      columns = pl.ds(part * _COLUMNS, _COLUMNS)
      plgpu.wgmma(
        acc,
        self.shared.q.at[self.wg, part],
        self.shared.k.at[slot, :, columns].transpose((1, 0)),
      )

  def logits(
    self, acc: Any, i: Int[Array, ""], slot: Int[Array, ""]
  ) -> Float[Array, "64 bS"]:
    """Waits for a tile's logits, and masks them."""
    chosen = self.operands.mask_bits is not None
    bits = self.load_bits(i) if chosen else None
    logits = plgpu.wgmma_accumulator_load(acc)
    plgpu.barrier_arrive(self.shared.k_free.at[slot])
    if bits is not None:
      return mask_bits_lib.apply(logits, bits)
    return self.walk.mask(logits, i, lambda x: self.within_ranges(x, i))

  def load_bits(self, i: Int[Array, ""]) -> Int[Array, " numbers"]:
    ref, (B, _, T) = self.operands.mask_bits, self.lse.shape
    nS = ref.shape[0] // (B * T)
    row = (self.walk.batch * nS + i) * T + self.query
    return mask_bits_lib.load(ref, row, bS // 32)

  def within_ranges(
    self, logits: Float[Array, "64 bS"], i: Int[Array, ""]
  ) -> Float[Array, "64 bS"]:
    key = plgpu.broadcasted_iota(
      jnp.int32, logits.shape, 1, layout=tiles.MATRIX
    )
    key += i * bS
    seen = (key >= tiles.over_columns(self.of_queries("start"), bS)) & (
      key < tiles.over_columns(self.of_queries("end"), bS)
    )
    return jnp.where(seen, logits, -jnp.inf)

  def of_queries(self, bound: str) -> Int[Array, "64"]:
    ref = getattr(self.operands, bound)
    return tiles.load(ref.at[self.walk.batch, self.queries], tiles.BY_ROW)

  def write(self, acc: Any, whole: _Softmax) -> None:
    """Writes the output and the logsumexp."""
    out_TU = plgpu.wgmma_accumulator_load(acc)
    alive = self.of_queries("start") < self.of_queries("end")
    inverse = jnp.where(alive, 1 / whole.total, 0.0)
    over_U = functools.partial(tiles.over_columns, columns=out_TU.shape[1])
    out_TU = jnp.where(over_U(alive), out_TU * over_U(inverse), 0.0)
    # The queries are no longer needed: their buffer takes the output.
    out_TU = out_TU.astype(self.out.dtype)
    parts = range(out_TU.shape[1] // _COLUMNS)
    for part in parts:
      columns = slice(part * _COLUMNS, (part + 1) * _COLUMNS)
      self.shared.q[self.wg, part] = out_TU[:, columns]
    self.shared.lse[self.wg] = jnp.where(
      alive, whole.top * (1 / softmax.LOG2E) + jnp.log(whole.total), -jnp.inf
    )
    plgpu.commit_smem()
    batch, head = self.walk.batch, self.walk.head
    for part in parts:
      columns = pl.ds(part * _COLUMNS, _COLUMNS)
      plgpu.copy_smem_to_gmem(
        self.shared.q.at[self.wg, part],
        self.out.at[batch, self.queries, head, columns],
      )
    plgpu.copy_smem_to_gmem(
      self.shared.lse.at[self.wg], self.lse.at[batch, head, self.queries]
    )
    plgpu.wait_smem_to_gmem(0)
