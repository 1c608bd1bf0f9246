"""A step of decoding takes no memory for what is cached, nor copies of weights.

Read off the compiled program, which is not run.
"""

import contextlib
import dataclasses
import functools
import math
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import dsa_jax
from dsa_jax.engine import programs
from dsa_jax.engine import weights
from tests.kernels import hlo
from tests.kernels import tpu_topologies
from tests.model import models

SLOTS, PAGE = 4, 64
LARGE = 2**20  # bytes
# A layer's experts and its part of the pool, of 4K tokens for each slot, are
# larger, each of their arrays, and so are MATRICES; all that a step computes is
# smaller.
CONFIG = dataclasses.replace(
  models.CONFIG,
  num_layers=2,
  num_dense_layers=0,
  embed_dim=256,
  num_heads=8,
  nope_head_dim=128,
  value_head_dim=144,
  q_rank=256,
  kv_rank=32,
  index_head_dim=32,
  num_experts=16,
  expert_ffn_dim=384,
  num_shared_experts=3,
)
MATRICES = {"q_b_QNX", "out_NUD", "gate_DF", "up_DF", "down_FD"}
KINDS: dict[str, Any] = {
  "sparse": dict(attention="sparse", speculates=False),
  "sparse, with drafts": dict(attention="sparse", speculates=True),
  "dense": dict(attention="dense", speculates=False),
}
kinds = pytest.mark.parametrize(
  "kind",
  [
    k if k == "sparse" else pytest.param(k, marks=pytest.mark.slow)
    for k in KINDS
  ],
)

# A result: its computation's name or its own, its shape, and what made it.
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_RESULT = re.compile(
  r"^\s+(ROOT )?%?[\w.-]+ = (\w+)\[([\d,]+)\]\S* ([\w-]+)\((.*)$"
)
_CALLED = re.compile(r"calls=%?([\w.-]+)")
_BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, u16=2, s64=8, u64=8, f64=8)
# They make nothing new, or write in place.
_NO_COPIES = ("parameter", "get-tuple-element", "bitcast", "scatter")


@contextlib.contextmanager
def as_for_a_user():
  """Optimized; and not checked: what is lowered has shapes for arrays."""
  jax.config.update("jax_disable_most_optimizations", False)
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    yield
  finally:
    jaxtyping.config.update("jaxtyping_disable", False)
    jax.config.update("jax_disable_most_optimizations", True)


def model(cfg: dsa_jax.ModelConfig) -> tuple[Any, nnx.State]:
  """A model without its parameters, and the shapes of those of an engine."""
  make = lambda: dsa_jax.Transformer(cfg, rngs=nnx.Rngs(0))
  graphdef, shapes = nnx.split(nnx.eval_shape(make))
  place = lambda params: weights.place(params, shapes, cfg)
  return graphdef, jax.eval_shape(place, shapes)


@functools.cache
def compiled(
  kind: str,
  length: int,
  cfg=CONFIG,
  dtypes=(None, None),
  chip: str | None = None,
) -> tuple[jax.stages.Compiled, int]:
  """`decode` for slots of so many tokens each, by default for a CPU; and the
  bytes of their pool."""
  pages, struct = length // PAGE, jax.ShapeDtypeStruct
  with as_for_a_user():
    graphdef, params = model(cfg)
  on_chip = chip and jax.set_mesh(tpu_topologies.mesh(chip))
  with as_for_a_user(), on_chip or contextlib.nullcontext():
    pool = programs.make_pool.eval_shape(cfg, SLOTS * pages, PAGE, *dtypes)
    arguments = (
      *(params, pool, programs.make_slots.eval_shape(cfg, SLOTS)),
      *(struct((SLOTS, pages), jnp.int32), struct((SLOTS,), jnp.bool)),
      struct((), jnp.bool),
    )
    if chip is not None:
      there = jax.NamedSharding(tpu_topologies.mesh(chip), jax.P())
      arguments = jax.tree.map(
        lambda x: struct(x.shape, x.dtype, sharding=there), arguments
      )
    traced = programs.decode.trace(
      *(graphdef, *arguments),
      kind=programs.Kind(
        **KINDS[kind], steps=4, kept=False, experts=False, selected=False
      ),
    )
    step = traced.lower(
      lowering_platforms=("tpu" if chip else "cpu",)
    ).compile()
  leaves = jax.tree.leaves(pool)
  return step, sum(x.size * x.dtype.itemsize for x in leaves)


def copies(compiled: jax.stages.Compiled) -> list[str]:
  """Large results that are no views of others, nor updates in place."""
  text = compiled.as_text()
  assert text is not None, "This backend does not say."
  found, roots, computation = [], {}, ""
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      computation = match[1]
    if not (match := _RESULT.match(line)):
      continue
    root, dtype, shape, op, rest = match.groups()
    if root:
      roots[computation] = op
    size = math.prod(map(int, shape.split(","))) * _BYTES.get(dtype, 4)
    called = _CALLED.search(rest)
    if called is not None:
      op = roots[called[1]]  # of a fusion; it comes before
    if size > LARGE and op not in _NO_COPIES:
      found.append(f"{op} {dtype}[{shape}]")
  assert len(roots) > 1, "This is no program."
  return found


@kinds
def test_memory_does_not_grow_with_what_is_cached(kind):
  short, long = (
    hlo.temporary_bytes(compiled(kind, length)[0]) for length in (4096, 65536)
  )
  assert long < 1.1 * short


@kinds
def test_the_pool_is_updated_in_place(kind):
  step, pool_bytes = compiled(kind, 65536)
  memory = step.memory_analysis()
  assert memory is not None, "This backend does not say."
  assert memory.alias_size_in_bytes >= pool_bytes > 100 * LARGE


@kinds
def test_nothing_large_is_copied(kind):
  step, pool_bytes = compiled(kind, 4096)
  large = {
    path[-2 if x.ndim > 3 else -3].key
    for path, x in jax.tree.leaves_with_path(model(CONFIG)[1]["moe_layers"])
    if x.size * x.dtype.itemsize > LARGE
  }
  assert large == MATRICES | {"gate_EDF", "up_EDF", "down_EFD"}
  assert pool_bytes > 6 * LARGE  # three layers of two arrays
  assert copies(step) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* runs as plain XLA:UserWarning")
def test_keys_in_8_bits_are_read_and_written_where_they_lie():
  """On a TPU: on a CPU, XLA copies numbers of 8 bits to such of 16.

  It also copies what is small beside them, scales and rotated keys.
  """
  wide: Any = dict(kv_rank=128, index_head_dim=128, dtype="bfloat16")
  cfg, length = dataclasses.replace(CONFIG, **wide), 65536
  dtypes = tuple(models.EIGHT_BITS.values())
  step, pool_bytes = compiled("sparse", length, cfg, dtypes, "v6e")
  of_a_layer = SLOTS * length * 128
  shapes = (x.split("[")[1].rstrip("]").split(",") for x in copies(step))
  sizes = [math.prod(map(int, shape)) for shape in shapes]
  assert sizes and max(sizes) < of_a_layer
  memory = step.memory_analysis()
  assert memory is not None, "This backend does not say."
  assert memory.alias_size_in_bytes >= pool_bytes


def test_what_is_cut_out_of_a_stack_is_found():
  """As a layer of a pool, or of weights, that goes through a scan."""

  def layers(pool, x):
    write = lambda x, layer: (x + 1, layer.at[0].set(x))
    return jax.lax.scan(write, x, pool)[1]

  pool, x = jnp.zeros((3, 512, 1024)), jnp.zeros(1024)
  with as_for_a_user():
    step = jax.jit(layers, donate_argnums=0).lower(pool, x).compile()
  assert copies(step)
