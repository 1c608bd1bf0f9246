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
from pallas_kernels.bench import peak as peak_lib
from pallas_kernels.bench import timing as timing_lib
from pallas_kernels.cases import contract

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
    self._peaks = peak_lib.measure()
    print(f"{'peak':<9} {', '.join(map(str, self._peaks))}", flush=True)
    self._checks: list[dict[str, Any]] = []
    self._times: list[dict[str, Any]] = []
    self._ratios: list[dict[str, Any]] = []

  def check(self, op: str, findings: list[contract.Finding]) -> None:
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
    out = jax.eval_shape(function, *arguments)
    moved = timing_lib.num_bytes(arguments) + timing_lib.num_bytes(out)
    timing = timing_lib.measure(compiled, timing_lib.copies(arguments))
    computing, copying = self._least_seconds(
      what, (flops - flops_8_bits / 2, float(moved)), timing.seconds
    )
    unknown = computing is None or copying is None
    self._times.append(
      {
        "what": what,
        "implementations": chosen or traced,
        **dataclasses.asdict(timing),
        "flops": flops,
        "bytes": moved,
        "floor_seconds": None if unknown else max(computing, copying),
      }
    )
    self._print_time(self._times[-1], computing, copying)
    return timing.seconds

  def ratio(self, what: str, value: float) -> None:
    if not self._ratios:
      print()
    print(f"{what}: {value:.2f}", flush=True)
    self._ratios.append({"what": what, "value": value})

  def write(self, file: pathlib.Path) -> None:
    flops, copied = self._peaks
    values = {
      **self._values,
      "peak": {"flops": flops.rate, "bytes": copied.rate},
      "checks": self._checks,
      "times": self._times,
      "ratios": self._ratios,
    }
    text = json.dumps(values, indent=2, default=str)
    file.write_text(text + "\n", encoding="utf-8")

  def _least_seconds(
    self, what: str, work: tuple[float, float], seconds: float
  ) -> list[float | None]:
    """Least times for FLOPs and bytes, which took `seconds`, at the peaks."""
    for peak, amount in zip(self._peaks, work):
      if (doubt := peak.disprove(what, amount / seconds)) is not None:
        print(doubt)
        for x in self._times:
          x["floor_seconds"] = None
    return [x.seconds(amount) for x, amount in zip(self._peaks, work)]

  def _print_time(
    self, x: dict[str, Any], computing: float | None, copying: float | None
  ) -> None:
    if len(self._times) == 1:
      print("\n" + " ".join(_head(name, form) for name, form in _COLUMNS))
    seconds = x["seconds"]
    shown = (
      x["what"],
      "+".join(sorted({*itertools.chain(*x["implementations"].values())})),
      1e3 * seconds,
      x["flops"] / seconds / 1e12,
      computing and computing / seconds,
      x["bytes"] / seconds / 1e12,
      copying and copying / seconds,
      x["floor_seconds"] and 1e3 * x["floor_seconds"],
    )
    cells = (_cell(x, form) for x, (_, form) in zip(shown, _COLUMNS))
    print(" ".join(cells), flush=True)


def _head(name: str, form: str) -> str:
  """Formats a column's name with the column's width and alignment."""
  width = form.removeprefix("{:").partition(".")[0].rstrip("}")
  return f"{name:{width}}"


def _cell(value: Any, form: str) -> str:
  return _head("-", form) if value is None else form.format(value)
