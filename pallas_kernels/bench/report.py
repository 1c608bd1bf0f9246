"""Table and JSON of a benchmark, printed line by line as it runs."""

from collections.abc import Callable
import dataclasses
import datetime
import itertools
import json
import pathlib
import platform
from typing import Any, Final

import jax
import jaxlib

from pallas_kernels import dispatch
from pallas_kernels.bench import check
from pallas_kernels.bench import measure

_COLUMNS: Final = (
  ("what", "{:<45}"),
  ("by", "{:<12}"),
  ("ms", "{:>10.3f}"),
  ("TFLOP/s", "{:>8.1f}"),
  ("of peak", "{:>8.1%}"),
  ("TB/s", "{:>7.3f}"),
  ("of peak", "{:>8.1%}"),
  ("floor ms", "{:>9.3f}"),
)


class Wrong(RuntimeError):
  """Raised when a result differs from the reference."""


class Report:
  """Report of checks and timings, in order."""

  def __init__(self, **about: Any):
    """Measures the peaks; `about` describes the run."""
    device = jax.devices()[0]
    self._values = {
      "time": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
      "device": device.device_kind,
      "backend": device.client.platform_version.splitlines()[-1].strip(),
      "jax": jax.__version__,
      "jaxlib": jaxlib.__version__,
      "python": platform.python_version(),
      **about,
    }
    for name, value in self._values.items():
      print(f"{name:<9} {value}")
    self._peak = measure.peak()
    print(
      f"{'peak':<9} {self._peak.flops / 1e12:.3g} TFLOP/s (a bf16 matmul), "
      f"{self._peak.bytes / 1e12:.3g} TB/s (a copy)",
      flush=True,
    )
    self._checks: list[dict[str, Any]] = []
    self._times: list[dict[str, Any]] = []
    self._ratios: list[dict[str, Any]] = []

  def check(self, op: str, findings: list[check.Finding]) -> None:
    """Prints the findings.

    Raises:
      Wrong: A finding is over its limit.
    """
    print(f"\n{op} against its reference in float32:")
    for x in findings:
      verdict = "right" if x.right else "WRONG"
      print(
        f"  {verdict}  {x.name:<9} {x.rows:>7} rows: at most {x.error:.2e} "
        f"(limit {x.limit:.0e}) {x.what}",
        flush=True,
      )
      values = dataclasses.asdict(x)
      self._checks.append({"op": op, **values, "right": x.right})
    wrong = sorted({x.name for x in findings if not x.right})
    if wrong:
      raise Wrong(f"{op}: {', '.join(wrong)} differ from the reference.")

  def time(
    self,
    what: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    flops: int,
    *,
    flops_8_bits: int = 0,
    chosen: dict[str, list[str]] | None = None,
  ) -> float:
    """Times a program of one op or several; returns seconds.

    Args:
      what: A name for it.
      function: Function to compile.
      arguments: Arguments of the function.
      flops: FLOPs that it must compute.
      flops_8_bits: FLOPs of these in 8 bits, at twice the peak.
      chosen: The implementations of the ops in it, where those were traced
        before.
    """
    with dispatch.record() as traced:
      compiled = jax.jit(function).lower(*arguments).compile()
    chosen = chosen or traced
    out = jax.eval_shape(function, *arguments)
    moved = measure.num_bytes(arguments) + measure.num_bytes(out)
    timing = measure.measure(compiled, measure.copies(arguments))
    if not self._times:
      print("\n" + " ".join(_head(name, form) for name, form in _COLUMNS))
    seconds, peak = timing.seconds, self._peak
    by = "+".join(sorted({*itertools.chain(*chosen.values())}))
    computing = (flops - flops_8_bits / 2) / peak.flops
    floor = max(computing, moved / peak.bytes)
    rates = flops / seconds, moved / seconds
    shown = (
      *(what, by, 1e3 * seconds),
      *(rates[0] / 1e12, computing / seconds),
      *(rates[1] / 1e12, rates[1] / peak.bytes),
      1e3 * floor,
    )
    cells = (form.format(x) for x, (_, form) in zip(shown, _COLUMNS))
    print(" ".join(cells), flush=True)
    self._times.append(
      {
        "what": what,
        "implementations": chosen,
        **dataclasses.asdict(timing),
        "flops": flops,
        "bytes": moved,
        "floor_seconds": floor,
      }
    )
    return seconds

  def ratio(self, what: str, value: float) -> None:
    print(f"{what}: {value:.2f}", flush=True)
    self._ratios.append({"what": what, "value": value})

  def write(self, file: pathlib.Path) -> None:
    values = {
      **self._values,
      "peak": dataclasses.asdict(self._peak),
      "checks": self._checks,
      "times": self._times,
      "ratios": self._ratios,
    }
    text = json.dumps(values, indent=2, default=str)
    file.write_text(text + "\n", encoding="utf-8")


def _head(name: str, form: str) -> str:
  """Formats a column's name with the column's width and alignment."""
  width = form.removeprefix("{:").partition(".")[0].rstrip("}")
  return f"{name:{width}}"
