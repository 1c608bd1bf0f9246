"""Sparse training of DeepSeek-V3.2 at 128K tokens on 512 chips of v5p (8x8x8).

A sequence is shared by 16 chips, 8,192 tokens each. Of each layer a chip keeps
the input (117 MB) and the selected keys (67 MB), 11 GB in all, beside the 21 GB
of parameters, moments and gradients of pretraining. A microbatch is 32
sequences: 15 of them are the paper's 480. Its rate is that of the model and of
the indexer alike.

    python -m train.main --config=configs/v32_671b_sparse.py \
      --compile-only=v5p:8x8x8
"""

import dataclasses

from configs import v32_671b_warmup
from train import config as config_lib
from train.host import mesh as mesh_lib
from train.learn import stages as stages_lib


def config() -> config_lib.TrainConfig:
  warmup = v32_671b_warmup.config()
  sparse = stages_lib.StageConfig(
    kind="sparse",
    steps=15_000,
    seq_len=131_072,
    batch_size=480,
    microbatches=15,
    mtp_weight=0.1,
  )
  return dataclasses.replace(
    warmup,
    run_dir="runs/v32_671b_sparse",
    model=dataclasses.replace(warmup.model, remat="selection"),
    stages=(sparse,),
    optimizer=dataclasses.replace(
      warmup.optimizer, indexer_lr=warmup.optimizer.peak_lr
    ),
    mesh=mesh_lib.MeshConfig(fsdp=2, expert=16, context=16),
    init_from="runs/v32_671b_warmup",
  )
