"""Guards against bad steps: steps are skipped, alarms raised.

A step is judged where it is computed, by its loss and by the norm of its
gradient, and changes nothing if either is not finite or far above those of the
steps before it, or if the update that they come to is not finite. What comes of
many in a row, `train/loop.py` decides.

Letters: W steps that are remembered.
"""

import dataclasses
from typing import Annotated, Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from dsa_jax import ranges

# W. Before so many steps of a stage, only what is not finite is skipped.
_WINDOW: Final = 128
# The deviation is taken to be at least this share of the mean: of a loss that
# hardly moves, any change is many deviations.
_LEAST_DEVIATION: Final = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
  """Which steps are skipped, and what follows."""

  spike_deviations: ranges.Positive = 6.0
  """A step is skipped if its loss or gradient norm lies more than so many
  standard deviations above the mean of the 128 before it."""
  patience: ranges.Count = 10
  """After so many skipped steps in a row, the run goes back to the checkpoint
  before them, and past the data that they saw."""
  rollbacks: ranges.Index = 3
  """It ends where it would have to go back once more."""
  kl_factor: Annotated[float, ranges.Interval(1, 1e9, open="low")] = 3.0
  """An alarm is logged where the indexer's KL is above so many times its lowest
  of the stage."""
  stall_seconds: ranges.Positive = 1800.0
  """A process that makes no step for so long writes all its stacks and ends
  with exit code 75, to be started again."""

  def __post_init__(self):
    ranges.check(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
  """A stage's memory of its recent steps."""

  history: Any  # Float[Array, "2 W"]: losses, gradient norms; a ring
  seen: Any  # Int[Array, ""], finite steps
  in_a_row: Any  # Int[Array, ""], skipped steps up to the last one
  skipped: Any  # Int[Array, ""]


def begin() -> GuardState:
  """Returns the state of a stage that has made no step."""
  counts = (jnp.int32(0) for _ in range(3))
  return GuardState(jnp.zeros((2, _WINDOW)), *counts)


def judge(
  guard: GuardState,
  watched: Float[Array, "2"],
  update: Float[Array, ""],
  deviations: float,
) -> tuple[Bool[Array, ""], GuardState]:
  """Whether to believe a step with this loss and this gradient norm, and this
  norm of its update.

  A spike is remembered as if it had just been believed: one does not hide the
  next, yet a loss that stays higher is believed after a while.
  """
  mean, spread = guard.history.mean(1), guard.history.std(1)
  spread = jnp.maximum(spread, _LEAST_DEVIATION * jnp.abs(mean))
  full = guard.seen >= _WINDOW
  bound = jnp.where(full, mean + deviations * spread, jnp.inf)
  finite = jnp.isfinite(watched).all() & jnp.isfinite(update)
  believed = finite & (watched <= bound).all()
  latest = guard.history.at[:, guard.seen % _WINDOW].set(
    jnp.minimum(watched, bound)
  )
  return believed, GuardState(
    jnp.where(finite, latest, guard.history),
    guard.seen + finite,
    jnp.where(believed, 0, guard.in_a_row + 1),
    guard.skipped + ~believed,
  )


class Alarms:
  """Says where a stage goes wrong without an error. Each alarm is raised once,
  and again if it had passed."""

  def __init__(self, cfg: GuardConfig):
    self._cfg = cfg
    self._lowest_kl = np.inf
    self._raised: set[str] = set()

  def __call__(self, values: dict[str, Any]) -> list[str]:
    """The alarms that a step's metrics raise; None is what is not finite."""
    found = {}
    if collapsed := values.get("collapsed_layers"):
      found["router"] = (
        f"half of the experts or more get no token in {collapsed:.0f} layers: "
        "their routers collapse. Raise --stages.N.router-bias-rate or "
        "balance-weight, or lower the learning rate"
      )
    if (kl := values.get("index")) is not None:
      self._lowest_kl = min(self._lowest_kl, kl)
      if kl > self._cfg.kl_factor * self._lowest_kl:
        found["index"] = (
          f"the indexer's KL is {kl:.3g}, and was {self._lowest_kl:.3g}: it "
          "loses the attention that it predicts. Lower --optimizer.indexer-lr"
        )
    new = [text for name, text in found.items() if name not in self._raised]
    self._raised = set(found)
    return new
