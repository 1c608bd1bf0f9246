"""A warpgroup that multiplies, as its threads see it."""

import dataclasses

from pallas_kernels.hopper import cluster
from pallas_kernels.hopper import signals
from pallas_kernels.hopper.memory import Place
from pallas_kernels.hopper.threads import U32
from pallas_kernels.hopper.threads import WARPGROUP
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import operands
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import plan as plans
from pallas_kernels.ops.sparse_mla.mosaic_gpu.backward import shared_memory


@dataclasses.dataclass(frozen=True)
class Warpgroup:
  """One of two; the first writes P^T, the other dS^T."""

  which: int
  """0 or 1."""
  plan: plans.Plan
  memory: shared_memory.SharedMemory
  """Places of the block's arrays."""
  operands: operands.Operands
  d_kv: Place
  """Rows that dKV is added to: [S, C+R], float32. Deterministic: those that it
  is stored to, for all queries of the launch."""
  d_q: Place
  """[heads, C+R], bfloat16."""
  p: Place
  """Sums over the block's heads: [K], float32."""

  def rank(self) -> U32:
    """Index of the block in its cluster, read anew."""
    return cluster.rank() if self.plan.is_pair else U32(0)

  def per_head(self) -> Place:
    """A number for each head: its logits' bias, or of its logits' gradient."""
    return self.memory.per_head + 4 * plans.HEADS * self.which

  def signal(self, which: plans.Signal) -> Place:
    return self.memory.signal(which)

  def meet(self, meeting: plans.Meeting) -> None:
    """Waits for the other warpgroup to come, or to have announced it."""
    signals.meet(meeting, 2 * WARPGROUP)

  def announce(self, meeting: plans.Meeting) -> None:
    """Tells the other warpgroup, which meets, without waiting."""
    signals.announce(meeting, 2 * WARPGROUP)

  def meet_alone(self) -> None:
    """Synchronises this warpgroup."""
    signals.meet(plans.Meeting.ALONE_0 + self.which, WARPGROUP)

  # The writer of weights waits until the other has read the previous ones.

  def await_own_free(self) -> None:
    self.meet(self._free(self.which))

  def announce_others_free(self) -> None:
    self.announce(self._free(1 - self.which))

  def _free(self, which):
    return plans.Meeting.DS_FREE if which else plans.Meeting.P_FREE
