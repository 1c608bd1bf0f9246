"""A run small enough for tests, on text of its own."""

import dataclasses
import json
import pathlib
import random

from dsa_jax import config as model_lib
from train import config as config_lib
from train.data import corpus as corpus_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.run import checkpoint as checkpoint_lib
from train.run import metrics as metrics_lib

MODEL = dataclasses.replace(
  model_lib.tiny(),
  embed_dim=32,
  num_layers=2,
  num_heads=2,
  nope_head_dim=8,
  rope_head_dim=8,
  value_head_dim=8,
  q_rank=16,
  kv_rank=16,
  index_heads=2,
  index_head_dim=16,
  top_k=8,
  dense_ffn_dim=48,
  expert_ffn_dim=16,
  num_experts=4,
  num_mtp_layers=1,
  init_std=0.1,
  yarn=model_lib.YarnConfig(factor=2.0, original_context=32),
)
# Enough where a test is of what happens around the model; compiles sooner.
ONE_LAYER = dataclasses.replace(
  MODEL, num_layers=1, num_dense_layers=0, num_mtp_layers=0
)


def write_text(folder: pathlib.Path) -> None:
  """Documents of words, the same on every machine."""
  rng = random.Random(0)
  words = "the a of to sparse dense key query index token layer expert".split()
  for i in range(12):
    text = " ".join(rng.choice(words) for _ in range(150))
    (folder / f"{i}.txt").write_text(text, encoding="utf-8")


def config(
  folder: pathlib.Path,
  run: str = "run",
  model: model_lib.ModelConfig = MODEL,
) -> config_lib.TrainConfig:
  """Two steps of each stage, up to T = 5 K."""
  pretrain = stages_lib.StageConfig(
    kind="pretrain", steps=2, seq_len=32, batch_size=4, microbatches=2
  )
  extend = dataclasses.replace(pretrain, kind="extend", seq_len=40)
  return config_lib.TrainConfig(
    run_dir=str(folder / run),
    model=model,
    data=corpus_lib.DataConfig(
      sources=(corpus_lib.SourceConfig(path=f"{folder}/*.txt"),),
      heldout_fraction=0.2,
    ),
    stages=(
      pretrain,
      extend,
      dataclasses.replace(extend, kind="warmup"),
      dataclasses.replace(extend, kind="sparse"),
    ),
    optimizer=optimizer_lib.OptimizerConfig(peak_lr=1e-2, indexer_lr=1e-2),
    # With others, two keys' scores or two experts' are so close that a CPU
    # which rounds otherwise takes the other one, and the losses differ.
    seed=1,
    checkpoint=checkpoint_lib.CheckpointConfig(every=100, keep=2),
    log=metrics_lib.LogConfig(
      every=2,
      eval_every=100,
      eval_batches=1,
      sample_every=100,
      sample_tokens=4,
      sample_prompt="the ",
    ),
  )


def lines(run_dir: str, kind: str) -> list[dict]:
  """What metrics.jsonl has of one kind."""
  text = (pathlib.Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8")
  parsed = [json.loads(line) for line in text.splitlines()]
  return [line for line in parsed if line["kind"] == kind]
