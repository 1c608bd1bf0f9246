"""Estimates an op's time from the TPU compiler's schedule, without a TPU.

The op's kernels are compiled for one device of a topology. Lower bounds of a
kernel's time are its bundles (`bundles`), as often as they are issued for its
data (`counts`), over the clock; the time its products occupy the matrix units;
and its copied bytes over the bandwidth of HBM. No kernel is run: waiting that
is not hidden, and XLA's work around kernels, are not in the estimate.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import tempfile
from typing import Any, Final

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from pallas_kernels import shapes
from pallas_kernels.bench import cases
from pallas_kernels.bench import measure
from pallas_kernels.bench.estimate import bundles
from pallas_kernels.bench.estimate import counts as counts_lib
from pallas_kernels.tpu import chip as tpu

# Cycles of one bf16 instruction on a core's matrix units, all of them together:
# 16 rows by one unit of 128 x 128 (v5p) or 256 x 256 numbers.
_MATMUL_CYCLES: Final = 4
_FLAGS: Final = "LIBTPU_INIT_ARGS"
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


@contextlib.contextmanager
def dumping() -> Iterator[pathlib.Path]:
  """Makes a folder that libtpu writes schedules to, if it is loaded inside.

  The folder is removed afterwards, but libtpu keeps using it: compile nothing
  more then.
  """
  with tempfile.TemporaryDirectory() as folder:
    flags = os.environ.get(_FLAGS, "")
    os.environ[_FLAGS] = f"{flags} {bundles.DUMP.format(folder)}"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # of no TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # none is held
    try:
      yield pathlib.Path(folder)
    finally:
      os.environ[_FLAGS] = flags


def device(topology: str) -> jax.sharding.Mesh:
  """Mesh of one device of a topology: "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1".

  Raises:
    ValueError: There is none of this name, or no compiler for it.
  """
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except RuntimeError as e:  # JAX's, whatever is missing
    raise ValueError(
      f"{topology=} cannot be compiled for: {str(e).splitlines()[0]}. Names "
      'are as "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"; the compiler is libtpu: '
      'pip install "jax[tpu]".'
    ) from e
  return jax.sharding.Mesh(np.array(devices[:1]), ("x",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cases:
  """Ops of a shape, to be traced: only ranges are concrete arrays."""

  shape: shapes.Shape
  visible: cases.Visible
  score_dtype: cases.ScoreDType | None
  measure: bool

  def indexer_topk(self) -> cases.Case:
    return cases.indexer_topk(
      self._index(), self.shape, self.visible, self.score_dtype
    )

  def sparse_mla(self) -> cases.Case:
    shape = self.shape
    indices = jnp.zeros((1, shape.T, shape.K), jnp.int32)
    return cases.sparse_mla(jax.random.key(0), shape, indices)

  def dense_mla(self) -> cases.Case:
    return cases.dense_mla(jax.random.key(0), self.shape, self.visible)

  def chosen_dense_mla(self) -> cases.Case:
    """Dense attention with a mask of the selected keys."""
    shape = self.shape
    indices = jnp.zeros((1, shape.T, shape.K), jnp.int32)
    return cases.dense_mla(jax.random.key(0), shape, self.visible, indices)

  def sparse_indexer_loss(self) -> cases.Case:
    return cases.sparse_indexer_loss(
      *(self._index(), self.sparse_mla(), self._lse(), self.shape),
      self.measure,
    )

  def sparse_mla_with_loss(self) -> cases.Case:
    return cases.sparse_mla_with_loss(
      self._index(), self.sparse_mla(), self.shape, self.measure
    )

  def dense_indexer_loss(self) -> cases.Case:
    return cases.dense_indexer_loss(
      *(self._index(), self.dense_mla(), self._lse(), self.shape),
      self.measure,
    )

  def _index(self) -> dict[str, Any]:
    return cases.index_inputs(jax.random.key(0), self.shape)

  def _lse(self) -> Float[Array, "1 T N"]:
    return jnp.zeros((1, self.shape.T, self.shape.N))


def run(op: str, of: Cases, estimates: "Estimates", grad: bool) -> None:
  """Estimates an op, or the ops of a whole layer's work."""
  one = lambda name, grad=False: estimates.estimate(getattr(of, name), grad)
  if op == "attention":
    parts = one("indexer_topk"), one("sparse_mla", grad)
    whole = one("dense_mla", grad)
    dsa = _sum(parts)
    passes = "forward and backward" if grad else "forward"
    estimates.ratio(f"DSA over dense, {passes}", dsa, whole)
  elif op == "warmup":
    parts = one("dense_mla"), one("dense_indexer_loss", grad=True)
    both = _sum(parts)
    estimates.ratio("warm-up over dense_mla forward", both, parts[0])
  elif op == "crossover":
    gathered, masked = one("sparse_mla", grad), one("chosen_dense_mla", grad)
    start, end = (np.asarray(x) for x in cases.ranges(of.shape, of.visible))
    visible = np.maximum(end - start, 0)
    per_pair = visible.sum() / np.minimum(visible, of.shape.K).sum()
    estimates.ratio(
      "visible pairs of dense_mla in the time of a chosen one of sparse_mla",
      None if gathered is None else gathered * float(per_pair),
      masked,
    )
  else:
    one(op, grad)


class Estimates:
  """Estimates that are printed one by one and kept for the JSON."""

  def __init__(
    self, folder: pathlib.Path, topology: str, call: counts_lib.Call, **about
  ):
    self._folder = folder
    self._mesh = device(topology)
    with jax.set_mesh(self._mesh):
      self._chip = tpu.chip()
    self._call = dataclasses.replace(call, cores=self._chip.cores)
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
    self, build: Callable[[], cases.Case], grad: bool
  ) -> float | None:
    """Compiles an op, with `grad` forward and backward; returns seconds.

    Raises:
      ValueError: The op has no kernel for TPUs.
      NotImplementedError: Its kernel cannot do this.
    """
    case, inputs = _shapes_only(build)
    args, function, flops = (*inputs,), case.forward("mosaic_tpu"), case.flops
    out = jax.eval_shape(case.forward("chunked_xla"), *inputs)
    if grad:
      args = args, out
      function = case.forward_backward("mosaic_tpu")
      flops += case.flops_backward
    what = f"{case.op} forward{' and backward' if grad else ''}"
    moved = measure.num_bytes(args) + measure.num_bytes(out)
    floors = flops / self._chip.flops, moved / self._chip.bandwidth
    kernels = [*self._kernels(function, args)]
    total = _sum(x.seconds for x in kernels)
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

  def _kernels(self, function, args) -> Iterator[Kernel]:
    """Compiles, and estimates each Pallas kernel in the program's dump."""
    before = {*bundles.dumped(self._folder).values()}
    with jax.set_mesh(self._mesh):
      sharding = jax.sharding.NamedSharding(self._mesh, jax.P())
      args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        args,
      )
      traced = jax.jit(function).trace(*args)
      text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    vmem = _vmem(text or "")
    for name, file in bundles.dumped(self._folder).items():
      if file not in before and name in vmem:
        block = bundles.parse(file.read_text(encoding="utf-8"))
        yield self._kernel(name, block, vmem[name])

  def _kernel(self, name: str, block: bundles.Block, vmem: int) -> Kernel:
    # Without what makes it another one's, or says where it stands.
    name = re.sub(r"^(transpose_|jvp_)+", "", name.partition(".")[0])
    name = name.rstrip("_")
    counts = counts_lib.counts(name, self._call)
    size = block.last + 1
    if counts is None:
      return Kernel(name, size, vmem, None, None, None, None)
    try:
      work = counts_lib.work(block, counts)
    except counts_lib.Unknown as e:
      print(f"{name}: {e} It has no estimate.")
      return Kernel(name, size, vmem, None, None, None, None)
    cycles = work.cycles // self._chip.cores
    return Kernel(
      name,
      size,
      vmem,
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


def _sum(seconds: Iterable[float | None]) -> float | None:
  """Sum of all; None if one is unknown, or there are none."""
  known = []
  for x in seconds:
    if x is None:
      return None
    known.append(x)
  return sum(known) if known else None


def _cell(value: float | None, factor: float, form: str) -> str:
  if value is None:
    return f"{'?':>{form.partition('.')[0]}}"
  return format(value * factor, form)


def _shapes_only(build: Callable[[], cases.Case]) -> tuple[cases.Case, Any]:
  """Builds a case with tracers as data; returns it and its inputs' shapes."""
  built = []

  def inputs():
    built.append(build())
    return (*built[0].inputs.values(),)

  shapes_of_inputs = jax.eval_shape(inputs)
  return built[0], shapes_of_inputs


def _vmem(text: str) -> dict[str, int]:
  """Bytes of VMEM of each Pallas kernel of a compiled program, by name."""
  found = {}
  for line in text.splitlines():
    if 'custom_call_target="tpu_custom_call"' in line:
      name = re.search(r"%([\w.-]+) = ", line)
      used = re.search(r'"used_scoped_memory_configs":(\[[^\]]*\])', line)
      if name and used:
        sizes = json.loads(used[1])
        found[name[1]] = sum(
          int(x["size"]) for x in sizes if x["memory_space"] == "1"
        )
  return found
