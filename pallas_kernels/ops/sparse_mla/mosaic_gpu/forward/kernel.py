"""The forward kernel: its phases, its inputs and its results."""

from collections.abc import Callable
import dataclasses
import functools
import operator
from typing import Any, Final

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels import operands
from pallas_kernels.hopper import barriers
from pallas_kernels.hopper import cluster
from pallas_kernels.hopper import fragments
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import tiles
from pallas_kernels.hopper import widths
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import combine
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import gather
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import plan
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import quantized
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward import steps as steps_lib
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward.plan import Barrier
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward.plan import Meeting
from pallas_kernels.ops.sparse_mla.mosaic_gpu.forward.plan import Row
from pallas_kernels.softmax import LOG2E

_ROWS: Final = plan.ROWS
_HALF: Final = widths.C // 2  # columns of the output that a consumer keeps
# Registers of a thread that multiplies, and of the producer; if that converts.
_REGISTERS: Final = 216, 72
_CONVERTING: Final = 208, 88
_SLACK: Final = 8.0  # in powers of two; weights stay below 2^8, sums below 2^21
_NEVER: Final = -1e30  # initial maximum; finite, since -inf would give NaN


@dataclasses.dataclass(frozen=True)
class _Consumer:
  """Phases of a warpgroup that multiplies."""

  which: int
  """0 or 1: the tile whose logits it computes, the half that it keeps."""
  shared: plan.Shared
  out: Any
  """Accumulator, [64, 256]."""
  logits: Any
  """Accumulator, [64, 64]."""
  scale: float
  converts: bool
  """Whether the producer does, and leaves the fence to its consumers."""

  def score(
    self,
    i: Int[Array, ""],
    first: plan.Part,
    second: plan.Part,
    between: Callable[[], None] = lambda: None,
  ) -> Float[Array, "64 64"]:
    """Computes q @ tile in step i: the first part, then the second."""
    self.logits[...] = tiles.zeros(_ROWS)
    self._score_part(i, first)
    between()
    self._score_part(i, second)
    self.shared.barriers.wait(Barrier.MASKED, i & 1)
    return plgpu.wgmma_accumulator_load(self.logits)

  def _score_part(self, i, part):
    self.shared.barriers.wait(part.ready, i & 1)
    if self.converts:
      barriers.fence_async()
    for t in part.columns:
      columns = pl.ds(plan.COLUMNS * t, plan.COLUMNS)
      keys = self.shared.kv.at[part.tile + _zero(i), :, columns]
      q = self.shared.q.at[t + _zero(i)]
      plgpu.wgmma(self.logits, q, keys.transpose((1, 0)))

  def masked(self, logits: Float[Array, "64 64"]) -> Float[Array, "64 64"]:
    """Scales logits, to base 2, and masks them."""
    mask = self.shared.load(Row.MASK_0 + self.which, tiles.BY_COLUMN)
    return logits * (self.scale * LOG2E) + tiles.over_rows(mask)

  def share(
    self, weights: BFloat16[Array, "64 64"], top: Float[Array, "64"]
  ) -> None:
    """Gives weights, and what they refer to, to the other consumer."""
    shared = self.shared
    target = (shared.weights_0, shared.weights_1)[self.which]
    target[...] = weights
    shared.rows[Row.TOP_0 + self.which] = top
    barriers.fence_async()
    barriers.announce(Meeting.WEIGHTS_0 + self.which)

  def take(
    self, top: Float[Array, "64"]
  ) -> tuple[Float[Array, "64"], Float[Array, "64"]]:
    """Waits for the other's weights; returns what they refer to, and what
    remains of the weights that refer to `top`."""
    other = 1 - self.which
    barriers.meet(Meeting.WEIGHTS_0 + other)
    theirs = self.shared.load(Row.TOP_0 + other)
    return theirs, jnp.exp2(top - theirs)

  def mix(
    self, i: Int[Array, ""], keep: Float[Array, "64"], weights: Any, tile: int
  ) -> None:
    """Starts out = keep * out + weights @ tile, for its half of the columns."""
    out = plgpu.wgmma_accumulator_load(self.out, wait_n=None)
    self.out[...] = _rescale(out, keep)
    columns = pl.ds(_HALF * self.which, _HALF)
    keys = self.shared.kv.at[tile + _zero(i), :, columns]
    plgpu.wgmma(self.out, weights, keys)

  def free(self, part: plan.Part, in_flight: int = 0) -> None:
    """Frees a part once at most `in_flight` products are pending."""
    plgpu.wgmma_wait(in_flight)
    self.shared.barriers.arrive(part.free)

  def finish(
    self, total: Float[Array, "64"], out_ref: Any
  ) -> Float[Array, "64"]:
    """Writes its half of the output; returns the sum of all weights."""
    plgpu.wgmma_wait(0)
    shared = self.shared
    shared.rows[Row.SUM_0 + self.which] = total
    barriers.meet(Meeting.SUMS)
    total = shared.load(Row.SUM_0) + shared.load(Row.SUM_1)
    out = plgpu.wgmma_accumulator_load(self.out)
    inverse = 1.0 / jnp.where(total > 0, total, 1.0)
    out = (out * tiles.over_columns(inverse, _HALF)).astype(jnp.bfloat16)
    count = _HALF // plan.COLUMNS
    first = count * self.which
    # Both consumers have come: q is no longer needed.
    for i in range(count):
      shared.q[first + i] = out[:, plan.COLUMNS * i : plan.COLUMNS * (i + 1)]
    plgpu.commit_smem()
    for i in range(first, first + count):
      columns = pl.ds(plan.COLUMNS * i, plan.COLUMNS)
      plgpu.copy_smem_to_gmem(shared.q.at[i], out_ref.at[:, columns])
    return total

  def combine(
    self, total: Float[Array, "64"], out_ref: Any, lse_ref: Any, blocks: int
  ) -> None:
    """Writes what this block owns of the whole cluster's output and lse."""
    plgpu.wgmma_wait(0)
    self.shared.rows[Row.SUM_0 + self.which] = total
    out = plgpu.wgmma_accumulator_load(self.out)
    combine.combine(out, self.shared, out_ref, lse_ref, self.which, blocks)


def _zero(i):
  """A 0 opaque to the compiler, so that operand addresses are recomputed in
  each step. Kept over the loop, they would take so many registers that others
  spill, at a quarter of the speed."""
  return i >> 30


def _weigh(top, total, x):
  """Computes weights of masked logits, of a tile's 64 keys.

  Args:
    top: For each head, the maximum that weights refer to so far.
    total: Sum of the weights so far.
    x: Logits in base 2.

  Returns:
    Top and total afterwards, what remains of earlier weights, and weights.
  """
  highest = jnp.max(x, axis=1)
  raised = jnp.where(highest > top + _SLACK, highest, top)
  keep = jnp.exp2(top - raised)
  weights = jnp.exp2(x - tiles.over_columns(raised, _ROWS))
  total = total * keep + jnp.sum(weights, axis=1)
  return raised, total, keep, weights.astype(jnp.bfloat16)


def _rescale(out, keep):
  """Scales rows, `out * keep`; a warp with no change in its rows skips it."""

  @threads.code(
    *(tiles.MATRIX, tiles.BY_ROW),
    returns=fragments.matrix(_HALF, jnp.float32),
  )
  def emit(out, keep):
    changed = [x.differs(1.0) for x in fragments.floats(keep)]
    return threads.change_where(
      functools.reduce(operator.or_, changed).in_any_lane(),
      lambda x: x * keep.broadcast_in_dim(x.shape, (0,), x.layout),
      out,
    )

  return emit(out, keep)


def _attend_left(consumer, steps):
  """Runs all steps of warpgroup 0; returns the last top, and its total."""
  score = functools.partial(
    consumer.score, first=plan.LEFT_0, second=plan.RIGHT_0
  )

  def step(i, carry, last=False):
    top, total, logits = carry
    logits = consumer.masked(logits)
    top, total, keep, weights = _weigh(top, total, logits)
    consumer.share(weights, top)
    consumer.mix(i, keep, weights, 0)
    consumer.free(plan.LEFT_0)
    top, keep = consumer.take(top)
    consumer.mix(i, keep, consumer.shared.weights_1, 1)
    if not last:
      # The products of the next score's first part run on.
      free = lambda: consumer.free(plan.LEFT_1, len(plan.LEFT_0.columns))
      logits = score(i + 1, between=free)
    return top, total * keep, logits

  carry = tiles.by_row(_NEVER), tiles.by_row(0.0), score(jnp.int32(0))
  carry = lax.fori_loop(0, steps - 1, step, carry)
  top, total, _ = step(steps - 1, carry, last=True)
  return top, total


def _attend_right(consumer, steps):
  """Runs all steps of warpgroup 1; returns the last top, and its total."""

  def step(i, carry):
    top, total = carry
    logits = consumer.masked(consumer.score(i, plan.RIGHT_1, plan.LEFT_1))
    top, keep = consumer.take(top)
    total = total * keep
    consumer.mix(i, keep, consumer.shared.weights_0, 0)
    # While that product runs:
    top, total, keep, weights = _weigh(top, total, logits)
    consumer.share(weights, top)
    consumer.free(plan.RIGHT_0)
    consumer.mix(i, keep, weights, 1)
    consumer.free(plan.RIGHT_1)
    return top, total

  carry = tiles.by_row(_NEVER), tiles.by_row(0.0)
  return lax.fori_loop(0, steps, step, carry)


def _load_q(q_ref, shared):
  for t in range(plan.COLUMN_TILES):
    columns = pl.ds(plan.COLUMNS * t, plan.COLUMNS)
    plgpu.copy_gmem_to_smem(q_ref.at[:, columns], shared.q.at[t], shared.q_here)


def _write_lse(top, total, shared, lse_ref):
  lse = jnp.where(total > 0, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
  row = shared.rows.at[Row.TOP_0]  # no longer needed
  row[...] = lse
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(row, lse_ref)


def _kernel(
  q_ref,
  indices_ref,
  *refs,
  scale,
  groups,
  blocks,
  T,
  S,
):
  *kv_refs, out_ref, lse_ref, shared = refs
  converts = len(kv_refs) > 1
  of_consumer, of_producer = _CONVERTING if converts else _REGISTERS
  group = lax.axis_index("group")
  token = group // groups
  heads = pl.ds((group % groups) * _ROWS, _ROWS)
  rank = lax.axis_index("rank") if blocks > 1 else jnp.int32(0)
  warpgroup = lax.axis_index("wg")
  q_ref, out_ref, lse_ref = (
    x.at[token, heads] for x in (q_ref, out_ref, lse_ref)
  )
  shared.start(converts)
  pl.when(warpgroup == 0)(lambda: _load_q(q_ref, shared))

  def with_accumulators(run):
    pl.run_scoped(
      run,
      plgpu.ACC((_ROWS, _HALF), jnp.float32),
      plgpu.ACC((_ROWS, _ROWS), jnp.float32),
    )
    plgpu.wait_smem_to_gmem(0)

  def start_consumer():
    plgpu.set_max_registers(of_consumer, action="increase")
    steps_lib.note_last(indices_ref.at[token], shared, S)
    plgpu.barrier_wait(shared.q_here)
    return steps_lib.count(shared, rank, blocks)

  @pl.when(warpgroup == 0)
  def _():
    steps = start_consumer()

    @with_accumulators
    def _(out, logits):
      consumer = _Consumer(0, shared, out, logits, scale, converts)
      _, total = _attend_left(consumer, steps)
      if blocks > 1:
        consumer.combine(total, out_ref, lse_ref, blocks)
      else:
        consumer.finish(total, out_ref)

  @pl.when(warpgroup == 1)
  def _():
    steps = start_consumer()

    @with_accumulators
    def _(out, logits):
      consumer = _Consumer(1, shared, out, logits, scale, converts)
      top, total = _attend_right(consumer, steps)
      if blocks > 1:
        consumer.combine(total, out_ref, lse_ref, blocks)
      else:
        total = consumer.finish(total, out_ref)
        _write_lse(top, total, shared, lse_ref)

  @pl.when(warpgroup == 2)
  def _():
    plgpu.set_max_registers(of_producer, action="decrease")
    args = indices_ref, shared, (token // T) * S, token, rank, S, blocks
    if converts:
      quantized.gather(quantized.Rows(*kv_refs), *args)
    else:
      gather.gather(*kv_refs, *args)
    if blocks > 1:
      threads.code()(cluster.meet)()  # as the consumers do, to combine


def forward(
  q: Float[Array, "B T N CR"],
  kv: Float[Array, "B S CR"] | operands.QuantizedLatents,
  indices: Int[Array, "B T K"],
  scale: float,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
  """Computes out and lse of `api.sparse_mla`, for bfloat16, C = 512, R = 64.

  Fewer than 64 heads cost as much as 64. Attends in steps of 128 indices up to
  each query's last valid one. One launch, no memory but the results; where K is
  no multiple of 128, or N of 64, copies of what is filled up.
  """
  B, T, N, _ = q.shape
  S, K = kv.shape[1], indices.shape[2]
  groups, steps = pl.cdiv(N, _ROWS), pl.cdiv(K, plan.STEP)
  padded = groups * _ROWS
  q = jnp.pad(q, [(0, 0), (0, 0), (0, padded - N), (0, 0)])
  missing = [(0, 0), (0, 0), (0, steps * plan.STEP - K)]
  indices = jnp.pad(indices, missing, constant_values=-1)
  blocks = plan.blocks(B * T * groups, steps)
  sizes = dict(groups=groups, blocks=blocks, T=T, S=S)
  kernel = plgpu.kernel(
    functools.partial(_kernel, scale=scale, **sizes),
    out_type=(
      jax.ShapeDtypeStruct((B * T, padded, widths.C), q.dtype),
      jax.ShapeDtypeStruct((B * T, padded), jnp.float32),
    ),
    grid=(B * T * groups,),
    grid_names=("group",),
    cluster=(blocks,) if blocks > 1 else (),
    cluster_names=("rank",) if blocks > 1 else (),
    num_threads=plan.THREADS // threads.WARPGROUP,
    thread_name="wg",
    scratch_types=[plan.Shared.types()],
    compiler_params=tiles.BY_HAND,
    kernel_name="sparse_mla_forward",
  )
  out, lse = kernel(
    q.reshape(B * T, padded, widths.CR),
    indices.reshape(B * T, -1),
    *(x.reshape(B * S, x.shape[-1]) for x in jax.tree.leaves(kv)),
  )
  return (
    out[:, :N].reshape(B, T, N, widths.C),
    lse[:, :N].reshape(B, T, N),
  )
