"""The sparse stage at the size that other trainers are compared at, on a CPU.

4 layers, 8 sequences of 512 tokens, K = 64, float32, with the indexer's KL.
"""

import dataclasses

from dsa_jax import config as model_lib
from train import config as config_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib


def config() -> config_lib.TrainConfig:
  return config_lib.TrainConfig(
    run_dir="runs/peer_cpu",
    init_from="random",  # only its speed is of interest
    model=dataclasses.replace(
      model_lib.tiny(),
      vocab_size=512,
      expert_groups=1,
      groups_per_token=1,
      num_mtp_layers=0,
    ),
    stages=(
      stages_lib.StageConfig(
        kind="sparse", steps=60, seq_len=512, batch_size=8
      ),
    ),
    optimizer=optimizer_lib.OptimizerConfig(peak_lr=3e-3),
  )
