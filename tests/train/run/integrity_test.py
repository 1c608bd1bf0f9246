"""A flipped bit is found by who reads it, or changes nothing that is read."""

import contextlib
import functools
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

import dsa_jax
from dsa_jax import sharding
from tests.hf import folders
from tests.model import models
from tests.train import runs
from train import convert
from train.learn import step as step_lib
from train.run import checkpoint
from train.run import origin as origin_lib

CFG = runs.config(pathlib.Path("text"), model=runs.ONE_LAYER)
STAGE = CFG.stages[0]
# Tasks of Orbax that failed with the one that was waited for.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:coroutine .* was never awaited:RuntimeWarning",
)


def parameters(cfg):
  _, init = step_lib.init(cfg, 0)
  return jax.eval_shape(init, jax.random.key(0))


def state_shapes():
  begin = functools.partial(step_lib.begin_stage, CFG.optimizer, STAGE)
  return jax.eval_shape(begin, *parameters(CFG.model))


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def begin(path, cfg):
  """What a run with --init-from begins with."""
  origin = origin_lib.Origin(str(path), cfg)
  return bits(origin.restore(parameters(cfg), sharding.make_mesh()))


def export(path, form):
  """The files of what train.convert makes."""
  out = path.parent / "out"
  for folder in (out, out.with_name("out.partial")):
    shutil.rmtree(folder, ignore_errors=True)
  convert.convert(convert.Conversion(str(path), str(out), format=form))
  return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A checkpoint of a run, and its readers."""
  run_dir = tmp_path_factory.mktemp("trained") / "run"
  checkpoints = checkpoint.Checkpoints(
    str(run_dir), CFG.checkpoint, {}, stage_ends=[2], resume=False
  )
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh), contextlib.closing(checkpoints):
    shapes = step_lib.on_mesh(parameters(CFG.model), mesh)
    filled = models.filled(shapes, 0.1)
    state = step_lib.begin_stage(CFG.optimizer, STAGE, *filled, step=1)
    progress = checkpoint.Progress(data={"at": [1, 2]}, tokens={"web": 7})
    checkpoints.save(state, 1, progress, CFG.model, 1.5)
    checkpoints.finish()
    shapes = state_shapes()

    def resume():
      state, progress = checkpoints.load(1, shapes, mesh)
      return bits(state), progress

    path = run_dir / "checkpoints" / "1"
    yield (
      path,
      {
        "resume": resume,
        "init_from": lambda: begin(path, CFG.model),
        "convert": lambda: export(path, "float32"),
      },
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """A checkpoint made of a released folder, and its readers."""
  work = tmp_path_factory.mktemp("converted")
  folders.write(work / "in", folders.tensors("fp8", scales="any"))
  (work / "in" / "tokenizer.json").write_text('{"version": "1.0"}')
  path = work / "orbax"
  convert.convert(convert.Conversion(str(work / "in"), str(path)))
  cfg = dsa_jax.read_model_config(work / "in")
  return (
    path,
    {
      "init_from": lambda: begin(path, cfg),
      "convert": lambda: export(path, "fp8"),
    },
  )


def flip(path, readers, number, rng):
  """Flips as many bits, one after the other; what each reader found."""
  expected = {name: read() for name, read in readers.items()}
  files = sorted(file for file in path.rglob("*") if file.is_file())
  sizes = [file.stat().st_size for file in files]
  found = {name: 0 for name in readers}
  for _ in range(number):
    (file,) = rng.choices(files, sizes)  # each byte alike
    content = file.read_bytes()
    at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
    file.write_bytes(
      content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
    )
    for name, read in readers.items():
      try:
        same = read() == expected[name]
      except (OSError, ValueError) as e:  # a line, as the programs print it
        assert str(e)
        found[name] += 1
      else:
        assert same, f"{name}: bit {bit} of byte {at} of {file}"
    file.write_bytes(content)
  return found


@pytest.mark.parametrize("kind", ["trained", "converted"])
def test_a_flipped_bit_is_found_or_changes_nothing(kind, request):
  found = flip(*request.getfixturevalue(kind), 6, random.Random(3))
  assert min(found.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "number"), [("trained", 170), ("converted", 30)]
)
def test_two_hundred_flipped_bits(kind, number, request):
  found = flip(*request.getfixturevalue(kind), number, random.Random(17))
  assert min(found.values()) > number / 4


@pytest.mark.parametrize(
  "name",
  [
    "checkpoints/0/_CHECKPOINT_METADATA",
    "checkpoints/0/state/_METADATA",
    "checkpoints/0/state/params.head.w_DV.value/zarr.json",
    "checkpoints/0/state/params.head.w_DV.value/c/0/0",
    "hf/tokenizer.json",
    "hf/config.json",
    "hf/model.safetensors",
  ],
)
@pytest.mark.parametrize("content", [None, b""])
def test_a_lost_or_emptied_file_is_named(converted, name, content):
  path, readers = converted
  kept = (path / name).read_bytes()
  if content is None:
    (path / name).unlink()
  else:
    (path / name).write_bytes(content)
  try:
    with pytest.raises((OSError, ValueError), match=str(path)):
      readers["convert"]()
  finally:
    (path / name).write_bytes(kept)


def test_swapped_experts_are_found(converted):
  """Each chunk is whole; but it is another expert's."""
  path, readers = converted
  name = "params.moe_layers.ffn.gate_EDF.value/c/0"
  one, other = (path / f"checkpoints/0/state/{name}/{i}/0/0" for i in (0, 1))
  contents = one.read_bytes(), other.read_bytes()
  assert contents[0] != contents[1]
  one.write_bytes(contents[1])
  other.write_bytes(contents[0])
  try:
    for read in readers.values():
      with pytest.raises(OSError, match="moe_layers.ffn.gate_EDF"):
        read()
  finally:
    one.write_bytes(contents[0])
    other.write_bytes(contents[1])
