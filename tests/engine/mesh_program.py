"""Runs an engine on a mesh of 2 x 2 x 2, and saves what it gives.

Alone, or as one of two processes: `python -m tests.engine.mesh_program FILE
PORT PROCESS`.
"""

import sys

from flax import nnx
import jax
import numpy as np

import dsa_jax
from dsa_jax.engine.request import Result
from tests.engine import engines
from tests.model import models

MESH = dict(fsdp=2, expert=2, tensor=2)


def model(cfg=models.CONFIG) -> dsa_jax.Transformer:
  """The tests' model, shared out over the mesh in context as for training."""
  graphdef, shapes = nnx.split(
    nnx.eval_shape(lambda: dsa_jax.Transformer(cfg, rngs=nnx.Rngs(0)))
  )
  mesh = jax.sharding.get_mesh()

  def put(x, shape):
    values = np.asarray(x)
    sharding = jax.NamedSharding(mesh, shape.sharding.spec)
    return jax.make_array_from_callback(
      values.shape, sharding, lambda index: values[index]
    )

  params = nnx.split(models.model(cfg))[1]
  return nnx.merge(graphdef, jax.tree.map(put, params, shapes))


def results(
  speculate: bool, *, on_mesh: bool = False, cfg=models.CONFIG, **dtypes
) -> list[Result]:
  """Of ragged requests of two samples, on one device or the mesh in context."""
  made = engines.requests(12, seed=21, n=2)
  engine = dsa_jax.Engine(
    model(cfg) if on_mesh else models.model(cfg),
    **(engines.SIZES | {"slots": 8, "pool_tokens": 1024}),
    returns=("kept", "experts"),
    speculate=speculate,
    **dtypes,
  )
  handles = [engine.submit(request) for request in made]
  return [result for handle in handles for result in handle.results()]


def main() -> None:
  file, port, process = sys.argv[1:]
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 4)
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", 2, int(process))
  models.model(models.CONFIG)  # on one device, before there is a mesh
  with jax.set_mesh(dsa_jax.make_mesh(**MESH)):
    found = results(speculate=True, on_mesh=True)
  arrays = [(r.tokens, r.log_probs, r.experts) for r in found]
  np.savez(file, *[np.asarray(x) for of_one in arrays for x in of_one])


if __name__ == "__main__":
  main()
