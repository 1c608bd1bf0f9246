"""A model's parameters as the engine holds them.

A parameter of a stack of layers is a tuple of the layers' arrays, not one array
of all, so that a step copies none of it, see `block.decode_stack`. Only the
routed experts' matrices are as a model has them.
"""

import dataclasses
import functools
import math
from typing import Final

from flax import nnx
import jax

from dsa_jax import config as config_lib
from dsa_jax import moe
from dsa_jax import sharding
from dsa_jax import transformer

# Parameters that are computed with in fp32, by the beginning of their names:
# scores that decide, and what normalises. All others are rounded to the
# activations' dtype as they are used.
_FP32: Final = ("w_DM", "w_DE", "scale_", "bias_")


def config_for_decoding(
  cfg: config_lib.ModelConfig,
) -> config_lib.ModelConfig:
  """A model's config with rules by which no device waits for others' weights.

  Weights are whole on every device but for their heads, ffn, vocabulary and
  experts; experts are spread over all devices of a batch that share weights in
  training, as far as there are enough of them. Sequences are not cut.
  """
  old = cfg.rules
  share = {*sharding.names(old.experts), *sharding.names(old.embed)}
  spread: tuple[str, ...] = ()
  for axis in old.mesh_axes("batch") or ():
    wider = (*spread, axis)
    fits = cfg.num_experts % math.prod(map(sharding.size, wider)) == 0
    spread = wider if axis in share and fits else spread
  rules = dataclasses.replace(
    old, seq=None, embed=None, rank=None, experts=spread or None
  )
  return dataclasses.replace(cfg, rules=rules)


def prepare(
  model: transformer.Transformer, cfg: config_lib.ModelConfig
) -> tuple[nnx.GraphDef[transformer.Transformer], nnx.State, nnx.State]:
  """A model by its rules for decoding.

  Args:
    model: The model.
    cfg: Its `config_for_decoding`.

  Returns:
    The model without its parameters; the parameters, placed; and their shapes,
    with the shardings that others must have.
  """
  graphdef, params = nnx.split(model)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
  )
  if not jax.sharding.get_abstract_mesh().empty:
    graphdef, shapes = nnx.split(
      nnx.eval_shape(lambda: transformer.Transformer(cfg, rngs=nnx.Rngs(0)))
    )
  return graphdef, place(params, shapes, cfg), shapes


def place(
  params: nnx.State, shapes: nnx.State, cfg: config_lib.ModelConfig
) -> nnx.State:
  """Parameters where the engine wants them, in the dtype it computes with.

  Those that are so already are not copied, but for layers: each one's arrays
  are new, cut from those given, whatever their dtype. So the result takes as
  much memory as these layers' parameters, and as what has another dtype or
  place, and nothing else is made on the way.

  Args:
    params: A model's.
    shapes: What they must be, from `prepare`.
    cfg: The model's config.

  Returns:
    The parameters; those of layers, but for routed experts' matrices, are
    tuples of the layers' arrays.

  Raises:
    ValueError: They are not those of this model.
  """
  wanted, given = (
    {".".join(str(key.key) for key in path[:-1]): x.shape for path, x in leaves}
    for leaves in map(jax.tree.leaves_with_path, (shapes, params))
  )
  for name in wanted | given:
    if wanted.get(name) != given.get(name):
      raise ValueError(
        f"Weights: the engine's model has {name} of shape {wanted.get(name)}, "
        f"but is given {given.get(name)}; give the parameters of this model."
      )

  on_mesh = not jax.sharding.get_abstract_mesh().empty

  def put(path, x, shape):
    dtype = None if _is_fp32(path) else cfg.dtype
    spec = shape.sharding.spec if on_mesh else None
    if _is_cut(path):
      return tuple(_as(x, dtype, spec, i) for i in range(len(x)))
    return x if _is_so(x, dtype, spec) else _as(x, dtype, spec)

  leaves, tree = jax.tree.flatten_with_path(params)
  each = zip(leaves, jax.tree.leaves(shapes), strict=True)
  return jax.tree.unflatten(tree, [put(*leaf, x) for leaf, x in each])


def _is_cut(path) -> bool:
  """Whether the engine has an array for each layer of a parameter."""
  names = tuple(key.key for key in path[:-1])
  is_of_stack = names[0] in ("dense_layers", "moe_layers")
  return is_of_stack and not moe.is_routed(names, None)


def _is_so(x, dtype, spec) -> bool:
  """Whether an array has this dtype (None: any) and this spec (None: any)."""
  if spec is not None:
    there = jax.NamedSharding(jax.sharding.get_mesh(), spec)
    if not there.is_equivalent_to(x.sharding, x.ndim):
      return False
  return dtype is None or x.dtype == dtype


def _is_fp32(path) -> bool:
  name = str(path[-2].key) if len(path) > 1 else ""
  return name.startswith(_FP32)


@functools.partial(jax.jit, static_argnames=("dtype", "spec"))
def _as(x, dtype, spec, layer=None):
  """An array, or a layer of a stack's, of this dtype (None: its own)."""
  if layer is not None:
    x = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    spec = spec if spec is None else jax.P(*spec[1:])
  return sharding.put(x if dtype is None else x.astype(dtype), spec)
