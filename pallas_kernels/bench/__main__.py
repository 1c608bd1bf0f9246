"""Checks and times an op: python -m pallas_kernels.bench OP [--OPTION=..]

First its results (with --grad, its gradients too) are compared with those of
the op's reference in float32, on fresh random data; a wrong one ends it. Then
it is timed: the median of batches of back-to-back calls, each batch waited for.
The table shows the share of the device's peak, of a matmul and of a copy
measured in the same run, and the floor: the least time at these peaks for the
op's FLOPs and for reading each input and writing each result once. Plain XLA
is shown beside it.

  python -m pallas_kernels.bench OP --shape=32k --grad
  python -m pallas_kernels.bench OP --shape=128k --json=out.json
  python -m pallas_kernels.bench OP --shape=tiny      # also on a CPU

With --topology, and no TPU, nothing is run: the op's kernels are compiled for
a device of that topology, and the table shows the least time of their schedule
(estimate/estimator.py says what it leaves out). On a TPU the op is measured all
the same.

  python -m pallas_kernels.bench OP --shape=128k --topology=v6e:2x2

OP is one of the ops, on the last T queries of a sequence of S; or a workload of
several, a whole layer's on a sequence (T = S).
"""

import dataclasses
import io
import math
import pathlib
import random
import sys
import textwrap
from typing import Annotated, Any, Literal

import jax
import tyro

from pallas_kernels import shapes as shapes_lib
from pallas_kernels.bench import catalogue
from pallas_kernels.bench import report as report_lib
from pallas_kernels.bench import runner as runner_lib
from pallas_kernels.bench.estimate import compiler
from pallas_kernels.bench.estimate import estimator as estimator_lib
from pallas_kernels.cases import setting as setting_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of the command line; see the module."""

  op: Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(
      constructor_factory=lambda: Literal[*catalogue.entries()],
    ),
  ]
  """Op or workload to run."""
  shape: Literal["tiny", "8k", "32k", "64k", "128k"] = "32k"
  """Named sizes: 4096 queries, as many keys as the name says, DeepSeek-V3.2's
  widths; tiny is for a CPU. The options below override single sizes."""
  queries: int | None = None
  """T."""
  keys: int | None = None
  """S."""
  top_k: int | None = None
  """K."""
  heads: int | None = None
  """N."""
  index_heads: int | None = None
  """M."""
  grad: bool = False
  """Also check and time the gradient."""
  implementation: str | None = None
  """Implementation of the ops; by default the one that they select."""
  baseline: str | None = "chunked_xla"
  """Implementation to time beside it (not for a workload), or None."""
  indices: setting_lib.Order = "random"
  """Order of a query's randomly selected keys: as drawn, or ascending, as the
  indexer returns them."""
  visible: setting_lib.Visible = "causal"
  """Keys that dense ops and the indexer see: up to the query's own, or all."""
  score_dtype: setting_lib.ScoreDType | None = None
  """Dtype of the indexer's products: float8_e4m3fn, or None for bfloat16."""
  checked: int = 256
  """Queries that are compared with the reference."""
  measure: bool = True
  """Compute the losses, which training does now and then; if not, only their
  gradients, as in the other steps."""
  topology: str | None = None
  """Topology of the device to estimate for, unless this machine has a TPU:
  v5p:2x2x1, v6e:2x2, tpu7x:2x2x1."""
  union: float | None = None
  """For the estimate, keys that a block of neighbouring queries reads together,
  over K; None: they have none in common."""
  seed: int | None = None
  """Seed of the data; by default a new one each time."""
  json: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE")] = None
  """File for the results as JSON."""

  def setting(self, whole: bool, seed: int) -> setting_lib.Setting:
    """Setting that the options ask for.

    Args:
      whole: Whether the queries are the whole sequence, unless `queries` says
        how many, or it is an estimate.
      seed: Seed of the data.

    Raises:
      ValueError: The options do not fit each other.
    """
    self._check()
    named = {
      "T": self.queries,
      "S": self.keys,
      "K": self.top_k,
      "N": self.heads,
      "M": self.index_heads,
    }
    given = {name: x for name, x in named.items() if x is not None}
    shape = shapes_lib.SHAPES[self.shape]
    if whole and self.topology is None and self.queries is None:
      given["T"] = given.get("S", shape.S)
    return setting_lib.Setting(
      shape=dataclasses.replace(shape, **given),
      order=self.indices,
      visible=self.visible,
      score_dtype=self.score_dtype,
      measure=self.measure,
      seed=seed,
    )

  def _check(self) -> None:
    """Refuses what would fail late, or not at all; NaN is in no range."""
    if self.checked < 1:
      raise ValueError(f"--checked={self.checked} must be at least 1.")
    if self.seed is not None and not 0 <= self.seed < 2**32:
      raise ValueError(f"--seed={self.seed} must be at least 0, below 2^32.")
    if self.union is not None and not 1 <= self.union < math.inf:
      raise ValueError(f"--union={self.union} must be at least 1 and finite.")
    if self.json is not None and (
      self.json.is_dir() or not self.json.absolute().parent.is_dir()
    ):
      raise ValueError(f"--json={self.json} is not in a folder, or is one.")


def main(args: list[str] | None = None) -> None:
  entries = catalogue.entries()
  try:
    options = tyro.cli(
      Options,
      prog="python -m pallas_kernels.bench",
      description=f"{__doc__}\n{_list(entries)}",
      args=args,
    )
    seed = options.seed
    if seed is None:
      seed = random.SystemRandom().randrange(1 << 31)
    entry = entries[options.op]
    setting = options.setting(entry.whole, seed)
    if options.topology is None:
      _measure(entry, options, setting)
      return
    with compiler.dumping() as folder:  # before anything loads libtpu
      if jax.default_backend() == "tpu":
        _measure(entry, options, setting)
      else:
        _estimate(entry, options, setting, options.topology, folder)
  except (
    *(ValueError, NotImplementedError, OSError, report_lib.Wrong),
    jax.errors.JaxRuntimeError,  # of memory, most of all
  ) as e:
    sys.exit(f"error: {e}")


def _list(entries: dict[str, catalogue.Entry]) -> str:
  """Formats names with what they are, as two columns."""
  width = max(map(len, entries))
  lines = (
    textwrap.wrap(
      f"  {name:<{width}}  {entry.about}",
      80,
      subsequent_indent=" " * (width + 4),
    )
    for name, entry in entries.items()
  )
  return "\n".join("\n".join(x) for x in lines)


def _about(options: Options, shape: shapes_lib.Shape) -> dict[str, Any]:
  return {
    "op": options.op,
    "shape": " ".join(f"{k}={v}" for k, v in dataclasses.asdict(shape).items()),
    "measured": options.measure,
    "scores": options.score_dtype or "bfloat16",
  }


def _estimate(
  entry: catalogue.Entry,
  options: Options,
  setting: setting_lib.Setting,
  topology: str,
  folder: pathlib.Path,
) -> None:
  union = options.union
  estimator = estimator_lib.Estimator(
    folder,
    topology,
    setting=setting,
    grad=options.grad,
    union=union,
    data=f"bf16, {options.visible} keys visible, a block of queries chooses "
    f"{'no key in common' if union is None else f'{union:g} K keys'}",
    **_about(options, setting.shape),
  )
  try:
    entry.estimate(estimator)
  finally:
    if options.json is not None:
      estimator.write(options.json)


def _measure(
  entry: catalogue.Entry, options: Options, setting: setting_lib.Setting
) -> None:
  report = report_lib.Report(
    data=f"bf16, {options.indices} indices, {options.visible} keys visible",
    seed=setting.seed,
    **_about(options, setting.shape),
  )
  runner = runner_lib.Runner(
    report=report,
    setting=setting,
    grad=options.grad,
    implementation=options.implementation,
    baseline=options.baseline,
    checked=options.checked,
  )
  try:
    entry.measure(runner)
  finally:
    if options.json is not None:
      report.write(options.json)


if __name__ == "__main__":
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # of whatever encoding
      stream.reconfigure(errors="backslashreplace")
  main()
