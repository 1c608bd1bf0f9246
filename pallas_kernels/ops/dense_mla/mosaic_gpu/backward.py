"""Attention to a range of keys on Hopper, backward, in one kernel.

A thread block takes 128 keys of one head and walks over tiles of 64 queries.
Two warpgroups have 64 keys each; keys are the rows of their products:

  S^T = K Q^T, dP^T = V dO^T, dV += P^T dO     P^T in registers, as computed
  dK += dS^T Q, dQ = dS K                      dS^T of both in shared memory;
                                               each has half of dQ's columns

Products overlap with the threads' other work: the first half of dK is
multiplied while dQ is written out, the second during the exponentials of the
next tile, dV while dS is computed.

dK and dV stay in registers until the end. dQ is accumulated in device memory in
float32 by TMA, in no fixed order of blocks: its last bit varies from run to
run.
"""

from collections.abc import Sequence
import dataclasses
import enum
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
from pallas_kernels.hopper import fragments
from pallas_kernels.hopper import instructions
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper.threads import F32
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.dense_mla.mosaic_gpu import mask_bits as mask_bits_lib
from pallas_kernels.ops.dense_mla.mosaic_gpu import walks

bT: Final = 64
bS: Final = 128
_STAGES: Final = 2


class _Barrier(enum.IntEnum):
  """Named barriers of the two consumers."""

  READ = barriers.FIRST  # dS and K have been read
  WRITTEN = barriers.FIRST + 1  # dS is written


def backward(
  q: Float[Array, "B tileableT N HR"],
  k: Float[Array, "B tileableS N HR"],
  v: Float[Array, "B tileableS N U"],
  d_out: Float[Array, "B tileableT N U"],
  lse: Float[Array, "B N paddedT"],
  delta: Float[Array, "B N paddedT"],
  start: Int[Array, "B paddedT"],
  end: Int[Array, "B paddedT"],
  plan: Int[Array, "B nS 4"],
  scale: float,
  mask_bits: Int[Array, "B nT paddedS 2"] | None = None,
) -> tuple[
  Float[Array, "B tileableT N HR"],
  Float[Array, "B tileableS N HR"],
  Float[Array, "B tileableS N U"],
]:
  """Computes dQ / scale in float32, dK and dV.

  Args:
    q: Queries; their number is a multiple of 8, and at least one tile.
    k: Keys; their number is a multiple of 8, and at least one tile.
    v: Values.
    d_out: Gradient of the output.
    lse: Logsumexp in base 2; infinite for a query that sees no key.
    delta: Subtracted from d weights.
    start: First key of each query, padded to whole tiles of queries.
    end: One past the last key, at most S.
    plan: Result of `walks.over_queries`.
    scale: Scale of the logits.
    mask_bits: Bits of the queries that read each key, all within their ranges,
      padded to whole tiles of queries and keys.
  """
  (B, T, N, HR), (S, U) = q.shape, (k.shape[1], v.shape[-1])
  nS = plan.shape[1]
  plan = plan.reshape(-1)
  if mask_bits is not None:
    mask_bits = mask_bits.reshape(-1, mask_bits.shape[-1])
  d_q = jax.new_ref(jnp.zeros((B, T, N, HR), jnp.float32))
  operands = _Operands(
    *(q, k, v, d_out, lse, delta, start, end, plan, mask_bits, d_q)
  )
  d_k, d_v = plgpu.kernel(
    functools.partial(_kernel, scale=scale),
    out_type=(
      jax.ShapeDtypeStruct((B, S, N, HR), k.dtype),
      jax.ShapeDtypeStruct((B, S, N, U), v.dtype),
    ),
    grid=(B * N * nS,),
    grid_names=("block",),
    num_threads=3,
    thread_name="wg",
    scratch_types=[_Shared.types(HR, U)],
    compiler_params=tiles.BY_HAND,
    kernel_name="dense_mla_backward",
  )(operands)
  return d_q[...], d_k, d_v


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Operands:
  """Arguments of `backward` in device memory, and dQ."""

  q: Any
  k: Any
  v: Any
  d_out: Any
  lse: Any
  delta: Any
  start: Any
  end: Any
  plan: Any  # flat
  mask_bits: Any  # [rows, words of a tile], or None
  d_q: Any  # blocks add to it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shared:
  """Shared memory, and barriers there; of queries, a ring buffer's slots."""

  k: Any  # at the end, dK
  v: Any  # at the end, dV
  q: Any
  d_out: Any
  ds: Any
  dq: Any  # by warpgroup
  lse: Any
  delta: Any
  kv_full: Any
  q_full: Any  # and lse
  d_out_full: Any  # and delta
  q_free: Any
  d_out_free: Any

  @classmethod
  def types(cls, HR: int, U: int) -> Any:
    # Half of dQ's columns, 96, is not a multiple of 64.
    narrow = lambda *shape: plgpu.SMEM(
      shape, jnp.bfloat16, transforms=tiles.NARROW
    )
    sums = plgpu.SMEM((_STAGES, bT), jnp.float32)
    ring = plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2)
    return cls(
      k=narrow(bS, HR),
      v=tiles.shared((bS, U)),
      q=narrow(_STAGES, bT, HR),
      d_out=tiles.shared((_STAGES, bT, U)),
      ds=narrow(bS, bT),
      dq=tiles.shared((2, bT, HR // 2), jnp.float32),
      lse=sums,
      delta=sums,
      kv_full=plgpu.Barrier(num_arrivals=2),
      q_full=ring,
      d_out_full=ring,
      q_free=ring,
      d_out_free=ring,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Accumulators:
  """Accumulators of products, in registers."""

  dk: Any
  dv: Any
  s: Any
  dp: Any
  dq: Any

  @classmethod
  def types(cls, HR: int, U: int) -> Any:
    wide = lambda n: plgpu.ACC((tiles.ROWS, n), jnp.float32)
    return cls(
      dk=wide(HR), dv=wide(U), s=wide(bT), dp=wide(bT), dq=wide(HR // 2)
    )


def _kernel(operands, d_k, d_v, shared, *, scale):
  B, _, N, HR = d_k.shape
  block, wg = lax.axis_index("block"), lax.axis_index("wg")
  # The first keys first: with causal ranges they take the longest.
  walk = walks.Walk.of_block(block, operands.plan, B, N, last_first=False)

  @pl.when(wg == 2)
  def _produce():
    plgpu.set_max_registers(24, action="decrease")
    _load(operands, shared, walk)

  @pl.when(wg < 2)
  def _consume():
    plgpu.set_max_registers(240, action="increase")
    mine = pl.ds(wg * tiles.ROWS, tiles.ROWS)
    consumer = _Consumer(operands, d_k, d_v, shared, walk, scale, wg, mine)
    pl.run_scoped(consumer.run, _Accumulators.types(HR, d_v.shape[3]))


def _load(operands, shared, walk):
  """Copies the block's keys, and the walk's queries into the ring buffer."""
  batch, head = walk.batch, walk.head
  keys = pl.ds(walk.tile * bS, bS)
  for source, target in ((operands.k, shared.k), (operands.v, shared.v)):
    plgpu.copy_gmem_to_smem(
      source.at[batch, keys, head], target, shared.kv_full
    )

  def step(i, _):
    slot = walk.slot(i, _STAGES)
    queries = pl.ds(i * bT, bT)

    def copy(rows, rows_smem, sums, sums_smem, full, free):
      pl.when(i - walk.first >= _STAGES)(
        lambda: plgpu.barrier_wait(free.at[slot])
      )
      full = full.at[slot]
      rows, sums = rows.at[batch, queries, head], sums.at[batch, head, queries]
      plgpu.copy_gmem_to_smem(rows, rows_smem.at[slot], full)
      plgpu.copy_gmem_to_smem(sums, sums_smem.at[slot], full)

    copy(
      *(operands.q, shared.q, operands.lse, shared.lse),
      *(shared.q_full, shared.q_free),
    )
    copy(
      *(operands.d_out, shared.d_out, operands.delta, shared.delta),
      *(shared.d_out_full, shared.d_out_free),
    )

  lax.fori_loop(walk.first, walk.last, step, None)


@dataclasses.dataclass(frozen=True)
class _Places:
  """What a consumer needs of shared memory for a tile of queries."""

  slot: Int[Array, ""]
  """Of the ring buffer."""
  mine: Any
  """The warpgroup's keys."""
  columns: Any
  """Its columns of dQ."""


@dataclasses.dataclass(frozen=True)
class _Consumer:
  """Warpgroup that has 64 keys."""

  operands: _Operands
  d_k: Any
  d_v: Any
  shared: _Shared
  walk: walks.Walk
  scale: float
  wg: Int[Array, ""]
  """This one, 0 or 1."""
  mine: Any
  """Its keys of the block's."""

  def run(self, acc: _Accumulators) -> None:
    """Walks over the queries; writes dK and dV."""
    first = self.walk.first
    acc.dk[...] = tiles.zeros(acc.dk.shape[1])
    acc.dv[...] = tiles.zeros(acc.dv.shape[1])
    plgpu.barrier_wait(self.shared.kv_full)
    plgpu.barrier_wait(self.shared.q_full.at[0])
    self.multiply_logits(acc, first)
    bits = self.load_bits(first)
    s_ST = _chosen(plgpu.wgmma_accumulator_load(acc.s), bits)
    step = functools.partial(self.step, acc)
    lax.fori_loop(first, self.walk.last, step, s_ST)
    self.write(acc)

  def step(
    self, acc: _Accumulators, i: Int[Array, ""], s_ST: Float[Array, "64 bT"]
  ) -> Float[Array, "64 bT"]:
    """Adds the gradients of a tile of queries; returns the next one's S^T."""
    at = self.places(i)
    p_ST = self.weights(s_ST, i, at)
    ds_ST = self.d_logits(acc, p_ST, i, at)
    self.share(ds_ST, at)
    self.add_dq(acc, i, at)
    return self.following_logits(acc, i, at)

  def places(self, i: Int[Array, ""]) -> _Places:
    """Computes them anew at each use, since registers are scarce."""
    wg, width = _fresh(self.wg), self.shared.k.shape[1] // 2
    mine = pl.ds(pl.multiple_of(wg * tiles.ROWS, tiles.ROWS), tiles.ROWS)
    half = pl.multiple_of(wg * width, width)
    return _Places(self.walk.slot(i, _STAGES), mine, pl.ds(half, width))

  def multiply_logits(self, acc: _Accumulators, i: Int[Array, ""]) -> None:
    """Starts S^T = K Q^T."""
    at = self.places(i)
    acc.s[...] = tiles.zeros(bT)
    q_T = self.shared.q.at[at.slot].transpose((1, 0))
    plgpu.wgmma(acc.s, self.shared.k.at[at.mine], q_T)

  def weights(
    self, s_ST: Float[Array, "64 bT"], i: Int[Array, ""], at: _Places
  ) -> Float[Array, "64 bT"]:
    """P^T in bfloat16, of S^T that chosen bits have masked."""
    if self.operands.mask_bits is None:
      s_ST = self.walk.mask(s_ST, i, lambda x: self.within_ranges(x, i))
    plgpu.barrier_wait(self.shared.d_out_full.at[at.slot])
    lse_T = plgpu.load(self.shared.lse.at[at.slot], layout=tiles.BY_COLUMN)
    scaled_ST = s_ST * (self.scale * softmax.LOG2E)
    return _pack(jnp.exp2(scaled_ST - tiles.over_rows(lse_T)))

  def within_ranges(
    self, s_ST: Float[Array, "64 bT"], i: Int[Array, ""]
  ) -> Float[Array, "64 bT"]:
    key = plgpu.broadcasted_iota(jnp.int32, s_ST.shape, 0, layout=tiles.MATRIX)
    key += self.walk.tile * bS + self.wg * tiles.ROWS
    start_T, end_T = (
      tiles.load(x.at[self.walk.batch, pl.ds(i * bT, bT)], tiles.BY_COLUMN)
      for x in (self.operands.start, self.operands.end)
    )
    seen = (key >= tiles.over_rows(start_T)) & (key < tiles.over_rows(end_T))
    return jnp.where(seen, s_ST, -jnp.inf)

  def d_logits(
    self,
    acc: _Accumulators,
    p_ST: Float[Array, "64 bT"],
    i: Int[Array, ""],
    at: _Places,
  ) -> Float[Array, "64 bT"]:
    """dS^T in bfloat16; starts dV += P^T dO."""
    v, d_out = self.shared.v.at[at.mine], self.shared.d_out.at[at.slot]
    acc.dp[...] = tiles.zeros(bT)
    plgpu.wgmma(acc.dp, v, d_out.transpose((1, 0)))
    plgpu.wgmma(acc.dv, p_ST, d_out)
    delta_T = plgpu.load(self.shared.delta.at[at.slot], layout=tiles.BY_COLUMN)
    dp_ST = plgpu.wgmma_accumulator_load(acc.dp, wait_n=1)

    @pl.when(i > self.walk.first)
    def _():  # dK of the tile before is multiplied
      plgpu.barrier_arrive(self.shared.q_free.at[1 - at.slot])

    return _pack(_unpack(p_ST) * (dp_ST - tiles.over_rows(delta_T)))

  def share(self, ds_ST: Float[Array, "64 bT"], at: _Places) -> None:
    """Writes dS^T, and waits for the other warpgroup's."""
    barriers.meet(_Barrier.READ)
    self.shared.ds[at.mine] = ds_ST
    barriers.fence_async()
    barriers.meet(_Barrier.WRITTEN)
    plgpu.wgmma_wait(0)  # dV
    plgpu.barrier_arrive(self.shared.d_out_free.at[at.slot])

  def add_dq(self, acc: _Accumulators, i: Int[Array, ""], at: _Places) -> None:
    """Adds half of the columns of dQ = dS K; starts half of dK."""
    acc.dq[...] = tiles.zeros(acc.dq.shape[1])
    ds_TS = self.shared.ds.transpose((1, 0))
    plgpu.wgmma(acc.dq, ds_TS, self.shared.k.at[:, at.columns])
    self.multiply_dk(acc, i, 0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    self.shared.dq[self.wg] = plgpu.wgmma_accumulator_load(acc.dq, wait_n=1)
    plgpu.commit_smem()
    queries = pl.ds(i * bT, bT)
    plgpu.copy_smem_to_gmem(
      self.shared.dq.at[self.wg],
      self.operands.d_q.at[
        self.walk.batch, queries, self.walk.head, at.columns
      ],
      reduction_op="add",
    )

  def multiply_dk(
    self, acc: _Accumulators, i: Int[Array, ""], part: int
  ) -> None:
    """Starts dK += dS^T Q for one half of the queries."""
    at = self.places(i)
    queries = pl.ds(part * (bT // 2), bT // 2)
    ds_ST = self.shared.ds.at[at.mine, queries]
    plgpu.wgmma(acc.dk, ds_ST, self.shared.q.at[at.slot, queries])

  def following_logits(
    self, acc: _Accumulators, i: Int[Array, ""], at: _Places
  ) -> Float[Array, "64 bT"]:
    """S^T of the next tile, masked by bits; starts the other half of dK."""
    following = jnp.minimum(i + 1, self.walk.last - 1)

    @pl.when(i + 1 < self.walk.last)
    def _():
      plgpu.barrier_wait(self.shared.q_full.at[1 - at.slot])

    bits = self.load_bits(following)
    # The last tile computes its own logits again, which are not used.
    self.multiply_logits(acc, following)
    self.multiply_dk(acc, i, 1)
    return _chosen(plgpu.wgmma_accumulator_load(acc.s, wait_n=1), bits)

  def load_bits(self, i: Int[Array, ""]) -> Int[Array, " numbers"] | None:
    """Bits of the queries that read the keys; None if all in range do."""
    ref, (B, T) = self.operands.mask_bits, self.operands.start.shape
    if ref is None:
      return None
    nT = T // bT
    row = (self.walk.batch * nT + i) * (ref.shape[0] // (B * nT))
    row = row + self.walk.tile * bS + self.wg * tiles.ROWS
    return mask_bits_lib.load(ref, row, bT // 32)

  def write(self, acc: _Accumulators) -> None:
    """Writes dK and dV, through the buffers of K and V."""
    barriers.meet(_Barrier.READ)
    dk = plgpu.wgmma_accumulator_load(acc.dk) * self.scale
    self.shared.k[self.mine] = dk.astype(self.d_k.dtype)
    dv = plgpu.wgmma_accumulator_load(acc.dv)
    self.shared.v[self.mine] = dv.astype(self.d_v.dtype)
    plgpu.commit_smem()
    batch, head = self.walk.batch, self.walk.head
    keys = pl.ds(self.walk.tile * bS + self.wg * tiles.ROWS, tiles.ROWS)
    k, v = self.shared.k.at[self.mine], self.shared.v.at[self.mine]
    plgpu.copy_smem_to_gmem(k, self.d_k.at[batch, keys, head])
    plgpu.copy_smem_to_gmem(v, self.d_v.at[batch, keys, head])
    plgpu.wait_smem_to_gmem(0)


def _chosen(logits, bits):
  return logits if bits is None else mask_bits_lib.apply(logits, bits)


@threads.code(threads.NUMBER, returns=threads.a_number())
def _fresh(number):
  """Returns `number` unchanged, opaque to the compiler.

  Otherwise it keeps the addresses of all operands in registers across a loop.
  """
  return number.opaque()


def _pack(x):
  """float32 -> bfloat16, in packed pairs that the compiler does not split.

  Otherwise it keeps each half in its own register for a later `_unpack`.
  """

  @threads.code(
    tiles.MATRIX, returns=fragments.matrix(x.shape[1], jnp.bfloat16)
  )
  def emit(x):
    return fragments.of_words(packed(fragments.floats(x)))

  return emit(x)


def packed(numbers: Sequence[F32]) -> list[U32]:
  """Packs this thread's numbers, two a word."""
  pairs = zip(numbers[::2], numbers[1::2], strict=True)
  return [low.pack(high) for low, high in pairs]


def _unpack(x):
  """bfloat16 -> float32."""

  @threads.code(tiles.MATRIX, returns=fragments.matrix(x.shape[1], jnp.float32))
  def emit(x):
    return fragments.of_floats(unpacked(fragments.words(x)))

  return emit(x)


def unpacked(words: Sequence[U32]) -> list[F32]:
  """Undoes `packed`."""
  return [x for word in words for x in instructions.unpack(word)]
