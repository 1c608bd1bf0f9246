"""Estimates an op's time from the TPU compiler's schedule, without a TPU.

The op's kernels are compiled for one device of a topology. Lower bounds of a
kernel's time are its bundles (`schedule`), as often as they are issued for its
data (`work`), over the clock; the time its products occupy the matrix units;
and its copied bytes over the bandwidth of HBM. No kernel is run: waiting that
is not hidden, and XLA's work around kernels, are not in the estimate.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any, Final

import jax

from pallas_kernels import dispatch
from pallas_kernels.bench import timing
from pallas_kernels.bench.estimate import compiler
from pallas_kernels.bench.estimate import work as work_lib
from pallas_kernels.cases import contract
from pallas_kernels.cases import counts as counts_lib
from pallas_kernels.cases import setting as setting_lib
from pallas_kernels.cases import workload
from pallas_kernels.tpu import chip as tpu

# Cycles of one bf16 instruction on a core's matrix units, all of them together:
# 16 rows by one unit of 128 x 128 (v5p) or 256 x 256 numbers.
_MATMUL_CYCLES: Final = 4
_HEAD: Final = (
  f"{'kernel':<46} {'Mcycles':>9} {'issue ms':>9} {'MXU':>5} {'copy ms':>8} "
  f"{'ms':>8} {'VMEM MiB':>8}"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Estimate of a kernel; seconds of one call on one device."""

  name: str
  bundles: int
  """Bundles in its schedule, each once."""
  vmem: int
  """Bytes of VMEM, as compiled."""
  cycles: int | None
  """Cycles of each core; None if its blocks have no counts."""
  matmul_share: float | None
  """Share of the cycles that matrix units need; above 1 they limit."""
  issue_seconds: float | None
  copy_seconds: float | None

  @property
  def seconds(self) -> float | None:
    issue, share, copy = (
      self.issue_seconds,
      self.matmul_share,
      self.copy_seconds,
    )
    if issue is None or share is None or copy is None:
      return None
    return max(issue, issue * share, copy)


class Estimator:
  """Prints estimates one by one and keeps them; a `workload.Estimator`."""

  def __init__(
    self,
    folder: pathlib.Path,
    topology: str,
    *,
    setting: setting_lib.Setting,
    grad: bool,
    union: float | None,
    **about: Any,
  ):
    """Takes the folder of `compiler.dumping`; `about` describes the run."""
    self.setting, self.grad = setting, grad
    self._folder = folder
    self._mesh = compiler.device(topology)
    with jax.set_mesh(self._mesh):
      self._chip = tpu.chip()
    self._call = counts_lib.Call(
      shape=setting.shape,
      visible=setting.visible,
      union=union,
      cores=self._chip.cores,
    )
    self._values = {
      "topology": topology,
      "device": self._mesh.devices.flat[0].device_kind,
      "jax": jax.__version__,
      **about,
      "chip": dataclasses.asdict(self._chip),
    }
    for name, value in self._values.items():
      print(f"{name:<9} {value}")
    print("estimated from the schedule: nothing is run")
    self._programs: list[dict[str, Any]] = []
    self._ratios: list[dict[str, Any]] = []

  def estimate(
    self, make: Callable[[], contract.Case], *, grad: bool = False
  ) -> float | None:
    """Compiles an op, with `grad` forward and backward; returns seconds.

    Raises:
      ValueError: The op has no kernel for TPUs.
      NotImplementedError: Its kernel cannot do this.
    """
    case, inputs = _shapes_only(make)
    args, function, flops = (*inputs,), case.forward("mosaic_tpu"), case.flops
    out = jax.eval_shape(case.forward(dispatch.PORTABLE), *inputs)
    if grad:
      args = args, out
      function = case.forward_backward("mosaic_tpu")
      flops += case.flops_backward
    what = f"{case.op} forward{' and backward' if grad else ''}"
    moved = timing.num_bytes(args) + timing.num_bytes(out)
    floors = flops / self._chip.flops, moved / self._chip.bandwidth
    kernels = [
      self._kernel(x, case.kernels)
      for x in compiler.kernels(self._folder, self._mesh, function, args)
    ]
    total = workload.total(x.seconds for x in kernels)
    self._print(what, floors, kernels, total)
    self._programs.append(
      {
        "what": what,
        "flops": flops,
        "bytes": moved,
        "floor_matmul_seconds": floors[0],
        "floor_bytes_seconds": floors[1],
        "seconds": total,
        "kernels": [
          dataclasses.asdict(x) | {"seconds": x.seconds} for x in kernels
        ],
      }
    )
    return total

  def ratio(self, what: str, part: float | None, whole: float | None) -> None:
    value = None if part is None or whole is None else part / whole
    print(f"\n{what}: {'unknown' if value is None else f'{value:.2f}'}")
    self._ratios.append({"what": what, "value": value})

  def write(self, file: pathlib.Path) -> None:
    values = self._values | {"programs": self._programs, "ratios": self._ratios}
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

  def _kernel(
    self, compiled: compiler.Compiled, kernels: Mapping[str, counts_lib.Count]
  ) -> Kernel:
    name, size = compiled.name, compiled.block.last + 1
    unknown = Kernel(name, size, compiled.vmem, None, None, None, None)
    counts = work_lib.counts(name, kernels, self._call)
    if counts is None:
      return unknown
    try:
      work = work_lib.work(compiled.block, counts)
    except work_lib.Unknown as e:
      print(f"{name}: {e} It has no estimate.")
      return unknown
    cycles = work.cycles // self._chip.cores
    return Kernel(
      name,
      size,
      compiled.vmem,
      cycles,
      _MATMUL_CYCLES * work.matmuls / max(work.cycles, 1),
      cycles / self._chip.clock,
      counts.bytes / self._chip.bandwidth,
    )

  def _print(self, what, floors, kernels, total) -> None:
    print(
      f"\n{what}: floors {1e3 * floors[0]:.3f} ms (MXU), "
      f"{1e3 * floors[1]:.3f} ms (HBM)\n{_HEAD}"
    )
    for x in kernels:
      cells = (
        f"{x.name:<46}",
        _cell(x.cycles, 1e-6, "9.1f"),
        _cell(x.issue_seconds, 1e3, "9.3f"),
        _cell(x.matmul_share, 1, "5.0%"),
        _cell(x.copy_seconds, 1e3, "8.3f"),
        _cell(x.seconds, 1e3, "8.3f"),
        _cell(x.vmem, 2.0**-20, "8.1f"),
      )
      print(" ".join(cells), flush=True)
    print(f"{'all kernels':<81} {_cell(total, 1e3, '8.3f')}", flush=True)


def _cell(value: float | None, factor: float, form: str) -> str:
  if value is None:
    return f"{'?':>{form.partition('.')[0]}}"
  return format(value * factor, form)


def _shapes_only(
  make: Callable[[], contract.Case],
) -> tuple[contract.Case, Any]:
  """Builds a case with tracers as data; returns it and its inputs' shapes."""
  made = []

  def inputs():
    made.append(make())
    return (*made[0].inputs.values(),)

  shapes_of_inputs = jax.eval_shape(inputs)
  return made[0], shapes_of_inputs
