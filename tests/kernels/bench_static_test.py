"""Estimates without a TPU: schedules are read as they were made."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels import shapes
from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench.estimate import compiler
from pallas_kernels.bench.estimate import schedule
from pallas_kernels.bench.estimate import work as work_lib
from pallas_kernels.cases import counts
from pallas_kernels.cases import data
from pallas_kernels.ops.dense_indexer_loss.mosaic_tpu import (
  counts as dense_indexer_loss,
)
from pallas_kernels.ops.dense_mla import api as dense_mla

# libtpu writes schedules only where it was told to before it was loaded, which
# other tests may have done: this is a process of its own. Of each kernel,
# [32 or 64 steps, 5 or 10 products in a loop]: its work, and its loops' turns.
COMPILE = """
import functools, json, sys
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from pallas_kernels.bench.estimate import compiler, schedule, work
from pallas_kernels.cases import counts

def kernel(x, y, out, *, turns):
  @pl.when(pl.program_id(1) == 0)
  def _():
    out[...] = jnp.zeros_like(out)
  def add(i, _):
    out[...] += jnp.dot(x[i], y[...], preferred_element_type=jnp.float32)
  jax.lax.fori_loop(0, turns, add, None)

def call(x, y):
  turns, T = x.shape[0], x.shape[1]
  return pl.pallas_call(
    functools.partial(kernel, turns=turns),
    name=f"products_q{T}_k{turns}",
    grid=(T // 256, 4),
    in_specs=[
      pl.BlockSpec((turns, 256, 256), lambda i, j: (0, i, j)),
      pl.BlockSpec((256, 512), lambda i, j: (j, 0)),
    ],
    out_specs=pl.BlockSpec((256, 512), lambda i, j: (i, 0)),
    out_shape=jax.ShapeDtypeStruct((T, 512), jnp.float32),
  )(x, y)

found = {}
with compiler.dumping() as folder:
  mesh = compiler.device(sys.argv[1])
  sharding = jax.sharding.NamedSharding(mesh, jax.P())
  sds = lambda *shape: jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=sharding
  )
  for steps, turns in (32, 5), (64, 5), (32, 10):
    T = 64 * steps
    with jax.set_mesh(mesh):
      jax.jit(call).trace(sds(turns, T, 1024), sds(1024, 512)).lower(
        lowering_platforms=("tpu",)
      ).compile()
    files = schedule.dumped(folder)
    (name,) = [x for x in files if x.startswith(f"products_q{T}_k{turns}")]
    block = schedule.parse(files[name].read_text())
    done = work.work(
      block, counts.Counts(steps=steps, ends=T // 256, blocks=(), bytes=0)
    )
    loops = [x.trips for _, x in block.walk() if x.kind == "loop"]
    found[f"{steps}x{turns}"] = done.cycles, done.matmuls, loops
print(json.dumps(found))
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, *args], capture_output=True, text=True, check=False
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "topology, side",
  [("v5p:2x2x1", 128), ("v6e:2x2", 256), ("tpu7x:2x2x1", 256)],
)
def test_cycles_are_known_by_construction(topology, side):
  done = run("-c", COMPILE, topology)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  once, double, longer = (found[x] for x in ("32x5", "64x5", "32x10"))
  # The grid's loop has two turns more, to fetch ahead and to write behind.
  assert once[2] == [34, 5] and double[2] == [66, 5] and longer[2] == [34, 10]
  # An instruction multiplies 16 rows with a square of this side.
  products = 32 * 5 * (256 // 16) * (256 // side) * (512 // side)
  assert [x[1] for x in (once, double, longer)] == [
    products,
    2 * products,
    2 * products,
  ]
  # All turns at the most do alike, and the two more nothing at the least.
  assert 66 / 34 <= double[0] / once[0] <= 2
  assert 1.6 < longer[0] / once[0] < 2


def block(kind, own, *inside, trips=None, matmuls=0):
  """Bundles of its own, and then what is inside."""
  units = schedule.collections.Counter(matmul=matmuls)
  return schedule.Block(kind, 0, own - 1, trips, own, units, [*inside])


def place(outer, first=0):
  """Gives the blocks places, one after another."""
  outer.first, at = first, first + outer.own
  for inner in outer.inside:
    at = place(inner, at)
  outer.last = at - 1
  return at


def kernel():
  chosen = block("branch", 30, matmuls=2), block("branch", 50, matmuls=2)
  walk = block("loop", 10, *chosen)
  fixed = block("loop", 7, trips=4)
  first = block("branch", 25)
  step = block("branch", 20, first, block("branch", 5, walk), fixed)
  whole = block("kernel", 3, block("loop", 11, block("branch", 22), step))
  place(whole)
  return whole


def test_blocks_are_weighed_in_their_order():
  of = counts.Counts(steps=100, ends=10, blocks=(400, 300, 90), bytes=0)
  work = work_lib.work(kernel(), of)
  cycles = 3 + 100 * (11 + 22 + 20) + 10 * 25 + 400 * 10 + 300 * 30 + 90 * 50
  assert work.cycles == cycles + 100 * 4 * 7
  assert work.matmuls == 2 * 300 + 2 * 90


def test_what_is_never_run_has_no_counts():
  of = counts.Counts(steps=100, ends=0, blocks=(0,), bytes=0)
  assert work_lib.work(kernel(), of).matmuls == 0


@pytest.mark.parametrize(
  "blocks, message",
  [((400, 300), "Nothing is known"), ((1, 1, 1, 1), "1 blocks are counted")],
)
def test_counts_of_another_kernel_are_refused(blocks, message):
  of = counts.Counts(steps=100, ends=10, blocks=blocks, bytes=0)
  with pytest.raises(work_lib.Unknown, match=message):
    work_lib.work(kernel(), of)


@pytest.mark.parametrize("visible", ["causal", "all"])
def test_tiles_that_are_seen(visible):
  shape = shapes.Shape(T=40, S=97, K=30, N=4)
  call = counts.Call(shape=shape, visible=visible, union=None)
  start, end = (np.asarray(x)[0] for x in data.ranges(shape, visible))
  key = np.arange(104)
  sees_TS = (key >= start[:, None]) & (key < end[:, None])
  tiles = sees_TS.reshape(5, 8, 13, 8)
  alive = (start < end).reshape(5, 8, 1, 1)
  seen, whole = counts.spans(call, 8, 8)
  assert seen == tiles.any((1, 3)).sum()
  assert whole == (tiles | ~alive).all((1, 3)).sum()


def test_an_unknown_topology_is_told():
  options = "dense_mla", "--shape=tiny", "--topology=v9:2x2"
  done = run("-m", "pallas_kernels.bench", *options)
  assert done.returncode == 1
  assert "error: topology='v9:2x2' cannot be compiled for" in done.stderr
  assert '"v6e:2x2"' in done.stderr


def test_a_missing_compiler_is_told(monkeypatch):
  def fail(**_):
    raise RuntimeError("libtpu.so is not there")

  monkeypatch.setattr(compiler.topologies, "get_topology_desc", fail)
  with pytest.raises(SystemExit, match="libtpu.so is not there.*jax.tpu"):
    bench.main(["dense_mla", "--shape=tiny", "--topology=v6e:2x2"])


def test_an_op_without_a_kernel_is_told(monkeypatch):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
  monkeypatch.setattr(compiler, "device", lambda _: mesh)
  monkeypatch.delitem(dense_mla.IMPLEMENTATIONS, "mosaic_tpu")
  with pytest.raises(SystemExit, match="dense_mla: .*'mosaic_tpu' is unknown"):
    bench.main(["dense_mla", "--shape=tiny", "--topology=v6e:2x2"])


def test_a_tpu_is_measured(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(bench, "_measure", lambda *_: sys.exit("measured"))
  with pytest.raises(SystemExit, match="measured"):
    bench.main(["dense_mla", "--shape=tiny", "--topology=v6e:2x2"])


@pytest.mark.tpus
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_attention_has_an_estimate(topology, tmp_path: pathlib.Path):
  """The counts are those of the kernels as they are."""
  file = tmp_path / "out.json"
  sizes = "--shape=8k", "--heads=16", f"--topology={topology}"
  options = "attention", *sizes, f"--json={file}"
  done = run("-m", "pallas_kernels.bench", *options)
  assert done.returncode == 0, done.stderr
  values = json.loads(file.read_text(encoding="utf-8"))
  assert [x["what"] for x in values["programs"]] == [
    "indexer_topk forward",
    "sparse_mla forward",
    "dense_mla forward",
  ]
  for program in values["programs"]:
    assert program["seconds"] > program["floor_matmul_seconds"]
    for x in program["kernels"]:
      assert 0 < x["matmul_share"] < 1
      assert 0 < x["vmem"] <= values["chip"]["vmem"]
  assert values["ratios"][0]["value"] > 0


@pytest.mark.tpus
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
  "op", ["sparse_mla", "sparse_indexer_loss", "dense_indexer_loss"]
)
def test_gradients_have_an_estimate(op, topology, tmp_path: pathlib.Path):
  file = tmp_path / "out.json"
  sizes = "--shape=8k", "--heads=16", "--grad", "--no-measure", "--union=2"
  done = run(
    *("-m", "pallas_kernels.bench", op, *sizes),
    *(f"--topology={topology}", f"--json={file}"),
  )
  assert done.returncode == 0, done.stderr
  (program,) = json.loads(file.read_text(encoding="utf-8"))["programs"]
  assert program["seconds"] > program["floor_matmul_seconds"]
  assert {x["name"].partition("_q")[0] for x in program["kernels"]} == {
    "sparse_mla": {"sparse_mla_forward", "sparse_mla_backward"},
    "sparse_indexer_loss": {
      "sparse_indexer_loss_distributions",
      "sparse_indexer_loss_gradients",
    },
    "dense_indexer_loss": {
      "dense_indexer_loss_scores",
      "dense_indexer_loss_target",
      "dense_indexer_loss_gradients",
    },
  }[op]


@pytest.mark.tpus
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_crossover_has_an_estimate(topology, tmp_path: pathlib.Path):
  file = tmp_path / "out.json"
  sizes = "--shape=8k", "--heads=16", "--grad", "--union=2"
  done = run(
    *("-m", "pallas_kernels.bench", "crossover", *sizes),
    *(f"--topology={topology}", f"--json={file}"),
  )
  assert done.returncode == 0, done.stderr
  values = json.loads(file.read_text(encoding="utf-8"))
  sparse, dense = values["programs"]
  assert {x["name"].partition("_q")[0] for x in dense["kernels"]} == {
    "dense_mla_mask_bits",
    "dense_mla_masked_forward",
    "dense_mla_masked_backward",
  }
  # The last 4096 of 8192 tokens see 6144.5 keys, on an average, but for a few.
  expected = 6144.5 / 2048 * sparse["seconds"] / dense["seconds"]
  np.testing.assert_allclose(values["ratios"][0]["value"], expected, 1e-3)


def test_chunks_of_queries_are_those_of_all_cores():
  shape = shapes.Shape(T=64, S=256, K=16, N=4)
  call = counts.Call(shape=shape, visible="all", union=None, cores=2)
  # Two chunks of 2 x 16 queries, each of which sees 4 tiles of keys.
  assert dense_indexer_loss._chunks(call, 16, 64) == (2 * 2 * 4, 2 * 2)
