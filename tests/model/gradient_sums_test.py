"""A parameter's gradient is a sum over tokens, and stands still in no row.

In bfloat16 a sum of equal numbers ends at 256 of them. So many tokens are equal
here: one a third of them, one 85 times among 32,768.
"""

import dataclasses
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import embed
from dsa_jax import experts
from dsa_jax import moe
from dsa_jax import parameter
from dsa_jax import sharding
from tests.model import mesh_test
from tests.model import models
from tests.train.learn import step_test
from train.learn import guards
from train.learn import optimizer as optimizer_lib
from train.learn import step as step_lib

CONFIG = dataclasses.replace(
  models.CONFIG, dtype="bfloat16", num_mtp_layers=0, num_dense_layers=1
)
MESHES = [
  {},
  dict(data=2, fsdp=2, tensor=2),
  dict(fsdp=2, context=2, expert=2),
]
OFTEN, SOMETIMES = 7, 11
_SUM = re.compile(r" = (.+?) (all-reduce|reduce-scatter)(?:-start)?\(")


def unequal_tokens(batch, length, cfg=CONFIG):
  """A third of them is `OFTEN`, 85 are `SOMETIMES`."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(12, cfg.vocab_size, batch * length).astype(np.int32)
  tokens[::3] = OFTEN
  tokens[1 : 3 * 85 : 3] = SOMETIMES
  return rng.permutation(tokens).reshape(batch, length)


def put(x, cfg, *axes):
  return sharding.put(x, cfg.rules(*axes))


def assert_rows(actual, expected, tolerance, name=""):
  """Every row (its last axis) relative to its own norm."""
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  error = np.linalg.norm(actual - expected, axis=-1)
  np.testing.assert_array_less(
    error, tolerance * np.linalg.norm(expected, axis=-1) + 1e-30, name
  )


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize(
  "param_dtype, tolerance", [("float32", 1e-5), ("bfloat16", 4e-3)]
)
def test_rows_of_the_embedding(axes, param_dtype, tolerance):
  cfg = dataclasses.replace(CONFIG, param_dtype=param_dtype)
  tokens = unequal_tokens(64, 512)
  rng = np.random.default_rng(1)
  d_y = (rng.normal(size=(*tokens.shape, cfg.embed_dim)) + 1).astype("bfloat16")
  with jax.set_mesh(sharding.make_mesh(**axes)):
    layer = embed.Embed(cfg, rngs=nnx.Rngs(0))
    inputs = (
      put(tokens, cfg, "batch", "seq"),
      put(d_y, cfg, "batch", "seq", None),
    )

    @jax.jit
    def gradient(layer, tokens, d_y):
      _, pullback = jax.vjp(lambda layer: layer(tokens), layer)
      return pullback(d_y)[0].table_VD[...]

    actual = jax.device_get(gradient(layer, *inputs))
  expected = np.zeros(actual.shape)
  np.add.at(expected, tokens, d_y.astype(np.float64))
  assert_rows(actual, expected, tolerance)


@pytest.mark.parametrize("axes", MESHES)
def test_rows_of_a_matrix(axes):
  rng, cfg = np.random.default_rng(0), CONFIG
  x = rng.normal(size=(1, 1, 16)).repeat(64, 0).repeat(512, 1)
  x, d_y = x.astype("bfloat16"), np.full((64, 512, 8), 0.3).astype("bfloat16")
  w = rng.normal(size=(16, 8)).astype(np.float32)
  with jax.set_mesh(sharding.make_mesh(**axes)):
    out = cfg.rules("batch", "seq", "ffn")

    @jax.jit
    def gradient(x, w, d_y):
      product = functools.partial(
        parameter.einsum, "BTD,DF->BTF", out_sharding=out
      )
      return jax.vjp(product, x, w)[1](d_y)

    d_x, d_w = gradient(
      put(x, cfg, "batch", "seq", None),
      put(w, cfg, "embed", "ffn"),
      put(d_y, cfg, "batch", "seq", "ffn"),
    )
    assert (d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.float32)
  f64 = np.float64
  expected = np.einsum("BTD,BTF->DF", x.astype(f64), d_y.astype(f64))
  assert_rows(d_w, expected, 3e-4)  # a CPU's sum; bfloat16 itself has 2e-3


@functools.cache
def of_equal_tokens(batch, length, **axes):
  """Gradients of a layer of experts, all of whose tokens are equal."""
  token = np.random.default_rng(0).normal(size=32).astype("bfloat16")
  with jax.set_mesh(sharding.make_mesh(**axes)):
    layer = moe.MoE(CONFIG, rngs=nnx.Rngs(0))
    x = put(np.tile(token, (batch, length, 1)), CONFIG, "batch", "seq", None)

    @jax.jit
    def gradient(layer, x):
      valid = jnp.ones_like(x[..., 0], bool)
      total = lambda layer: layer(x, valid)[0].astype(jnp.float32).sum()
      return nnx.to_pure_dict(nnx.state(jax.grad(total)(layer), nnx.Param))

    return jax.device_get(gradient(layer, x))


@pytest.mark.parametrize("axes", [{}, dict(data=2, expert=2, tensor=2)])
@pytest.mark.parametrize("parts", [1, 256])
def test_rows_of_experts(monkeypatch, axes, parts):
  shared = axes.get("expert", 1)
  tokens = 4096 // (axes.get("data", 1) * shared)  # of a device
  row_bytes = 2 * CONFIG.embed_dim * CONFIG.experts_per_token
  monkeypatch.setattr(experts, "_BYTES", tokens // parts * shared * row_bytes)
  actual = of_equal_tokens.__wrapped__(8, 512, **axes)
  one = dict(step_test.named(of_equal_tokens(1, 1)))
  for name, x in step_test.named(actual):
    assert_rows(x, 4096 * one[name], 5e-3, name)


@pytest.mark.slow
def test_devices_add_in_fp32(tmp_path):
  """Read where XLA has cut the program: later, a CPU's adds in fp32 anyway."""
  cfg = dataclasses.replace(mesh_test.LAYER, dtype="bfloat16")
  stage = step_test.stage()
  mesh = sharding.make_mesh(**mesh_test.ALL)
  with jax.set_mesh(mesh):
    model, init = step_lib.init(cfg, 0)
    parameters = jax.eval_shape(init, jax.random.key(0))
    begin = functools.partial(step_lib.begin_stage, step_test.OPTIMIZER, stage)
    state = step_lib.on_mesh(jax.eval_shape(begin, *parameters), mesh)
    optimizer = optimizer_lib.make_optimizer(step_test.OPTIMIZER, stage)
    train_step = step_lib.make_train_step(
      model, stage, optimizer, guards.GuardConfig()
    )
    rows = jax.NamedSharding(mesh, cfg.rules(None, "batch", None) or jax.P())
    batch = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
      for name, x in step_test.cut(step_test.batch(), 1).items()
    }
    train_step.lower(state, batch).compile(
      compiler_options={
        "xla_dump_to": str(tmp_path),
        "xla_dump_hlo_pass_re": "spmd-partitioning",
      }
    )
  (file,) = tmp_path.glob("*train_step*after_spmd-partitioning*.txt")
  sums = _SUM.findall(file.read_text(encoding="utf-8"))
  assert any("f32" in types for types, _ in sums)
  assert not [found for found in sums if "bf16" in found[0]]
