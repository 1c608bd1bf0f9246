"""Sparse training at 32K tokens on one H200, at the widths of the kernels.

Four layers as those of configs/h200_node.py, with more heads and fewer experts.
It begins with random weights, so that it needs no other run, and shows what a
step is worth with the kernels and without them, on the same data:

    python -m train.main --config=configs/h200_sparse.py
    python -m train.main --config=configs/h200_sparse.py --no-kernels \
      --run-dir=runs/h200_sparse_xla

Parameters, their moments and gradients take 16 bytes each, 9 GB.
"""

import dataclasses

from configs import h200_node
from dsa_jax import config as model_lib
from train import config as config_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.run import metrics as metrics_lib


def config() -> config_lib.TrainConfig:
  model = dataclasses.replace(
    h200_node.config().model,
    vocab_size=264,  # bytes
    num_layers=4,
    num_heads=32,
    index_heads=32,
    num_experts=16,
    experts_per_token=4,
    yarn=model_lib.YarnConfig(),
    remat="attention",
  )
  return config_lib.TrainConfig(
    run_dir="runs/h200_sparse",
    model=model,
    stages=(
      stages_lib.StageConfig(
        kind="sparse", steps=40, seq_len=32_768, batch_size=2
      ),
    ),
    init_from="random",
    optimizer=optimizer_lib.OptimizerConfig(peak_lr=3e-4),
    log=metrics_lib.LogConfig(every=10, eval_batches=1),
  )
