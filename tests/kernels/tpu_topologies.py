"""Compiles for TPUs on a machine that has none: libtpu is the real compiler."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import os
from typing import Any, Final

import jax
from jax import P
from jax.experimental import topologies
import numpy as np

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests in parallel

TOPOLOGIES: Final = {
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
  "tpu7x": "tpu7x:2x2x1",
}


@functools.cache
def mesh(chip: str) -> jax.sharding.Mesh:
  """One device of this kind."""
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=TOPOLOGIES[chip]
  )
  return jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))


def compile_step(
  chip: str,
  step: Callable[..., Any],
  shapes: Sequence[jax.ShapeDtypeStruct],
) -> jax.stages.Compiled:
  """The step on one device of this kind."""
  with jax.set_mesh(mesh(chip)):
    sharding = jax.sharding.NamedSharding(mesh(chip), P())
    args = [
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes
    ]
    traced = jax.jit(step).trace(*args)
    return traced.lower(lowering_platforms=("tpu",)).compile()
