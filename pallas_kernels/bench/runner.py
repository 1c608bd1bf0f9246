"""Checks and times cases and workloads on the device that is there."""

from collections.abc import Callable
import dataclasses
from typing import Any, Final

import jax
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.bench import check
from pallas_kernels.bench import report as report_lib
from pallas_kernels.cases import contract
from pallas_kernels.cases import setting as setting_lib
from pallas_kernels.cases import workload

# Of a workload's whole sequence, where a reference's row is as long.
_MOST_CHECKED: Final = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
  """Runs into a report; a `workload.Runner`."""

  report: report_lib.Report
  setting: setting_lib.Setting
  grad: bool
  implementation: str | None
  baseline: str | None
  checked: int

  def run(self, case: contract.Case) -> None:
    """Checks and times one op, beside the baseline."""
    self._check(case, self.checked, grad=self.grad)
    with dispatch.record() as chosen:
      jax.eval_shape(self.forward(case), *case.inputs.values())
    self.time(case, grad=self.grad, backward=True)
    if self.baseline not in (None, *chosen.get(case.op, ())):
      beside = dataclasses.replace(self, implementation=self.baseline)
      beside.time(case, grad=self.grad, backward=True)

  def forward(self, case: contract.Case) -> Callable[..., Any]:
    return case.forward(self.implementation)

  def cotangents(self, case: contract.Case) -> Any:
    return case.cotangents(self.setting.key(setting_lib.Draw.COTANGENTS))

  def check(self, case: contract.Case, *, grad: bool = False) -> None:
    self._check(case, _MOST_CHECKED, grad=grad)

  def time(
    self, case: contract.Case, *, grad: bool = False, backward: bool = False
  ) -> workload.Seconds:
    inputs = (*case.inputs.values(),)
    forward = self.time_together(
      *(f"{case.op} forward", self.forward(case), inputs, case.flops),
      flops_8_bits=case.flops_8_bits,
    )
    if not grad:
      return workload.Seconds(forward, 0.0)
    cotangents = self.cotangents(case)
    if backward:
      self._time_backward(case, inputs, cotangents)
    both = self.time_together(
      f"{case.op} forward and backward",
      case.forward_backward(self.implementation),
      (inputs, cotangents),
      case.flops + case.flops_backward,
    )
    return workload.Seconds(forward, both)

  def time_together(
    self,
    what: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    flops: int,
    *,
    flops_8_bits: int = 0,
  ) -> float:
    return self.report.time(
      what, function, arguments, flops, flops_8_bits=flops_8_bits
    )

  def ratio(self, what: str, value: float) -> None:
    self.report.ratio(what, value)

  def _check(self, case: contract.Case, most: int, *, grad: bool) -> None:
    T, count = self.setting.shape.T, min(most, self.checked)
    rows = check.sample(T, count, self.setting.seed)
    cotangents = self.cotangents(case) if grad else None
    findings = check.check(case, self.implementation, rows, cotangents)
    self.report.check(case.op, findings)

  def _time_backward(
    self, case: contract.Case, inputs: tuple[Array, ...], cotangents: Any
  ) -> None:
    with dispatch.record() as chosen:
      keeping = case.forward_keeping(self.implementation)
      _, pullback = jax.jit(keeping)(*inputs)
    self.report.time(
      f"{case.op} backward",
      lambda pullback, cotangents: pullback(cotangents),
      (pullback, cotangents),
      case.flops_backward,
      chosen=chosen,
    )
