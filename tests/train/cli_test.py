"""The command line: every bad input is a clear error before compiling."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from tests.train import runs
from train import config as config_lib
from train import loop
from train import main
from train.host import ownership

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
  monkeypatch.chdir(ROOT)


def call(monkeypatch, *args):
  """Runs the program up to training; gives what it would train."""
  trained = []
  monkeypatch.setattr(loop.Run, "train", lambda run: trained.append(run))
  monkeypatch.setattr(sys, "argv", ["main.py", *args])
  main.main()
  return trained[0]


def refused(monkeypatch, capsys, *args):
  """What it says on leaving with an error."""
  with pytest.raises(SystemExit) as error:
    call(monkeypatch, *args)
  assert error.value.code not in (0, None)
  out, err = capsys.readouterr()
  text = error.value.code if isinstance(error.value.code, str) else ""
  return " ".join((out + err + text).replace("│", " ").split())


TINY = "--config=configs/tiny.py"


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["--config=configs/tyni.py"], ["configs/tyni.py", "configs/tiny.py"]),
    ([], ["--config", "configs/tiny.py"]),
    ([TINY, "--optimiser.peak_lr=3"], ["--optimizer.peak-lr"]),
    ([TINY, "--optimizer.peak_lr=fast"], ["peak-lr", "fast"]),
    ([TINY, "--optimizer.peak_lr=0"], ["--optimizer.peak-lr=0.0", "above 0"]),
    (
      [TINY, "--optimizer.decay=0.99"],
      ["--optimizer.decay=0.99", "--optimizer.warmup"],
    ),
    ([TINY, "--model.rope_head_dim=15"], ["--model.rope-head-dim=15", "even"]),
    ([TINY, "--model.top_k=0"], ["--model.top-k=0", "at least 1"]),
    ([TINY, "--model.num_heads=0"], ["--model.num-heads=0"]),
    (
      [TINY, "--model.index_head_dim=8"],
      ["--model.index-head-dim=8", "rope-head-dim=16"],
    ),
    ([TINY, "--model.num_dense_layers=5"], ["--model.num-dense-layers=5"]),
    (
      [TINY, "--model.expert_groups=3"],
      ["--model.num-experts=8", "--model.expert-groups=3"],
    ),
    ([TINY, "--model.experts_per_token=7"], ["--model.experts-per-token=7"]),
    ([TINY, "--model.vocab_size=200"], ["--model.vocab-size=200", "257"]),
    ([TINY, "--mesh.tensor=3"], ["--model.num-heads=4", "--mesh.tensor=3"]),
    (
      [TINY, "--mesh.data=3"],
      ["--stages.0.batch-size=8", "8 sequences", "3 devices"],
    ),
    (
      [
        TINY,
        "--mesh.expert=3",
        "--stages.0.batch_size=9",
        "--stages.1.batch_size=9",
      ],
      ["--model.num-experts=8", "--mesh.expert=3"],
    ),
    (
      [TINY, "--mesh.context=2", "--stages.0.seq_len=254"],
      ["--stages.0.seq-len=254", "multiple of 4", "--mesh.context=2"],
    ),
    (
      [TINY, "--mesh.data=8", "--mesh.tensor=4", "--mesh.context=2"],
      ["64 devices", "there are 32"],
    ),
    (
      [TINY, "--stages.0.microbatches=3"],
      ["--stages.0.batch-size=8", "--stages.0.microbatches=3"],
    ),
    ([TINY, "--stages.0.steps=0"], ["--stages.0.steps=0", "at least 1"]),
    (
      [TINY, "--data.sources.0.path=/nowhere/*.txt"],
      ["--data.sources.0.path='/nowhere/*.txt' matches no file"],
    ),
    ([TINY, "--data.tokenizer=none.json"], ["--data.tokenizer='none.json'"]),
    (
      [TINY, "--model.indexer-types", "full"],
      ["--model.indexer-types=('full',) has 1 entries"],
    ),
    (
      [TINY, "--model.indexer-types", "shared", "full", "full", "full"],
      ["--model.indexer-types=('shared', "],
    ),
    ([TINY, "--stages.0.kind=warmup"], ["stages.0 is warmup", "--init-from"]),
    ([TINY, "--stages.0.kind=sparse"], ["stages.0 is sparse", "--init-from"]),
    ([TINY, "--init-from=/nowhere"], ["/nowhere", "no run with a checkpoint"]),
    ([TINY, "--model.index_heads=0"], ["--model.index-heads=0"]),
    (
      [TINY, "--model.top_k=300"],
      ["--model.top-k=300", "--stages.1.seq-len=256"],
    ),
    (
      [TINY, "--stages.1.kind=warmup", "--model.top_k=257"],
      ["stages.1 (warmup)", "--model.top-k=257"],
    ),
    (
      [TINY, "--stages.1.kind=extend"],
      ["extend", "YaRN", "--model.yarn.factor"],
    ),
    (
      [
        *(TINY, "--stages.1.kind=extend", "--model.yarn.factor=2"),
        "--model.yarn.original_context=64",
      ],
      ["--stages.1.seq-len=256", "128 tokens", "--model.yarn.factor"],
    ),
    (
      [TINY, "--stages.0.batch-size=1048576", "--stages.0.seq-len=1024"],
      ["--stages.0.batch-size=1048576", "of memory to read"],
    ),
    (
      [TINY, "--model.vocab-size=16777216", "--model.embed-dim=1048576"],
      ["parameters and optimizer take", "--model.num-layers"],
    ),
    (
      [TINY, "--model.rules.heads=nonsense"],
      ["--model.rules.heads='nonsense'", "no axis of the mesh"],
    ),
    # Sizes must divide as the rules have it, not as these usually are.
    (
      [
        *(TINY, "--mesh.tensor=3", "--model.rules.heads=None"),
        *("--model.rules.ffn=None", "--model.rules.vocab=None"),
        "--model.rules.index-heads=tensor",
      ],
      ["--model.index-heads=4", "3 devices of --mesh.tensor=3"],
    ),
    (
      [
        *(TINY, "--mesh.data=5", "--model.rules.batch=None"),
        "--model.rules.vocab=data",
      ],
      ["--model.vocab-size=264", "5 devices of --mesh.data=5"],
    ),
    (
      [
        *(TINY, "--mesh.fsdp=3", "--model.rules.seq=fsdp"),
        "--model.rules.batch=None",
      ],
      ["--stages.0.seq-len=256", "multiple of 6", "--mesh.fsdp=3"],
    ),
    ([TINY, "--model.rules.heads=data"], ["batch, seq, heads", "'data' twice"]),
    ([TINY, "--data.retrieval.fraction=2"], ["--data.retrieval.fraction=2.0"]),
    (
      [
        *(TINY, "--data.retrieval.fraction=0.5", "--model.top_k=2"),
        "--stages.1.seq_len=16",
      ],
      ["seq_len=16", "at least 21"],
    ),
  ],
)
def test_refuses(monkeypatch, capsys, tmp_path, args, says):
  if not any("run-dir" in arg for arg in args) and TINY in args:
    args = [*args, f"--run-dir={tmp_path}/run"]
  text = refused(monkeypatch, capsys, *args)
  for part in says:
    assert part in text, text
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("name", "content"), [("a.txt", b""), ("a.txt", b"caf\xe9 " * 9)]
)
def test_refuses_bad_text(monkeypatch, capsys, tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  text = refused(
    monkeypatch,
    capsys,
    TINY,
    f"--data.sources.0.path={tmp_path}/*.txt",
    f"--run-dir={tmp_path}/run",
  )
  assert name in text or str(tmp_path) in text
  assert not (tmp_path / "run").exists()


class TestRunFolder:
  @pytest.fixture
  def cfg(self, tmp_path):
    runs.write_text(tmp_path)
    cfg = runs.config(tmp_path)
    loop.open_checkpoints(cfg)
    return cfg

  def test_one_folder_holds_one_run(self, cfg):
    before = (pathlib.Path(cfg.run_dir) / "config.json").read_text()
    with pytest.raises(ValueError, match="--resume"):
      loop.Run(cfg)
    assert (pathlib.Path(cfg.run_dir) / "config.json").read_text() == before

  def test_files_of_others_are_left_alone(self, cfg, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    other = dataclasses.replace(cfg, run_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="not empty"):
      loop.Run(other)

  def test_another_config_does_not_go_on(self, cfg):
    other = dataclasses.replace(
      cfg,
      resume=True,
      seed=3,
      optimizer=dataclasses.replace(cfg.optimizer, beta2=0.5),
    )
    with pytest.raises(ValueError, match="beta2 is 0.5, was .*; seed is 3"):
      loop.Run(other)

  def test_another_rate_goes_on_and_is_told(self, cfg, capsys):
    for name in ("peak_lr", "indexer_lr"):
      optimizer = dataclasses.replace(cfg.optimizer, **{name: 0.5})
      other = dataclasses.replace(cfg, resume=True, optimizer=optimizer)
      loop.Run(other)
      loop.open_checkpoints(other)
      assert f"optimizer.{name} is 0.5, was 0.01" in capsys.readouterr().out
      loop.open_checkpoints(dataclasses.replace(cfg, resume=True))

  def test_more_steps_are_those_of_a_new_run(self, cfg):
    stage = dataclasses.replace(cfg.stages[-1], steps=50)
    other = dataclasses.replace(
      cfg, resume=True, stages=(*cfg.stages[:-1], stage)
    )
    for step in ("2", "10"):
      (pathlib.Path(cfg.run_dir) / "checkpoints" / step).mkdir(parents=True)
    newest = f"{cfg.run_dir}/checkpoints/10"
    with pytest.raises(ValueError, match=f"steps is 50.*--init-from={newest}"):
      loop.Run(other)

  def test_what_belongs_to_another_program_is_refused_in_a_line(
    self, cfg, monkeypatch, capsys
  ):
    """And nothing there is changed; a check of it says whose it is."""
    folder = pathlib.Path(cfg.run_dir)
    (folder / "owners").mkdir()
    file = folder / "owners" / "1.json"
    ownership._write(file)
    owner = json.loads(file.read_text()) | {"token": "another's"}
    file.write_text(json.dumps(owner))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    said = ""
    for asked in (cfg, dataclasses.replace(cfg, resume=True)):
      monkeypatch.setattr(main, "parse", lambda *_, asked=asked: asked)
      with pytest.raises(SystemExit) as error:
        main.main()
      said = str(error.value)
      assert said.startswith("error: ") and "\n" not in said
    assert f"process {owner['pid']} on {owner['host']}, since" in said
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    asked = dataclasses.replace(cfg, resume=True, check=True)
    monkeypatch.setattr(main, "parse", lambda *_: asked)
    main.main()
    assert f"owned    by process {owner['pid']}" in capsys.readouterr().out

  def test_other_logging_does(self, cfg):
    other = dataclasses.replace(
      cfg, resume=True, log=dataclasses.replace(cfg.log, every=1)
    )
    loop.Run(other)

  def test_the_config_is_written_down(self, cfg):
    text = (pathlib.Path(cfg.run_dir) / "config.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(dataclasses.asdict(cfg)))


def test_what_no_rule_cuts_need_not_divide(folder):
  cfg = runs.config(folder, "rules")
  rules = dataclasses.replace(cfg.model.rules, heads=None, batch=None)
  model = dataclasses.replace(cfg.model, num_heads=3, rules=rules)
  mesh = dataclasses.replace(cfg.mesh, data=8, tensor=2)
  with pytest.raises(ValueError, match="among the 8 devices of mesh.data=8"):
    dataclasses.replace(cfg, mesh=mesh)
  loop.Run(dataclasses.replace(cfg, mesh=mesh, model=model))


def test_options_reach_the_config(monkeypatch, tmp_path):
  run = call(
    monkeypatch,
    TINY,
    "--optimizer.peak_lr=0.125",
    "--stages.1.steps",
    "7",
    "--model.yarn.factor=2",
    f"--run-dir={tmp_path}/run",
  )
  assert run.cfg.optimizer.peak_lr == 0.125
  assert run.cfg.stages[1].steps == 7
  assert run.cfg.stages[0].kind == "pretrain"
  assert run.cfg.model.yarn.factor == 2.0


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.py")))
def test_every_config_is_valid_and_sees_further_than_k(config):
  cfg = config_lib.load(str(config))
  for stage in cfg.stages:
    if stage.trains_indexer:
      assert stage.seq_len >= 4 * cfg.model.top_k


@pytest.mark.parametrize(
  "program",
  [
    ["-m", "train.main"],
    pytest.param(["train/main.py"], marks=pytest.mark.slow),
  ],
)
def test_both_ways_to_start_teach_the_options(program):
  result = subprocess.run(
    [sys.executable, *program, TINY, "--help"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  for word in (
    "--optimizer.peak-lr",
    "--stages.1.steps",
    "--resume",
    "warm-up",
  ):
    assert word in result.stdout
