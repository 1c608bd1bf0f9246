"""A small but complete DeepSeek-V3.2 that learns Python on two CPU cores.

Dense pretraining, then sparse training at T = 4 K, in a few minutes.
"""

from dsa_jax import config as model_lib
from train import config as config_lib


def config() -> config_lib.TrainConfig:
  return config_lib.TrainConfig(
    run_dir="runs/tiny",
    model=model_lib.tiny(),
    stages=(
      config_lib.StageConfig(
        kind="pretrain", steps=280, seq_len=256, batch_size=8
      ),
      config_lib.StageConfig(
        kind="sparse", steps=100, seq_len=256, batch_size=8, lr_scale=0.3
      ),
    ),
    optimizer=config_lib.OptimizerConfig(peak_lr=5e-3, indexer_lr=5e-3),
    checkpoint=config_lib.CheckpointConfig(every=100),
    log=config_lib.LogConfig(eval_every=100, eval_batches=16, sample_every=200),
  )
