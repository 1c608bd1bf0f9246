"""Logical axis names -> mesh axes, in one place.

The same code runs on one device, on a pod, and inside a program that has no
mesh or one of its own: a rule names only those mesh axes that the mesh in
context has and that are Explicit there. Without a mesh nothing is sharded.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math
from typing import Annotated, Any, Final

import jax
from jax import P
from jax.experimental import mesh_utils
import jax.numpy as jnp

from dsa_jax import ranges

type MeshAxis = Annotated[str, ranges.Length(1, 64)]
type MeshAxes = MeshAxis | tuple[MeshAxis, ...] | None

MESH_AXES: Final = ("data", "fsdp", "expert", "context", "tensor")

# Dimensions of one array: of activations, then of weights.
_TOGETHER: Final = (
  *(("batch", "seq", x) for x in ("heads", "ffn", "vocab", "index_heads")),
  *(("embed", "experts", "ffn"), ("embed", "heads"), ("embed", "vocab")),
  ("rank", "heads"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
  """Maps each logical axis to the mesh axes that shard it."""

  batch: MeshAxes = ("data", "fsdp", "expert")
  seq: MeshAxes = "context"  # in zigzag order, see zigzag.py
  # D of weights; activations keep it whole. Devices that share a sequence share
  # the weights as well.
  embed: MeshAxes = ("fsdp", "context")
  rank: MeshAxes = ("fsdp", "context")  # Q and C of weights, likewise
  heads: MeshAxes = "tensor"
  ffn: MeshAxes = "tensor"
  vocab: MeshAxes = "tensor"
  experts: MeshAxes = "expert"
  index_heads: MeshAxes = None  # few and small: replicated, which saves a psum

  def __post_init__(self):
    ranges.check(self)
    for dimensions in _TOGETHER:
      seen: set[str] = set()
      for dimension in dimensions:
        for name in names(axes := getattr(self, dimension)):
          if name in seen:
            raise ValueError(
              f"{dimension}={axes!r}: the rules of {', '.join(dimensions)} "
              f"name {name!r} twice, but there are arrays with all of these "
              "dimensions: a mesh axis shards one of them."
            )
          seen.add(name)

  @property
  def keys(self) -> MeshAxes:
    """The batch of keys: each device that shares a sequence has a copy."""
    return (*names(self.seq), *names(self.batch))

  def __call__(self, *axes: str | None) -> P | None:
    """The spec of an array with these logical axes; None without a mesh."""
    if not _explicit_mesh():
      return None
    return P(*(self.mesh_axes(axis) for axis in axes))

  def mesh_axes(self, axis: str | None) -> MeshAxes:
    """The axes of the mesh in context that shard a logical axis.

    Inside `local` there are none: what a psum there needs is asked for outside.
    """
    wanted = names(None if axis is None else getattr(self, axis))
    mesh = _explicit_mesh()
    return tuple(name for name in wanted if mesh.get(name, 1) > 1) or None

  def shards(self, axis: str) -> int:
    """Into how many parts a logical axis is cut."""
    return size(self.mesh_axes(axis))


def size(axes: MeshAxes) -> int:
  """Devices along axes of the mesh in context."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in names(axes))


def names(axes: MeshAxes) -> tuple[str, ...]:
  """The mesh axes of a rule."""
  return (axes,) if isinstance(axes, str) else axes or ()


def _explicit_mesh() -> dict[str, int]:
  """The Explicit axes of the mesh in context, and their sizes."""
  mesh = jax.sharding.get_abstract_mesh()
  explicit = jax.sharding.AxisType.Explicit
  return {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types)
    if kind == explicit
  }


def local(
  f: Callable[..., Any],
  in_specs: Sequence[Any],
  out_specs: Any,
  *,
  differentiable: bool = True,
) -> Callable[..., Any]:
  """`f` on each device's blocks, cut by `in_specs`; `f` without a mesh.

  Where it need not be `differentiable`, arguments go in as they are: a cache is
  too large for the detour that gradients take.
  """
  if not _explicit_mesh():
    return f

  def mapped(*args):
    leaves, tree = jax.tree.flatten(tuple(map(jax.reshard, args, in_specs)))
    dtypes = [x.dtype for x in leaves]

    def own(*blocks):
      given = zip(jax.tree.leaves(blocks), dtypes)
      return f(*tree.unflatten(x.astype(dtype) for x, dtype in given))

    # Kernels do not say how their results vary over the mesh: no vma check.
    run = jax.shard_map(
      own, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False
    )
    # To fp32 and back: nothing forward, but devices that share a block add
    # their gradients of it in fp32.
    if differentiable:
      leaves = map(_to_fp32, leaves)
    return run(*tree.unflatten(leaves))

  return mapped


def _to_fp32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def spec(x: jax.Array) -> P | None:
  """How `x` is cut over the mesh in context; None without a mesh."""
  return jax.typeof(x).sharding.spec if _explicit_mesh() else None


def put(x: Any, spec: P | None) -> jax.Array:
  """`x` with this spec; as it is without a mesh."""
  x = jnp.asarray(x)
  return x if spec is None else jax.reshard(x, spec)


def make_mesh(
  *,
  data: int = 1,
  fsdp: int = 1,
  expert: int = 1,
  context: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """An explicit mesh with all of `MESH_AXES`, by default of one device.

  Args:
    data: Copies of the model.
    fsdp: Devices that share each copy's weights.
    expert: Devices that share the experts.
    context: Devices that share a sequence.
    tensor: Devices that share heads, ffn and vocabulary.
    devices: The first of them are taken; by default of `jax.devices()`.

  Raises:
    ValueError: A size is below 1, or there are too few devices.
  """
  shape = (data, fsdp, expert, context, tensor)
  for axis, size_of_axis in zip(MESH_AXES, shape):
    ranges.require(f"The mesh's axis {axis}", size_of_axis, ranges.Count)
  devices = jax.devices() if devices is None else devices
  needed = math.prod(shape)
  if needed > len(devices):
    sizes = " x ".join(f"{n} {axis}" for axis, n in zip(MESH_AXES, shape))
    raise ValueError(
      f"The mesh of {sizes} needs {needed} devices, but there are "
      f"{len(devices)}. Lower one of its axes."
    )
  explicit = (jax.sharding.AxisType.Explicit,) * len(shape)
  # Neighbours on a mesh axis are neighbours on the chips' network.
  grid = mesh_utils.create_device_mesh(
    shape, devices[:needed], allow_split_physical_axes=True
  )
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=explicit)
