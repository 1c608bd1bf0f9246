"""A small but complete DeepSeek-V3.2 that learns Python on two CPU cores.

Dense pretraining, then sparse training at T = 4 K, in a few minutes.
"""

from dsa_jax import config as model_lib
from train import config as config_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.run import checkpoint as checkpoint_lib
from train.run import metrics as metrics_lib


def config() -> config_lib.TrainConfig:
  return config_lib.TrainConfig(
    run_dir="runs/tiny",
    model=model_lib.tiny(),
    stages=(
      stages_lib.StageConfig(
        kind="pretrain", steps=280, seq_len=256, batch_size=8
      ),
      stages_lib.StageConfig(
        kind="sparse", steps=100, seq_len=256, batch_size=8, lr_scale=0.3
      ),
    ),
    optimizer=optimizer_lib.OptimizerConfig(peak_lr=5e-3, indexer_lr=5e-3),
    checkpoint=checkpoint_lib.CheckpointConfig(every=100),
    log=metrics_lib.LogConfig(
      eval_every=100, eval_batches=16, sample_every=200
    ),
  )
