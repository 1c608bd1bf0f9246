"""Sparse training of DeepSeek-V3.2 at 128K tokens on 256 chips of tpu7x.

A chip is two devices of 95 GiB each: as many, and as large, as 512 chips of v5p
have. The same mesh and microbatch fit, with five times the FLOP/s.

    python -m train.main --config=configs/v32_671b_sparse_tpu7x.py \
      --compile-only=tpu7x:4x8x8
"""

import dataclasses

from configs import v32_671b_sparse
from train import config as config_lib


def config() -> config_lib.TrainConfig:
  return dataclasses.replace(
    v32_671b_sparse.config(), run_dir="runs/v32_671b_sparse_tpu7x"
  )
