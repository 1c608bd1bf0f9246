"""The life cycle of DSA on two CPU cores: `make demo`.

A dense model, the warm-up of its indexer, and sparse training at T = 8 K.
"""

import dataclasses

from configs import tiny
from train import config as config_lib
from train.learn import stages as stages_lib


def config() -> config_lib.TrainConfig:
  cfg = tiny.config()
  dense = stages_lib.StageConfig(
    kind="pretrain", steps=240, seq_len=256, batch_size=8
  )
  return dataclasses.replace(
    cfg,
    run_dir="runs/tiny_lifecycle",
    model=dataclasses.replace(cfg.model, top_k=32),
    stages=(
      dense,
      dataclasses.replace(dense, kind="warmup", steps=60),
      dataclasses.replace(dense, kind="sparse", steps=80, lr_scale=0.3),
    ),
  )
