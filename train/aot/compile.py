"""Compiles the steps of a run for TPUs that need not be here.

libtpu (the extra `tpu`, or PyPI's libtpu alone) has the real compiler. What it
says of memory is what the chips will do. The time of a step is a bound: peak
FLOP/s for the arithmetic, the links' bandwidth for the collectives, whichever
takes longer, as if each hid the other.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import os
import re
import resource
import time
import warnings

import jax
from jax.experimental import topologies

import dsa_jax
from pallas_kernels import devices as devices_lib
from pallas_kernels import dispatch
from train.aot import collectives
from train.host import mesh as mesh_lib
from train.learn import guards
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.learn import step as step_lib
from train.run import metrics as metrics_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Settings that the steps of all stages share."""

  model: dsa_jax.ModelConfig
  optimizer: optimizer_lib.OptimizerConfig
  guard: guards.GuardConfig
  measure_every: int
  """Steps between measurements of the indexer."""
  num_sources: int
  """Sources of the data, whose tokens are counted apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """The compiler's report on one stage's step. Bytes are per device."""

  stage: stages_lib.StageConfig
  arguments: int
  """0 if it does not fit: then the compiler does not say."""
  temporaries: int
  memory: int
  flops: float
  """FLOPs of the model on one device, without recomputation."""
  repeated: float
  """FLOPs that remat adds to these."""
  peak: float
  moved: dict[str, collectives.Moved]
  network: float
  implementations: dict[str, list[str]]
  seconds: float
  host_bytes: int
  hlo: str
  """The compiled program; empty if it does not fit."""

  @property
  def fits(self) -> bool:
    return self.arguments + self.temporaries <= self.memory

  def __str__(self) -> str:
    size = metrics_lib.size
    if self.arguments:
      parts = f"{size(self.arguments)} arguments + {size(self.temporaries)}"
      parts += f" temporaries = {size(self.arguments + self.temporaries)}"
    else:
      parts = f"{size(self.temporaries)} of temporaries alone"
    verdict = "it fits" if self.fits else "IT DOES NOT FIT"
    lines = [
      f"{self.stage.kind}: {self.stage.batch_size} x {self.stage.seq_len}"
      f" tokens a step, {self.stage.microbatches} microbatches",
      f"  memory    {parts}; a device has {size(self.memory)}: {verdict}",
    ]
    busy = (self.flops + self.repeated) / self.peak
    lines.append(
      f"  compute   {metrics_lib.count(self.flops)}FLOP a device, and"
      f" {metrics_lib.count(self.repeated)} again by remat: {busy:.2f} s at"
      f" {metrics_lib.count(self.peak)}FLOP/s"
    )
    for kind, m in sorted(self.moved.items()):
      lines.append(f"  {kind:<18}  {m.times:>7,} times, {size(m.bytes)}")
    links = sum(m.bytes for m in self.moved.values()) / self.network
    bound = max(busy, links)
    lines += [
      f"  network   {links:.2f} s at {size(self.network)}/s",
      f"  bound     {bound:.2f} s a step at least, MFU"
      f" {self.flops / self.peak / bound:.0%} at most",
    ]
    kinds = dict.fromkeys(dispatch.KERNEL_BACKEND, "kernel")
    for op, names in sorted(self.implementations.items()):
      told = ", ".join(f"{x} ({kinds.get(x, 'plain XLA')})" for x in names)
      lines.append(f"  {op:<20}  {told}")
    lines.append(
      f"  compiled  in {self.seconds:.0f} s, {size(self.host_bytes)} of host"
      " memory at the peak"
    )
    return "\n".join(lines)


def report(
  slice_name: str,
  mesh_config: mesh_lib.MeshConfig,
  plan: Plan,
  stages: Sequence[stages_lib.StageConfig],
) -> int:
  """Prints what each stage's step would take; 1 if one does not fit, else 0.

  Raises:
    ValueError: There is no such topology, it has too few devices, or their
      facts are not known.
    ImportError: libtpu is not installed.
  """
  devices = topology(slice_name)
  mesh = mesh_config.make(devices)
  print(
    f"{slice_name}: {len(devices)} x {devices[0].device_kind}, of which"
    f" the mesh takes {mesh.size}",
    flush=True,
  )
  fits = True
  for compiled in compile_stages(plan, stages, mesh):
    print(compiled, flush=True)
    fits = fits and compiled.fits
  return 0 if fits else 1


def topology(name: str) -> list[jax.Device]:
  """The devices of a TPU slice, by its name: v5p:8x8x8.

  Raises:
    ValueError: There is none of this name.
    ImportError: libtpu is not installed.
  """
  # There is no cloud to ask which chips are here.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  # Nothing runs on a chip, so that several programs may compile at once.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  if not devices_lib.is_topology(name):
    raise _unknown(name, "it has not two or three sides, of some chips each")
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=name)
  except RuntimeError as e:  # JAX's, whatever the reason
    if "not installed" in str(e):
      raise ImportError(
        "--compile-only needs TPUs' compiler: pip install libtpu."
      ) from e
    raise _unknown(name, str(e).splitlines()[0]) from e
  return list(described.devices)


def _unknown(name: str, why: str) -> ValueError:
  return ValueError(
    f"compile_only={name} is no TPU topology: {why}. Give one such as"
    " v5p:8x8x8, v6e:16x16 or tpu7x:4x4x4."
  )


def compile_stages(
  plan: Plan,
  stages: Sequence[stages_lib.StageConfig],
  mesh: jax.sharding.Mesh,
) -> Iterator[Compiled]:
  """Compiles the step of each stage, one after another."""
  with jax.set_mesh(mesh):
    for stage in stages:
      yield _compile(plan, stage, mesh)


def _compile(plan, stage, mesh) -> Compiled:
  start = time.perf_counter()
  kind = mesh.devices.flat[0].device_kind
  chip = devices_lib.of(kind)
  if chip is None or chip.memory is None or chip.network is None:
    known = ", ".join(x.name for x in devices_lib.DEVICES if x.memory)
    raise ValueError(
      f"compile_only: nothing is known of the memory and the links of {kind!r};"
      f" compile for one of {known}."
    )
  with dispatch.record() as implementations, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the report says which are no kernels
    lowered = trace(plan, stage, mesh).lower()
  per_token = stage.flops_per_token(plan.model)
  tokens = stage.tokens_per_step
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    needed = re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM", str(e))
    if needed is None:
      raise
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}[needed[2]]
    sizes, text = (0, round(float(needed[1]) * unit)), ""
  else:
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    assert memory is not None and text is not None  # TPUs' compiler says both
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  of_device = per_token * tokens / mesh.size
  again = stage.trains_model and plan.model.remat != "none"
  return Compiled(
    stage=stage,
    arguments=sizes[0],
    temporaries=sizes[1],
    memory=chip.memory,
    flops=of_device,
    repeated=of_device / 3 if again else 0.0,  # the forward pass
    peak=chip.flops,
    moved=collectives.moved(text),
    network=chip.network,
    implementations=implementations,
    seconds=time.perf_counter() - start,
    host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    hlo=text,
  )


def trace(
  plan: Plan,
  stage: stages_lib.StageConfig,
  mesh: jax.sharding.Mesh,
) -> jax.stages.Traced:
  """A stage's step, traced for a mesh whose devices may not be here."""
  model_cfg = stage.adapt(plan.model)
  model, init = step_lib.init(model_cfg, 0)

  def begin():  # nothing may run on these devices, not even a key's making
    params, bias = init(jax.random.key(0))
    return step_lib.begin_stage(plan.optimizer, stage, params, bias)

  state = step_lib.on_mesh(jax.eval_shape(begin), mesh)
  rows = stage.batch_size // stage.microbatches
  shape = (stage.microbatches, rows, stage.seq_len)
  spec = model_cfg.rules(None, "batch", None)
  assert spec is not None  # there is a mesh
  batch = {
    name: jax.ShapeDtypeStruct(
      shape, dtype, sharding=jax.NamedSharding(mesh, spec)
    )
    for name, dtype in step_lib.BATCH_DTYPES.items()
  }
  optimizer = optimizer_lib.make_optimizer(plan.optimizer, stage)
  step = step_lib.make_train_step(
    model, stage, optimizer, plan.guard, plan.measure_every, plan.num_sources
  )
  return step.trace(state, batch)
