"""Conversions both ways, interrupted, and gone on with."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dsa_jax
from dsa_jax import sharding
from tests.hf import folders
from tests.train import runs
from train import convert
from train import loop
from train.host import ownership
from train.learn import step as step_lib
from train.run import arrays
from train.run import origin as origin_lib


def run(source, target, **options):
  convert.convert(convert.Conversion(str(source), str(target), **options))


def restored(path, cfg):
  """The model of a checkpoint, as training begins with it."""
  train = runs.config(path)
  train = dataclasses.replace(
    train, model=cfg, stages=train.stages[:1], init_from=str(path)
  )
  origin = origin_lib.Origin(str(train.init_from), train.model)
  model, init = step_lib.init(cfg, 0)
  like = jax.eval_shape(init, jax.random.key(0))
  params, bias = origin.restore(like, sharding.make_mesh())
  return model.merge(params, bias)


@pytest.mark.parametrize(
  ("form", "scales"), [("float32", "F32"), ("bf16", "F32"), ("fp8", "any")]
)
def test_there_and_back(tmp_path, form, scales):
  found = folders.tensors(form, scales=scales)
  folders.write(tmp_path / "in", found)
  (tmp_path / "in" / "tokenizer.json").write_text("{}")
  dtype = "float32" if form == "float32" else None
  run(tmp_path / "in", tmp_path / "orbax", dtype=dtype)
  run(
    tmp_path / "orbax",
    tmp_path / "out",
    format=form,
    max_shard_size="300KB",
  )
  folders.assert_same(folders.read(tmp_path / "out"), found)
  assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
  assert {p.name for p in tmp_path.iterdir()} == {"in", "orbax", "out"}


@pytest.mark.slow
def test_golden_logits_of_what_training_begins_with(tmp_path):
  run(folders.GOLDEN, tmp_path / "orbax")
  cfg = dsa_jax.read_model_config(folders.GOLDEN)
  expected = load_file(folders.GOLDEN / "expected.safetensors")
  model = restored(tmp_path / "orbax", cfg)
  with jax.set_mesh(sharding.make_mesh()):
    logits = jax.jit(lambda m, t: m(t))(
      model, jnp.asarray(expected["input_ids"])
    )
  np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_training_reads_bfloat16_in_its_own_dtype(tmp_path):
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  run(tmp_path / "in", tmp_path / "orbax")
  cfg = dsa_jax.read_model_config(tmp_path / "in", "float32")
  model = restored(tmp_path / "orbax", cfg)
  expected = dsa_jax.load_hf(tmp_path / "in", dtype="float32")
  for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(expected)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_what_was_trained_here(tmp_path):
  runs.write_text(tmp_path)
  cfg = runs.config(tmp_path, "run")
  cfg = dataclasses.replace(cfg, stages=cfg.stages[:1])
  loop.Run(cfg).train()
  run(tmp_path / "run", tmp_path / "out", format="float32")
  model = dsa_jax.load_hf(tmp_path / "out")
  assert model.config.num_mtp_layers == cfg.model.num_mtp_layers
  trained = restored(tmp_path / "run", cfg.stages[0].adapt(cfg.model))
  for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(trained)):
    np.testing.assert_array_equal(x, y)


def test_an_indexer_for_v3(tmp_path):
  found = folders.tensors("bf16", indexer=False)
  folders.write(tmp_path / "v3", found, model_type="deepseek_v3")
  with pytest.raises(ValueError, match='stage="warmup"'):
    run(tmp_path / "v3", tmp_path / "orbax")
  with pytest.warns(UserWarning, match="has no indexer"):
    run(tmp_path / "v3", tmp_path / "orbax", stage="warmup")
  run(tmp_path / "orbax", tmp_path / "out")
  written = folders.read(tmp_path / "out")
  rest = {n: x for n, x in written.items() if ".indexer." not in n}
  folders.assert_same(rest, found)
  w = written["model.layers.2.self_attn.indexer.wq_b.weight"]
  assert 0.01 < np.std(w.astype(np.float32)) < 0.03


def test_goes_on_where_it_stopped(tmp_path, monkeypatch):
  found = folders.tensors("bf16")
  folders.write(tmp_path / "in", found)
  written = []
  write = arrays.NewArrays.write

  def stops(self, place, part):
    if len(written) == 60:
      raise KeyboardInterrupt
    written.append(place)
    write(self, place, part)

  monkeypatch.setattr(arrays.NewArrays, "write", stops)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "in", tmp_path / "orbax")
  assert not (tmp_path / "orbax").exists()
  partial = tmp_path / "orbax.partial"
  assert origin_lib.find(partial) is None
  journal = (partial / "conversion.jsonl").read_text().splitlines()
  done = {json.loads(line) for line in journal[1:]}
  assert done and len(done) < 3

  again = []
  monkeypatch.setattr(
    arrays.NewArrays,
    "write",
    lambda *args: (again.append(args[1]), write(*args)),
  )
  with pytest.raises(ValueError, match="other options"):
    run(tmp_path / "in", tmp_path / "orbax", dtype="float32")
  run(tmp_path / "in", tmp_path / "orbax")
  index = json.loads(
    (tmp_path / "in" / "model.safetensors.index.json").read_text()
  )
  of_done = [n for n, f in index["weight_map"].items() if f in done]
  assert len(again) < len(written) + len(again) - len(of_done) / 2
  run(tmp_path / "orbax", tmp_path / "out")
  folders.assert_same(folders.read(tmp_path / "out"), found)


def test_the_other_way_goes_on_too(tmp_path, monkeypatch):
  found = folders.tensors("bf16")
  folders.write(tmp_path / "in", found)
  run(tmp_path / "in", tmp_path / "orbax")
  read, reads = arrays.Arrays.read, []

  def stops(self, place):
    if len(reads) == 100:
      raise KeyboardInterrupt
    reads.append(place)
    return read(self, place)

  out = tmp_path / "out"
  with monkeypatch.context() as patch:
    patch.setattr(arrays.Arrays, "read", stops)
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path / "orbax", out, max_shard_size="300KB")
  assert not out.exists()
  partial = tmp_path / "out.partial"
  first = partial / next(iter(sorted(partial.glob("*.safetensors"))))
  changed = first.stat().st_mtime_ns
  assert not (partial / "config.json").exists()
  run(tmp_path / "orbax", out, max_shard_size="300KB")
  assert (out / first.name).stat().st_mtime_ns == changed
  folders.assert_same(folders.read(out), found)


def test_a_flipped_bit_is_found(tmp_path):
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  run(tmp_path / "in", tmp_path / "orbax")
  (chunk,) = (tmp_path / "orbax").glob("**/params.head.w_DV.value/c/0/0")
  raw = bytearray(chunk.read_bytes())
  raw[100] ^= 1
  chunk.write_bytes(raw)
  with pytest.raises(OSError, match="head.w_DV"):
    run(tmp_path / "orbax", tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["in", "orbax"])
@pytest.mark.parametrize("journal", ["", "[", "{}\n", "\0\0\n", "[" * 10**5])
def test_a_journal_that_is_lost_is_named(tmp_path, way, journal):
  """As a power cut leaves it: what is done is not known."""
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  if way == "orbax":
    run(tmp_path / "in", tmp_path / "orbax")
  partial = tmp_path / "out.partial"
  partial.mkdir()
  (partial / "conversion.jsonl").write_text(journal)
  with pytest.raises(ValueError, match=r"out\.partial"):
    run(tmp_path / way, tmp_path / "out")


def test_a_journal_of_what_is_no_part_is_refused(tmp_path, monkeypatch):
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  monkeypatch.setattr(arrays.NewArrays, "finish", lambda *_: interrupted(None))
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "in", tmp_path / "orbax")
  journal = tmp_path / "orbax.partial" / "conversion.jsonl"
  with journal.open("a") as out:
    out.write('{"a": []}\n')
  with pytest.raises(ValueError, match="conversion.jsonl is damaged; delete"):
    run(tmp_path / "in", tmp_path / "orbax")


def begins(monkeypatch, meanwhile):
  """Something happens after the next conversion has seen what is done."""
  claim = ownership.Claim

  def late(folder):
    monkeypatch.setattr(ownership, "Claim", claim)
    meanwhile()
    return claim(folder)

  monkeypatch.setattr(ownership, "Claim", late)


@pytest.mark.parametrize("way", ["in", "orbax"])
def test_what_another_has_done_meanwhile_is_seen(tmp_path, monkeypatch, way):
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  if way == "orbax":
    run(tmp_path / "in", tmp_path / "orbax")
  before = {p.name for p in tmp_path.iterdir()}
  begins(monkeypatch, lambda: run(tmp_path / way, tmp_path / "out"))
  with pytest.raises(ValueError, match="out exists; give another target"):
    run(tmp_path / way, tmp_path / "out")
  assert {p.name for p in tmp_path.iterdir()} == before | {"out"}


def test_a_conversion_is_owned_until_it_is_in_its_place(tmp_path, monkeypatch):
  """A second one, at whatever moment, changes nothing."""
  found = folders.tensors("bf16")
  folders.write(tmp_path / "in", found)
  run(tmp_path / "in", tmp_path / "orbax")
  said = []

  def beside(function):
    def call(*args, **kwargs):
      monkeypatch.setattr(ownership, "_TOKEN", "another's")
      with pytest.raises((ownership.Owned, ValueError)) as e:
        run(tmp_path / "orbax", tmp_path / "out")
      said.append(str(e.value))
      monkeypatch.setattr(ownership, "_TOKEN", token)
      return function(*args, **kwargs)

    return call

  token = ownership._TOKEN
  for name in ("sync", "sync_all"):
    function = getattr(convert.atomic_files, name)
    monkeypatch.setattr(convert.atomic_files, name, beside(function))
  run(tmp_path / "orbax", tmp_path / "out")
  assert sum("owned by process" in text for text in said) > 1
  assert "exists" in said[-1]
  folders.assert_same(folders.read(tmp_path / "out"), found)
  assert {p.name for p in tmp_path.iterdir()} == {"in", "orbax", "out"}


def test_a_journal_is_believed_no_further_than_it_goes(tmp_path, monkeypatch):
  found = folders.tensors("bf16")
  folders.write(tmp_path / "in", found)
  run(tmp_path / "in", tmp_path / "orbax")
  monkeypatch.setattr(convert.save.Export, "finish", interrupted)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "orbax", tmp_path / "out", max_shard_size="300KB")
  monkeypatch.undo()
  journal = tmp_path / "out.partial" / "conversion.jsonl"
  journal.write_text(journal.read_text()[:-5])
  # Nor is a file there because it once was.
  (journal.parent / "model-00001-of-00012.safetensors").unlink()
  run(tmp_path / "orbax", tmp_path / "out", max_shard_size="300KB")
  folders.assert_same(folders.read(tmp_path / "out"), found)


def interrupted(self):
  raise KeyboardInterrupt


def test_lost_fingerprints_are_not_made_up(tmp_path, monkeypatch):
  """Of parts that an interrupted conversion has written."""
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  monkeypatch.setattr(arrays.NewArrays, "finish", lambda *_: interrupted(None))
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "in", tmp_path / "orbax")
  monkeypatch.undo()
  (notes,) = (tmp_path / "orbax.partial").rglob("*.fingerprints.json")
  content = notes.read_text()
  notes.write_text("")
  with pytest.raises(ValueError, match="fingerprints.json is damaged"):
    run(tmp_path / "in", tmp_path / "orbax")
  marks = json.loads(content)
  leaf = min(marks)
  for other in (
    *([], None, {}, marks | {"more": [1]}, marks | {leaf: 3}),
    *(marks | {leaf: marks[leaf] * 2}, marks | {leaf: [2**32]}),
    *(marks | {leaf: ["1"]}, marks | {leaf: [1.0]}),
  ):
    notes.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="fingerprints.json is .*convert anew"):
      run(tmp_path / "in", tmp_path / "orbax")
  notes.unlink()
  with pytest.raises(ValueError, match="lacks a part of .*convert anew"):
    run(tmp_path / "in", tmp_path / "orbax")
  notes.write_text(content)
  run(tmp_path / "in", tmp_path / "orbax")
  assert not [*(tmp_path / "orbax").rglob("*.fingerprints.json")]


def test_another_tokenizer_is_given_by_like(tmp_path):
  """What was kept is compared; what is to differ is said."""
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  (tmp_path / "in" / "tokenizer.json").write_text('{"a": 1}')
  run(tmp_path / "in", tmp_path / "orbax")
  (tmp_path / "orbax" / "hf" / "tokenizer.json").write_text('{"a": 2}')
  with pytest.raises(OSError, match="hf/tokenizer.json is not .*--like="):
    run(tmp_path / "orbax", tmp_path / "out")
  run(tmp_path / "orbax", tmp_path / "out", like=str(tmp_path / "in"))
  assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'


def test_what_was_not_written_as_given_is_found(tmp_path, monkeypatch):
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  run(tmp_path / "in", tmp_path / "orbax")
  monkeypatch.setattr(convert.files, "checksum", lambda file: 0)
  with pytest.raises(OSError, match="is not what was written"):
    run(tmp_path / "orbax", tmp_path / "out")


@pytest.mark.slow
def test_a_few_tensors_at_a_time(tmp_path):
  """Gigabytes go both ways through half as much memory, imports included."""
  size = dict(
    hidden_size=512,
    moe_intermediate_size=1024,
    n_routed_experts=64,
    num_hidden_layers=12,
  )
  found = folders.tensors("bf16", **size)
  size_in_bytes = sum(x.nbytes for x in found.values())
  assert size_in_bytes > 2.4e9
  folders.write(tmp_path / "in", found, **size)
  root = pathlib.Path(convert.__file__).parents[1]
  for source, target in (("in", "orbax"), ("orbax", "out")):
    program = (
      "import sys; from train import convert;"
      f"sys.argv = ['convert', {source!r}, {target!r}]; convert.main();"
      "print(open('/proc/self/status').read())"
    )
    done = subprocess.run(
      [sys.executable, "-c", program],
      cwd=tmp_path,
      env={"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=True,
    )
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak and int(peak[1]) * 1024 < size_in_bytes / 2
  folders.assert_same(folders.read(tmp_path / "out"), found)


@pytest.mark.parametrize(
  ("options", "says"),
  [
    (["nothing", "out"], "neither a Hugging Face folder"),
    (["in", "in"], "exists"),
    (["in", "out", "--format=int4"], "int4"),
    (["in", "out", "--format=fp8"], "--format=fp8 is for what becomes a Hug"),
    (["in", "out", "--max-shard-size=1GB"], "--max-shard-size=1GB is for"),
    (["in", "out", "--like=in"], "--like=in is for what becomes a Hugging"),
    (["orbax", "out", "--dtype=float32"], "=float32 is for what becomes a ch"),
    (["orbax", "out", "--stage=sparse"], "--stage=sparse is for what becomes"),
    (["orbax", "out", "--max-shard-size=big"], "is no size"),
    (["orbax", "out", "--like=nothing"], "nothing/config.json is missing"),
  ],
)
def test_bad_commands(tmp_path, monkeypatch, capsys, options, says):
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  if options[0] == "orbax":
    run(tmp_path / "in", tmp_path / "orbax")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["convert", *options])
  with pytest.raises(SystemExit) as ended:
    convert.main()
  assert ended.value.code not in (0, None)
  printed = capsys.readouterr()
  assert says in f"{ended.value.code} {printed.out} {printed.err}"
  assert not list(tmp_path.glob("out*"))


def damage_config(folder, **keys):
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def damage_weights(folder):
  found = folders.read(folder)
  found["model.norm.weight"][7] = float("nan")
  folders.write(folder, found)


def damage_shard(folder):
  shard = folder / "model-00002-of-00003.safetensors"
  shard.unlink()
  os.mkfifo(shard)


def damage_index(folder):
  file = folder / "model.safetensors.index.json"
  file.write_text(file.read_text().replace("model-00002", "../in/model-00002"))


@pytest.mark.parametrize(
  ("damage", "says"),
  [
    (lambda x: (x / "config.json").write_bytes(b""), "config.json is empty."),
    (lambda x: damage_config(x, q_lora_rank=None), "q_lora_rank is null"),
    (lambda x: damage_config(x, n_routed_experts=10**12), "n_routed_experts="),
    (
      lambda x: damage_config(
        x, num_hidden_layers=16000, num_nextn_predict_layers=0
      ),
      "num_hidden_layers=16000 and n_routed_experts=4 make 303,988 tensors",
    ),
    (lambda x: damage_config(x, hidden_size=2**20), "it must be|needs"),
    (lambda x: damage_config(x, rms_norm_eps=float("nan")), "rms_norm_eps"),
    (
      lambda x: (x / "LICENSE").symlink_to("/etc/hostname"),
      "LICENSE is a link",
    ),
    (damage_weights, r"model.norm.weight in .* has nan at \[7\]"),
    (damage_shard, "model-00002-of-00003.safetensors is no regular file"),
    (damage_index, "weight_map puts .* into '../in/model-00002"),
  ],
)
def test_bad_folders(tmp_path, monkeypatch, damage, says):
  """One line, at once, and nothing where the result would be."""
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  damage(tmp_path / "in")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["convert", "in", "out"])
  with pytest.raises(SystemExit) as ended:
    convert.main()
  line = str(ended.value.code)
  assert line.startswith("error: ") and "\n" not in line
  assert re.search(says, line), line
  assert not (tmp_path / "out").exists()
