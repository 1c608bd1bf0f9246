"""The warm-up of DeepSeek-V3.2's indexers on 256 chips of v6e (16x16).

31 GiB a chip hold the 671B model's parameters (2.7 TB, 10.5 GB a chip), but not
its training: that takes 8 TB and the gradients. Heads are shared by 4 chips, or
the keys and values of all heads of 128K tokens would be 10.7 GB; a sequence by
16, so that the layers' inputs are 7 GB. The paper's 16 sequences are 4 times 4.

    python -m train.main --config=configs/v32_671b_warmup_v6e.py \
      --compile-only=v6e:16x16
"""

import dataclasses

from configs import v32_671b_warmup
from train import config as config_lib
from train.host import mesh as mesh_lib


def config() -> config_lib.TrainConfig:
  v5p = v32_671b_warmup.config()
  (stage,) = v5p.stages
  return dataclasses.replace(
    v5p,
    run_dir="runs/v32_671b_warmup_v6e",
    stages=(dataclasses.replace(stage, microbatches=4),),
    mesh=mesh_lib.MeshConfig(expert=4, context=16, tensor=4),
  )
