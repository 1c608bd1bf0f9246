"""The backward kernel: what each of the three warpgroups of a block does."""

from collections.abc import Callable
import functools
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.hopper import cluster
from pallas_kernels.hopper import threads
from pallas_kernels.hopper import widths
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import U32
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import gather
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import multiplication
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import operands
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import shared_memory
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import warpgroup


def of(
  plan: plans.Plan, queries: int, out_type: Any = ()
) -> Callable[..., Any]:
  """Makes the kernel for this many queries, of all batch rows.

  It takes the first query, [1], and the arrays that `_kernel` names; those that
  it writes are references, or results if they are in `out_type`.
  """
  return plgpu.kernel(
    functools.partial(_kernel, plan=plan),
    out_type=out_type,
    grid=(queries,),
    grid_names=("query",),
    num_threads=3,
    thread_name="group",
    scratch_types=[
      shared_memory.SharedMemory.types(plan),
      plgpu.Barrier(num_arrivals=3 * plan.blocks + 2),  # of _load_heads
    ],
    kernel_name="sparse_mla_backward",
    cluster=(2,) if plan.is_pair else (),
    cluster_names=("rank",) if plan.is_pair else (),
  )


def _kernel(
  first_ref,  # [1]
  tiles_ref,  # [B T]: tiles with a key
  q_ref,  # [B T, heads, C+R]
  do_ref,  # [B T, heads, C]
  kv_ref,  # [B, S, C+R]
  indices_ref,  # [B T, K]
  biases_ref,  # [B T, heads]
  offsets_ref,  # [B T, heads]
  d_kv_ref,  # [B, S, C+R] f32, deterministic: [queries K, C+R]
  d_q_ref,  # [B T, heads, C+R]
  p_ref,  # [B T, blocks, K] f32
  memory,
  loaded,
  *,
  plan: plans.Plan,
):
  place, group = lax.axis_index("query"), lax.axis_index("group")
  rank = lax.axis_index("rank") if plan.is_pair else 0
  # The last query again, where a chunk of them reaches beyond it.
  query = jnp.minimum(first_ref[0] + place, q_ref.shape[0] - 1)
  batch = query // plan.queries
  tiles = tiles_ref[query]
  _start_barriers(memory, plan)

  @pl.when(group == 0)
  def _():
    rows = [x.at[query] for x in (q_ref, do_ref, biases_ref, offsets_ref)]
    _load_heads(*rows, memory, loaded, rank, plan)

  for which in range(2):

    @pl.when(group == which)
    def _(which=which):
      plgpu.set_max_registers(plans.MULTIPLY_REGISTERS, action="increase")
      plgpu.barrier_wait(loaded)
      d_kv = d_kv_ref if plan.deterministic else d_kv_ref.at[batch]
      results = d_kv, d_q_ref.at[query], p_ref.at[query, rank]
      slot = place * (plan.tiles * plans.KEYS)
      _multiply(memory, results, tiles, slot, which, plan)

  # Last, since ptxas otherwise finds too few registers for dQ of 64 heads.
  @pl.when(group == 2)
  def _():
    plgpu.set_max_registers(plans.GATHER_REGISTERS, action="decrease")
    _gather(kv_ref.at[batch], indices_ref.at[query], memory, tiles, plan)


def _start_barriers(memory, plan):
  arrivals = [signal.arrivals for signal in plans.Signal]
  memory.signals().start(arrivals)
  if plan.is_pair:
    threads.code()(cluster.meet)()


def _load_heads(
  q_ref, do_ref, biases_ref, offsets_ref, memory, loaded, rank, plan
):
  """Starts loading the rows of a query's heads."""
  columns = pl.ds(rank * plan.wide, plan.wide)
  rotated = pl.ds(widths.C + rank * plan.narrow, plan.narrow)
  for i in range(plan.blocks):  # those that the block owns come first
    heads = pl.ds((rank ^ i) * plans.HEADS, plans.HEADS)
    here = pl.ds(i * plans.HEADS, plans.HEADS)
    for source, target in (
      (q_ref.at[heads, columns], memory.q_wide),
      (q_ref.at[heads, rotated], memory.q_narrow),
      (do_ref.at[heads, columns], memory.do_wide),
    ):
      plgpu.copy_gmem_to_smem(source, target.at[here], loaded)
  heads = pl.ds(rank * plans.HEADS, plans.HEADS)
  for i, source in enumerate((biases_ref, offsets_ref)):
    plgpu.copy_gmem_to_smem(source.at[heads], memory.per_head.at[i], loaded)


def _gather(kv_ref, indices_ref, memory, tiles, plan):
  arguments = shared_memory.SharedMemory.arguments(plan)

  @threads.code(threads.REF, threads.REF, arguments, threads.NUMBER)
  def emit(kv, indices, memory, tiles):
    rank = cluster.rank() if plan.is_pair else U32(0)
    args = Place.of(kv), Place.of(indices), memory.places()
    gather.gather(*args, tiles, rank, plan)
    if plan.is_pair:
      cluster.meet()

  emit(kv_ref, indices_ref, memory, tiles)


def _multiply(memory, results, tiles, slot, which, plan):
  arguments = shared_memory.SharedMemory.arguments(plan)
  number = threads.NUMBER

  @threads.code(arguments, (threads.REF,) * 3, number, number)
  def emit(memory, results, tiles, slot):
    places = memory.places()
    group = warpgroup.Warpgroup(
      which,
      plan,
      places,
      operands.Operands.of(places, plan),
      *map(Place.of, results),
    )
    multiplication.run(group, tiles, slot)

  emit(memory, results, tiles, slot)
