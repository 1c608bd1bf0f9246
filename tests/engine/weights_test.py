"""Parameters as the engine holds them are the model's."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.engine import weights
from tests.engine import engines
from tests.model import models

ROUTED = {"gate_EDF", "up_EDF", "down_EFD"}
# Of scores that decide, and of norms.
EXACT = {"w_DE", "w_DM", "scale_D", "bias_D", "bias_E"}


def held(params) -> list:
  """Arrays, and tuples of layers' arrays."""
  return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, tuple))


def test_of_weights_that_are_as_they_must_be_only_layers_are_copied():
  given = jax.tree.leaves_with_path(nnx.split(models.model(models.CONFIG))[1])
  arrays = held(engines.engine()._params)
  assert len(arrays) > 40
  for (path, x), y in zip(given, arrays, strict=True):
    names = [key.key for key in path[:-1]]
    of_stack = names[0] in ("dense_layers", "moe_layers")
    if of_stack and names[-1] not in ROUTED:
      assert isinstance(y, tuple), names
      np.testing.assert_array_equal(x, y, ".".join(names))
    else:
      assert x is y, names


def test_all_are_rounded_but_those_that_decide_or_normalise():
  cfg = dataclasses.replace(models.CONFIG, dtype="bfloat16")
  given = jax.tree.leaves_with_path(nnx.split(models.model(cfg))[1])
  arrays = held(weights.prepare(models.model(cfg), cfg)[1])
  names = set()
  for (path, x), y in zip(given, arrays, strict=True):
    names.add(name := path[-2].key)
    y = jnp.stack(y) if isinstance(y, tuple) else y
    assert x.dtype == jnp.float32
    assert y.dtype == (x.dtype if name in EXACT else jnp.bfloat16), name
    np.testing.assert_array_equal(x.astype(y.dtype), y, name)
  assert names > ROUTED | EXACT
