"""A profiler trace of some of a run's steps."""

import sys
from types import TracebackType

import jax

from train.host import outputs
from train.host import processes


class Tracing:
  """Traces steps first..last into RUN_DIR/profile; ends with its context."""

  def __init__(self, run_dir: str, steps: tuple[int, int] | None):
    """Takes the first and the last step to trace; None traces nothing."""
    self._folder, self._steps, self._active = f"{run_dir}/profile", steps, False
    self._output = outputs.Output(self._folder)

  def __enter__(self) -> "Tracing":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    del kind, error, trace
    self.after(sys.maxsize)

  def before(self, step: int) -> None:
    """Starts the trace if `step` is the first to be traced."""
    if self._steps and step == self._steps[0]:
      with self._output.attempt(RuntimeError):
        jax.profiler.start_trace(self._folder)
        self._active = True

  def ends(self, step: int) -> bool:
    """Returns whether `step` is the last that is traced."""
    return self._active and self._steps is not None and step >= self._steps[1]

  def after(self, step: int) -> None:
    """Writes the trace if `step` is the last, or nothing comes after it."""
    if not self.ends(step) or self._steps is None:
      return
    self._active = False
    first, last = self._steps
    with self._output.attempt(RuntimeError):
      jax.profiler.stop_trace()
      processes.say(
        f"traced   steps {first},{last}, to {self._folder}: for xprof "
        "(tensorboard --logdir), or the trace in it for Perfetto"
      )
