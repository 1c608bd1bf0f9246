"""DeepSeek-V3.2, 671B, pretrained at 4K tokens on 512 chips of v5p (8x8x8).

Parameters are 2.7 TB in float32, their two Adam moments as much each, and while
a step accumulates, so are their gradients: a chip holds 16 GB and adds up 5 GB.
Its microbatch is one sequence; of each layer it keeps the input and what the
attention gave, 193 MB, 12 GB in all. The experts are cut 16 ways and their
matrices 32 ways besides: a layer's all-gather brings a chip 1.4 GB of them.

    python -m train.main --config=configs/v32_671b_pretrain.py \
      --compile-only=v5p:8x8x8
"""

from dsa_jax import config as model_lib
from train import config as config_lib
from train.host import mesh as mesh_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.run import checkpoint as checkpoint_lib


def config() -> config_lib.TrainConfig:
  return config_lib.TrainConfig(
    run_dir="runs/v32_671b_pretrain",
    model=model_lib.v32_671b(),
    stages=(
      stages_lib.StageConfig(
        kind="pretrain",
        steps=230_000,  # 14.5T tokens
        seq_len=4096,
        batch_size=15_360,
        microbatches=30,
      ),
    ),
    optimizer=optimizer_lib.OptimizerConfig(
      peak_lr=2.2e-4, warmup=0.01, decay=0.3
    ),
    mesh=mesh_lib.MeshConfig(fsdp=32, expert=16),
    checkpoint=checkpoint_lib.CheckpointConfig(every=100),
  )
