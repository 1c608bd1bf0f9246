"""Checks and times an op: python -m pallas_kernels.bench OP [--OPTION=..]

First its results (with --grad, its gradients too) are compared with those of
the op's reference in float32, on fresh random data; a wrong one ends it. Then
it is timed: the median of batches of back-to-back calls, each batch waited for.
The table shows the share of the device's peak, of a matmul and of a copy
measured in the same run, and the floor: the least time at these peaks for the
op's FLOPs and for reading each input and writing each result once. Plain XLA
is shown beside it.

  python -m pallas_kernels.bench sparse_mla --shape=32k --grad
  python -m pallas_kernels.bench indexer_topk --shape=128k --json=out.json
  python -m pallas_kernels.bench attention --shape=128k --grad
  python -m pallas_kernels.bench sparse_mla --shape=tiny      # also on a CPU

With --topology, and no TPU, nothing is run: the op's kernels are compiled for
a device of that topology, and the table shows the least time of their schedule
(static.py says what it leaves out). On a TPU the op is measured all the same.

  python -m pallas_kernels.bench attention --shape=128k --topology=v6e:2x2

OP is one of the ops, on the last T queries of a sequence of S; or a whole
layer's work on a sequence (T = S):

  attention  indexer_topk, then sparse_mla, beside dense causal attention of the
             same model; with --grad also backward, and with the indexer's loss
  warmup     dense_mla, then dense_indexer_loss and its gradient
  crossover  attention to the keys of indexer_topk by sparse_mla, and by
             dense_mla with a mask; with --grad, the figure for crossover.py
"""

import dataclasses
import pathlib
import random
import sys
from typing import Annotated, Any, Literal

import jax
import tyro

from pallas_kernels import shapes as shapes_lib
from pallas_kernels.bench import cases
from pallas_kernels.bench import programs
from pallas_kernels.bench import report as report_lib
from pallas_kernels.bench.estimate import counts
from pallas_kernels.bench.estimate import static

type Op = Literal[
  "indexer_topk",
  "sparse_mla",
  "dense_mla",
  "sparse_indexer_loss",
  "sparse_mla_with_loss",
  "dense_indexer_loss",
  "attention",
  "warmup",
  "crossover",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of the command line; see the module."""

  op: tyro.conf.Positional[Op]
  """Op or whole layer's work to run."""
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
  """Implementation to time beside it (not for a whole sequence), or None."""
  indices: cases.Order = "random"
  """Order of a query's randomly selected keys: as drawn, or ascending, as
  indexer_topk returns them."""
  visible: cases.Visible = "causal"
  """Keys that dense ops and the indexer see: up to the query's own, or all."""
  score_dtype: cases.ScoreDType | None = None
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

  def sizes(self) -> shapes_lib.Shape:
    """Shape that the options ask for.

    Raises:
      ValueError: The options do not fit each other.
    """
    if self.checked < 1:
      raise ValueError(f"{self.checked=} must be at least 1.")
    if self.grad and self.op == "indexer_topk":
      raise ValueError(
        "indexer_topk is a choice, which has no gradient; leave out --grad, or "
        "take sparse_indexer_loss, which computes its scores again."
      )
    named = {
      "T": self.queries,
      "S": self.keys,
      "K": self.top_k,
      "N": self.heads,
      "M": self.index_heads,
    }
    given = {name: x for name, x in named.items() if x is not None}
    shape = shapes_lib.SHAPES[self.shape]
    whole = self.op in ("attention", "warmup", "crossover")
    if whole and self.topology is None and self.queries is None:
      given["T"] = given.get("S", shape.S)
    return dataclasses.replace(shape, **given)


def main(args: list[str] | None = None) -> None:
  try:
    options = tyro.cli(
      Options,
      prog="python -m pallas_kernels.bench",
      description=__doc__,
      args=args,
    )
    shape = options.sizes()
    if options.topology is None:
      _measure(options, shape)
      return
    with static.dumping() as folder:  # before anything loads libtpu
      if jax.default_backend() == "tpu":
        _measure(options, shape)
      else:
        _estimate(options, options.topology, shape, folder)
  except (ValueError, NotImplementedError, report_lib.Wrong) as e:
    sys.exit(f"error: {e}")


def _about(options: Options, shape: shapes_lib.Shape) -> dict[str, Any]:
  return {
    "op": options.op,
    "shape": " ".join(f"{k}={v}" for k, v in dataclasses.asdict(shape).items()),
    "measured": options.measure,
    "scores": options.score_dtype or "bfloat16",
  }


def _estimate(
  options: Options, topology: str, shape: shapes_lib.Shape, folder: pathlib.Path
) -> None:
  union = options.union
  estimates = static.Estimates(
    folder,
    topology,
    counts.Call(shape=shape, visible=options.visible, union=union),
    data=f"bf16, {options.visible} keys visible, a block of queries chooses "
    f"{'no key in common' if union is None else f'{union:g} K keys'}",
    **_about(options, shape),
  )
  of = static.Cases(
    shape=shape,
    visible=options.visible,
    score_dtype=options.score_dtype,
    measure=options.measure,
  )
  try:
    static.run(options.op, of, estimates, options.grad)
  finally:
    if options.json is not None:
      estimates.write(options.json)


def _measure(options: Options, shape: shapes_lib.Shape) -> None:
  seed = options.seed
  if seed is None:
    seed = random.SystemRandom().randrange(1 << 31)
  report = report_lib.Report(
    data=f"bf16, {options.indices} indices, {options.visible} keys visible",
    seed=seed,
    **_about(options, shape),
  )
  run = programs.Programs(
    report=report,
    shape=shape,
    seed=seed,
    grad=options.grad,
    implementation=options.implementation,
    baseline=options.baseline,
    order=options.indices,
    visible=options.visible,
    checked=options.checked,
    measure=options.measure,
    score_dtype=options.score_dtype,
  )
  try:
    getattr(run, options.op)()
  finally:
    if options.json is not None:
      report.write(options.json)


if __name__ == "__main__":
  main()
