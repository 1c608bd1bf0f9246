"""Compiles programs for a TPU that is not there, and keeps their schedules."""

from collections.abc import Callable
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
import numpy as np

from pallas_kernels import devices as devices_lib
from pallas_kernels.bench.estimate import schedule

_FLAGS: Final = "LIBTPU_INIT_ARGS"


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A Pallas kernel of a compiled program."""

  name: str
  """Name with tiles."""
  block: schedule.Block
  vmem: int
  """Bytes of VMEM."""


@contextlib.contextmanager
def dumping() -> Iterator[pathlib.Path]:
  """Makes a folder that libtpu writes schedules to, if it is loaded inside.

  The folder is removed afterwards, but libtpu keeps using it: compile nothing
  more then.
  """
  with tempfile.TemporaryDirectory() as folder:
    flags = os.environ.get(_FLAGS, "")
    os.environ[_FLAGS] = f"{flags} {schedule.DUMP.format(folder)}"
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
  if not devices_lib.is_topology(topology):
    raise _unknown(topology, "it has not two or three sides, of some chips")
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except RuntimeError as e:  # JAX's, whatever is missing
    raise _unknown(topology, str(e).splitlines()[0]) from e
  return jax.sharding.Mesh(np.array(devices[:1]), ("x",))


def _unknown(topology: str, why: str) -> ValueError:
  return ValueError(
    f"{topology=} cannot be compiled for: {why}. Names are as "
    '"v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"; the compiler is libtpu: '
    'pip install "jax[tpu]".'
  )


def kernels(
  folder: pathlib.Path,
  mesh: jax.sharding.Mesh,
  function: Callable[..., Any],
  args: Any,
) -> Iterator[Compiled]:
  """Compiles a function; finds its kernels in the folder of `dumping`."""
  before = {*schedule.dumped(folder).values()}
  with jax.set_mesh(mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    args = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      args,
    )
    traced = jax.jit(function).trace(*args)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
  vmem = _vmem(text or "")
  for name, file in schedule.dumped(folder).items():
    if file not in before and name in vmem:
      block = schedule.parse(file.read_text(encoding="utf-8"))
      yield Compiled(_own_name(name), block, vmem[name])


def _own_name(name: str) -> str:
  """Drops what makes it another one's, or says where it stands."""
  name = re.sub(r"^(transpose_|jvp_)+", "", name.partition(".")[0])
  return name.rstrip("_")


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
