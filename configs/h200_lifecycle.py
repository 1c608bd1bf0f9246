"""The life cycle of DSA on one H200, with retrieval over long contexts.

Python's own source code, half of it with key-value pairs planted in the text:
pretraining at short sequences, extension to T = 8192 with YaRN, the warm-up of
the indexer, and sparse training at T = 16 K.

One device, one microbatch. 138M parameters, their moments and gradients take 16
bytes each, 2.2 GB; of 65,536 tokens a layer keeps its input (67 MB), its
attention's results and the selected keys (K int32 a token, 134 MB): below 3 GB.
The rest of the 141 GB is for what one layer needs as it runs, and for tiles.
"""

import dataclasses

from dsa_jax import config as model_lib
from train import config as config_lib
from train.data import corpus as corpus_lib
from train.data import retrieval as retrieval_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.run import metrics as metrics_lib


def config() -> config_lib.TrainConfig:
  extend = stages_lib.StageConfig(
    kind="extend", steps=150, seq_len=8192, batch_size=8, lr_scale=0.5
  )
  return config_lib.TrainConfig(
    run_dir="runs/h200_lifecycle",
    model=model_lib.ModelConfig(
      vocab_size=264,
      embed_dim=512,
      num_layers=6,
      num_dense_layers=1,
      num_heads=4,
      nope_head_dim=96,
      rope_head_dim=32,
      value_head_dim=96,
      q_rank=256,
      kv_rank=128,
      index_heads=4,
      index_head_dim=64,
      top_k=512,
      dense_ffn_dim=2048,
      expert_ffn_dim=512,
      num_experts=32,
      experts_per_token=2,
      # About 1 / sqrt(D): with the usual 0.02, matrices this small barely pass
      # anything on, and attention takes thousands of steps to find the pairs.
      init_std=0.044,
      yarn=model_lib.YarnConfig(factor=8.0, original_context=1024),
      dtype="bfloat16",
    ),
    stages=(
      stages_lib.StageConfig(
        kind="pretrain", steps=1500, seq_len=1024, batch_size=32
      ),
      extend,
      dataclasses.replace(extend, kind="warmup", steps=200),
      dataclasses.replace(extend, kind="sparse", steps=120, lr_scale=0.3),
    ),
    optimizer=optimizer_lib.OptimizerConfig(peak_lr=1e-3, indexer_lr=1e-3),
    data=corpus_lib.DataConfig(
      retrieval=retrieval_lib.RetrievalConfig(
        fraction=0.5, key_letters=2, value_digits=3, eval_rows=64
      )
    ),
    log=metrics_lib.LogConfig(
      every=20, eval_every=500, eval_batches=8, sample_every=10000
    ),
  )
