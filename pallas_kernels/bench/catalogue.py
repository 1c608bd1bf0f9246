"""Finds what can be run: ops that have a case, and workloads of several."""

from collections.abc import Callable
import dataclasses
import importlib
import importlib.util
import pkgutil
import types

from pallas_kernels import ops
from pallas_kernels import workloads
from pallas_kernels.cases import contract
from pallas_kernels.cases import setting as setting_lib
from pallas_kernels.cases import workload as workload_lib


@dataclasses.dataclass(frozen=True)
class Entry:
  """What can be run by one name."""

  about: str
  whole: bool
  """Whether it is a layer's work on a whole sequence."""
  measure: Callable[[workload_lib.Runner], None]
  estimate: Callable[[workload_lib.Estimator], None]


def entries() -> dict[str, Entry]:
  """Finds all entries by name, those of ops first."""
  found = {}
  for op in pkgutil.iter_modules(ops.__path__):
    name = f"{ops.__name__}.{op.name}.case"
    if importlib.util.find_spec(name) is not None:
      module = importlib.import_module(name)
      found[op.name] = _of_case(_about(module), module.make)
  for workload in pkgutil.iter_modules(workloads.__path__):
    name = f"{workloads.__name__}.{workload.name}"
    module = importlib.import_module(name)
    found[workload.name] = Entry(
      _about(module), True, module.measure, module.estimate
    )
  return found


def _of_case(about: str, make: contract.Make) -> Entry:
  def checked(setting: setting_lib.Setting, grad: bool) -> contract.Case:
    case = make(setting)
    if grad and not case.differentiated:
      raise ValueError(f"{case.op} has no gradient; leave out --grad.")
    return case

  def measure(runner: workload_lib.Runner) -> None:
    runner.run(checked(runner.setting, runner.grad))

  def estimate(estimator: workload_lib.Estimator) -> None:
    estimator.estimate(
      lambda: checked(estimator.setting, estimator.grad), grad=estimator.grad
    )

  return Entry(about, False, measure, estimate)


def _about(module: types.ModuleType) -> str:
  """First paragraph of the module's docstring, on one line."""
  return " ".join((module.__doc__ or "").split("\n\n")[0].split())
