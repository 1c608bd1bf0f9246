"""python -m train.generate: what it writes, where, and what it refuses."""

import dataclasses
import io
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dsa_jax
from dsa_jax.chat import tokenizer as tokenizer_lib
from tests.hf import folders
from tests.model import models
from tests.train import runs
from train import convert
from train import generate
from train import loop
from train.run import trained

ROOT = pathlib.Path(__file__).parents[2]
MODEL = dataclasses.replace(runs.ONE_LAYER, dtype="float32")
SHORT = ["--max-tokens=24", "--seed=3"]
PROMPT = "the key of the index: a"  # longer than K


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
  """A Hugging Face folder without a tokenizer."""
  folder = tmp_path_factory.mktemp("hf") / "model"
  dsa_jax.save_hf(models.model(MODEL), folder, format="float32")
  return folder


@pytest.fixture(scope="module")
def run(hf):
  """A checkpoint with the config of a run around it."""
  folder = hf.with_name("run")
  made = convert.Conversion(str(hf), str(folder), dtype="float32")
  convert.convert(made)
  stages = [{"kind": "sparse", "steps": 2}]
  cfg = {"stages": stages, "data": {"tokenizer": "bytes"}}
  (folder / "config.json").write_text(json.dumps(cfg))
  return folder


@pytest.fixture
def call(monkeypatch, capsys):
  """Runs the program; gives what it writes, and its exit's text or code."""

  def call(*args, stdin=b""):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, args)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    capsys.readouterr()  # what was written before
    code = 0
    try:
      generate.main()
    except SystemExit as e:
      code = e.code
    return *capsys.readouterr(), code

  return call


def expected(tokens, **params):
  """The text that an engine of other sizes gives."""
  engine = dsa_jax.Engine(
    models.model(MODEL), slots=2, pool_tokens=256, page=8, chunk=12, steps=3
  )
  params = dsa_jax.SamplingParams(max_tokens=24, seed=3, **params)
  (results,) = engine.generate([tokens], params)
  decode = tokenizer_lib.ByteTokenizer().decode
  return [decode(result.tokens) for result in results]


def test_a_run_a_checkpoint_and_a_folder_write_the_same_text(call, run, hf):
  tokens = np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int32)
  (text,) = expected(tokens)
  out, err, code = call(run, f"--prompt={PROMPT}", *SHORT)
  assert (out, code) == (text, 0)
  assert "sparse attention" in err and "24 tokens in" in err
  assert (
    call(run / "checkpoints" / "0", *SHORT, stdin=PROMPT.encode())[0] == text
  )
  assert call(hf, "--tokenizer=bytes", f"--prompt={PROMPT}", *SHORT)[0] == text


@pytest.mark.parametrize(
  "dtypes", [{}, models.EIGHT_BITS], ids=["plain", "8 bits"]
)
def test_the_cache_is_kept_as_asked(dtypes):
  model = models.model(dataclasses.replace(MODEL, kv_rank=128))
  cfg = generate.Generation("model", prompt=PROMPT, **dtypes)
  tokenizer = tokenizer_lib.ByteTokenizer()
  request = dsa_jax.Request(tokenizer.encode(PROMPT), cfg.params(0))
  engine = generate.make_engine(cfg, model, "sparse", tokenizer, request)
  kept = {str(x.dtype) for x in jax.tree.leaves(engine._pool)}
  in_8_bits = {"float8_e4m3fn", "float32", "bfloat16"}
  assert kept == (in_8_bits if dtypes else {"float32"})


def test_seeds_repeat_and_samples_differ(call, run, tmp_path):
  file = tmp_path / "prompt.txt"
  file.write_text(PROMPT)
  args = [run, f"--prompt-file={file}", "--max-tokens=24", "--n=2"]
  out, err, _ = call(*args, "--seed=3")
  tokens = np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int32)
  texts = expected(tokens, n=2)
  assert out == "".join(f"{text}\n" for text in texts)
  assert len(set(texts)) == 2 and "sample 2 of 2" in err
  out, err, _ = call(*args)
  seed = err.split("seed ")[1].split()[0]
  assert call(*args, f"--seed={seed}")[0] == out


def test_a_stop_text_ends_a_sample_and_is_not_written(call, run):
  args = [run, f"--prompt={PROMPT}", "--temperature=0", *SHORT]
  text, _, _ = call(*args)
  stop = text[9:11]
  out, err, _ = call(*args, "--stop", "never", stop)
  assert out == text[: text.index(stop)] and "finished: stop" in err


def test_pieces_come_as_they_are_there(run, monkeypatch):
  written = []

  class Out(io.StringIO):
    def flush(self):
      written.append(self.getvalue())

  monkeypatch.setattr(sys, "stdout", Out())
  generate.generate(
    generate.Generation(str(run), prompt=PROMPT, max_tokens=24, seed=3)
  )
  lengths = list(map(len, written))
  assert len(lengths) >= 3 and lengths == sorted(set(lengths))


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["/nowhere"], "MODEL=/nowhere is no folder"),
    (["EMPTY"], "neither a Hugging Face folder"),
    (["RUN", "--prompt=", "--seed=1"], "The prompt (--prompt) is empty"),
    (["RUN"], "The prompt (standard input) is empty"),
    (["RUN", "--prompt-file=/no/file"], "--prompt-file=/no/file cannot be"),
    (["RUN", "--prompt=a", "--prompt-file=b"], "give one of them"),
    (["RUN", "--prompt=a", "--temperature=nan"], "--temperature=nan must be"),
    (["RUN", "--prompt=a", "--top-p=0"], "--top-p=0.0 must be above 0"),
    (["RUN", "--prompt=a", "--top-k=300"], "--top-k=300 is above"),
    (["RUN", "--prompt=a", "--n=0"], "--n=0 must be at least 1"),
    (["RUN", "--prompt=a", "--n=1", "--n=2"], "--n is given twice"),
    (["RUN", "--prompt=a", "--step=7"], "there are: 0."),
    (["RUN", "--prompt=a", "--speculate"], "has no MTP block"),
    (
      ["RUN", "--prompt=a", "--latent-dtype=float8_e4m3fn"],
      "--latent-dtype='float8_e4m3fn': each 128 numbers",
    ),
    (["RUN", "--prompt=abcd", "--max-length=9"], "4 tokens of the prompt"),
    (["RUN", "--prompt=a", "--mesh.data=64"], "64 devices"),
    (["RUN", "--prompt=a", "--tokenizer=no.json"], "--tokenizer='no.json' is"),
    (["HF", "--prompt=a"], "has no tokenizer.json"),
    (["HF", "--prompt=a", "--step=0"], "--step=0 is for the folder of a run"),
  ],
)
def test_what_cannot_be_is_told_in_a_line(
  call, run, hf, tmp_path, monkeypatch, args, says
):
  monkeypatch.setattr(trained.Trained, "load", lambda *_: pytest.fail("loaded"))
  places = {"RUN": run, "HF": hf, "EMPTY": tmp_path}
  out, _, said = call(*(places.get(arg, arg) for arg in args))
  assert says in said and "\n" not in said and not out
  assert said.startswith("error: ")


def test_a_damaged_checkpoint_and_a_prompt_that_is_no_text(call, run, tmp_path):
  _, _, said = call(run, stdin=b"\xff\xfe")
  assert "(standard input) is no UTF-8" in said
  cfg = run / "config.json"
  text = cfg.read_text()
  try:
    cfg.write_text("{}")
    assert "not the config of a run" in call(run, "--prompt=a")[2]
  finally:
    cfg.write_text(text)


@pytest.mark.parametrize(
  ("step", "attention"), [(0, "dense"), (4, "dense"), (5, "sparse")]
)
def test_a_checkpoint_attends_as_its_stage_did(run, step, attention):
  kinds = {"pretrain": 2, "warmup": 2, "sparse": 3}
  stages = [{"kind": kind, "steps": n} for kind, n in kinds.items()]
  folder = run.with_name(f"stages-{step}")
  (folder / "checkpoints").mkdir(parents=True)
  (folder / "checkpoints" / str(step)).symlink_to(run / "checkpoints" / "0")
  cfg = {"stages": stages, "data": {"tokenizer": "bytes"}}
  (folder / "config.json").write_text(json.dumps(cfg))
  found = trained.Trained(str(folder), step, None)
  assert (found.attention, found.tokenizer) == (attention, "bytes")


@pytest.mark.slow
def test_a_pipe_gets_the_text_and_ctrl_c_ends_quietly(run):
  command = [sys.executable, "-m", "train.generate", str(run)]
  command += ["--prompt=a", "--temperature=0", "--max-tokens=1000000"]
  with subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as program:
    assert program.stdout and program.stderr
    begun = program.stdout.read(100)
    time.sleep(0.1)
    program.send_signal(signal.SIGINT)
    rest, err = program.communicate(timeout=60)
  assert program.returncode == 130
  assert b"Traceback" not in err and b"stopped by SIGINT" in err
  assert len(begun) == 100 and b"attention" not in begun + rest


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_a_run_that_was_trained_drafts(tmp_path, call):
  runs.write_text(tmp_path)
  cfg = runs.config(tmp_path)
  loop.Run(dataclasses.replace(cfg, stages=cfg.stages[:1])).train()
  args = [cfg.run_dir, "--prompt=the ", "--temperature=0", "--max-tokens=40"]
  plain, err, code = call(*args)
  assert code == 0 and "dense attention" in err
  drafted, err, _ = call(*args, "--speculate")
  assert plain and drafted == plain and "drafts were right" in err


@pytest.mark.slow
def test_a_mesh_writes_the_same_text(call, run):
  args = [run, f"--prompt={PROMPT}", "--n=2", *SHORT]
  out, _, _ = call(*args)
  on_mesh, err, code = call(*args, "--mesh.data=2", "--mesh.tensor=2")
  assert (on_mesh, code) == (out, 0), err


@pytest.mark.slow
def test_a_model_without_an_indexer_reads_all_keys(call, tmp_path):
  vocab = dict(vocab_size=257)
  found = folders.tensors("float32", indexer=False, **vocab)
  folders.write(tmp_path / "v3", found, model_type="deepseek_v3", **vocab)
  args = [tmp_path / "v3", "--tokenizer=bytes", "--prompt=a", *SHORT]
  out, err, code = call(*args)
  assert out and code == 0 and "dense attention" in err
  assert "has no indexer" not in err
  assert "has no indexer" in call(*args, "--attention=sparse")[2]


def test_a_tokenizer_beside_the_model_is_its_own(hf, run):
  (hf / "tokenizer.json").write_text("{}")
  (run / "hf").mkdir(exist_ok=True)
  (run / "hf" / "tokenizer.json").write_text("{}")
  converted = run.with_name("converted")
  converted.mkdir()
  for name in ("checkpoints", "hf"):
    (converted / name).symlink_to(run / name)
  try:
    found = trained.Trained(str(hf), None, None).tokenizer
    assert found == str(hf / "tokenizer.json")
    found = trained.Trained(str(converted), None, None).tokenizer
    assert pathlib.Path(found).name == "tokenizer.json"
    assert trained.Trained(str(run), None, None).tokenizer == "bytes"
  finally:
    (hf / "tokenizer.json").unlink()
    (run / "hf" / "tokenizer.json").unlink()
