"""The warm-up of DeepSeek-V3.2's indexers at 128K tokens on 512 chips of v5p.

The paper's 1,000 steps of 16 sequences, each shared by 32 chips, 4,096 tokens
each. Parameters are 2.7 TB, 5 GB a chip; only the indexers (0.8%) have moments
and gradients. The model runs forward alone, so that of a layer nothing is kept
but its input, 59 MB, and the attention's logsumexp.

    python -m train.main --config=configs/v32_671b_warmup.py \
      --compile-only=v5p:8x8x8
"""

import dataclasses

from configs import v32_671b_pretrain
from train import config as config_lib
from train.host import mesh as mesh_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib


def config() -> config_lib.TrainConfig:
  pretrain = v32_671b_pretrain.config()
  warmup = stages_lib.StageConfig(
    kind="warmup", steps=1000, seq_len=131_072, batch_size=16
  )
  return dataclasses.replace(
    pretrain,
    run_dir="runs/v32_671b_warmup",
    stages=(warmup,),
    optimizer=optimizer_lib.OptimizerConfig(
      peak_lr=7.3e-6, indexer_lr=1e-3, warmup=0.01, decay=0.0
    ),
    mesh=mesh_lib.MeshConfig(expert=16, context=32),
    init_from="runs/v32_671b_pretrain",
  )
