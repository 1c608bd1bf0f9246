"""Steps compiled for TPUs that are not here: what they take and what moves."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from dsa_jax import sharding
from pallas_kernels import dispatch
from tests.train import runs
from train import config as config_lib
from train.aot import collectives
from train.aot import compile as compile_lib
from train.host import mesh as mesh_lib

ARRAY = re.compile(r"\b(?:pred|bf16|[suf]\d+\w*)\[([\d,]+)\]")


def shapes(hlo: str) -> set[tuple[int, ...]]:
  return {tuple(map(int, dims.split(","))) for dims in ARRAY.findall(hlo)}


def test_collectives_in_loops_count_as_often_as_they_run():
  mesh = sharding.make_mesh(fsdp=4, devices=compile_lib.topology("v5p:2x2x1"))

  @jax.shard_map(
    mesh=mesh, in_specs=jax.P("fsdp"), out_specs=jax.P(), check_vma=False
  )
  def program(x):
    def inner(y, _):
      gathered = jax.lax.all_gather(y, "fsdp", tiled=True)
      return jnp.sin(gathered[:256]) + y, None

    def outer(y, _):
      y, _ = jax.lax.scan(inner, y, None, length=3)
      return y * 2, None

    y, _ = jax.lax.scan(outer, x, None, length=5)
    return jax.lax.psum(y, "fsdp")

  x = jax.ShapeDtypeStruct(
    (1024, 128), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("fsdp"))
  )
  hlo = jax.jit(program).lower(x).compile().as_text()
  assert hlo is not None
  moved = collectives.moved(hlo)
  assert moved == {
    "all-gather": collectives.Moved(15, 15 * 1024 * 128 * 4),
    "all-reduce": collectives.Moved(1, 256 * 128 * 4),
  }


def test_collectives_that_run_on_the_side_count():
  """As TPU7x has them: started by a custom call, or by a call."""
  hlo = """
%of_sparsecore (p: bf16[16,8]) -> bf16[32,8] {
  %p = bf16[16,8] parameter(0)
  ROOT %gathered = bf16[32,8] all-gather(%p), dimensions={0}
}
%of_call (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  ROOT %sum = f32[4] all-reduce(%p), to_apply=%add
}
ENTRY %main (x: bf16[16,8], y: f32[4]) -> f32[4] {
  %start = () custom-call-start(), called_computations={%of_sparsecore}
  ROOT %r = ((f32[4]), f32[4], u32[]) call-start(%y), to_apply=%of_call
}
"""
  assert collectives.moved(hlo) == {
    "all-gather": collectives.Moved(1, 32 * 8 * 2),
    "all-reduce": collectives.Moved(1, 4 * 4),
  }
  assert collectives.moved("") == {}


@pytest.mark.parametrize(
  "name",
  [
    *("v5p:3x5", "v9:2x2", "v5p", "v5p:", "v5p:0x0x0", "v6e:0x2", "v5p:2x2x"),
    *("v5p:-2x2x2", "v5p:1000x1000x1000", "v5p:2x2x٢", "v5p:2x2\n", "2x2x2"),
    "v5p:4294967297x1x1",
  ],
)
def test_refuses_a_topology_that_does_not_exist(name):
  with pytest.raises(ValueError, match=f"compile_only={name} is no TPU"):
    compile_lib.topology(name)


def test_records_what_ops_come_to():
  ops = {"chunked_xla": lambda x: x, "reference": lambda x: -x}
  with dispatch.record() as chosen:
    assert dispatch.call("twice", ops, None, 2) == 2
    assert dispatch.call("once", ops, "reference", 2) == -2
    for name in "reference", None:
      dispatch.call("twice", ops, name, 2)
  dispatch.call("outside", ops, None, 2)
  assert chosen == {
    "twice": ["chunked_xla", "reference"],
    "once": ["reference"],
  }


def small(tmp_path, **mesh) -> config_lib.TrainConfig:
  cfg = runs.config(tmp_path)
  stage = dataclasses.replace(
    cfg.stages[-1], seq_len=256, batch_size=4, microbatches=2
  )
  return dataclasses.replace(
    cfg,
    stages=(stage,),
    init_from="random",
    # Sizes that nothing else has, to tell an array of experts by them.
    model=dataclasses.replace(
      cfg.model, num_mtp_layers=0, num_experts=6, expert_ffn_dim=88
    ),
    mesh=mesh_lib.MeshConfig(**mesh),
  )


@pytest.mark.filterwarnings("ignore:.*runs as plain XLA")
@pytest.mark.slow
def test_only_the_meant_collectives(tmp_path):
  cfg = small(tmp_path, expert=2, context=2, tensor=2)
  mesh = sharding.make_mesh(
    **dataclasses.asdict(cfg.mesh), devices=compile_lib.topology("v5p:2x2x2")
  )
  with jax.set_mesh(mesh):
    traced = compile_lib.trace(cfg.step_plan, cfg.stages[0], mesh)
    hlo = traced.lower().compile().as_text()
  assert hlo is not None
  model = cfg.model
  moved = collectives.moved(hlo)
  # Of each expert layer and microbatch: there and back, forward, again by
  # remat, and backward.
  assert moved["ragged-all-to-all"].times == 2 * 3 * 2 * model.num_moe_layers
  # What has all 256 tokens of a sequence: keys, and words of 4 bytes a token.
  keys = {model.kv_rank + model.rope_head_dim, model.index_head_dim}
  gathered = [
    line.split(" all-gather")[0]
    for line in hlo.splitlines()
    if " all-gather(" in line or " all-gather-start(" in line
  ]
  assert gathered
  for line in gathered:
    for shape in shapes(line):
      if math.prod(shape) >= 256 * 16 and 256 in shape:
        assert shape[-1] in keys, line
  # Nowhere are the matrices of all experts.
  sizes = {model.num_experts, model.embed_dim, model.expert_ffn_dim // 2}
  for shape in shapes(hlo):
    assert not sizes <= set(shape), shape


@pytest.mark.tpus
def test_a_671b_model_made_sparse_at_128k_fits_512_chips(capsys):
  cfg = config_lib.load("configs/v32_671b_sparse.py")
  (stage,) = cfg.stages
  mesh = sharding.make_mesh(
    **dataclasses.asdict(cfg.mesh), devices=compile_lib.topology("v5p:8x8x8")
  )
  (compiled,) = compile_lib.compile_stages(cfg.step_plan, cfg.stages, mesh)
  print(compiled)
  assert "it fits" in capsys.readouterr().out
  assert compiled.temporaries + compiled.arguments < 0.85 * compiled.memory
  # At least parameters and moments in float32, cut over all chips.
  assert compiled.arguments > 3 * 4 * 671e9 / 512
  # In a tile of queries there is a score for every key; in no array are there
  # those of a device's queries.
  own = stage.seq_len // cfg.mesh.context
  for shape in shapes(compiled.hlo):
    assert not ({stage.seq_len} <= set(shape) and set(shape) & {own, own // 2})
  assert compiled.seconds < 1200  # kernels are compiled one by one
  assert compiled.host_bytes < 10 * 2**30


def test_refuses_a_tpu_of_unknown_memory(tmp_path):
  cfg = small(tmp_path)
  with pytest.raises(ValueError, match="'TPU v4'.* v5p, v6e, tpu7x, v5e"):
    compile_lib.report("v4:2x2x1", cfg.mesh, cfg.step_plan, cfg.stages)


def test_refuses_a_topology_that_is_too_small(tmp_path):
  cfg = dataclasses.replace(
    small(tmp_path, fsdp=2, tensor=2, context=2), compile_only="v5p:2x2x1"
  )
  with pytest.raises(ValueError, match="needs 8 devices, but there are 4"):
    compile_lib.report("v5p:2x2x1", cfg.mesh, cfg.step_plan, cfg.stages)
