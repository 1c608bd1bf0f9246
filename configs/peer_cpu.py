"""The sparse stage at the size that other trainers are compared at, on a CPU.

4 layers, 8 sequences of 512 tokens, K = 64, float32, with the indexer's KL.
"""

from dsa_jax import config as model_lib
from train import config as config_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib


def config() -> config_lib.TrainConfig:
  return config_lib.TrainConfig(
    run_dir="runs/peer_cpu",
    init_from="random",  # only its speed is of interest
    model=model_lib.ModelConfig(
      vocab_size=512,
      embed_dim=128,
      num_layers=4,
      num_dense_layers=1,
      num_heads=4,
      nope_head_dim=32,
      rope_head_dim=16,
      value_head_dim=32,
      q_rank=64,
      kv_rank=32,
      index_heads=4,
      index_head_dim=32,
      top_k=64,
      dense_ffn_dim=256,
      expert_ffn_dim=64,
      num_experts=8,
      experts_per_token=2,
      dtype="float32",
    ),
    stages=(
      stages_lib.StageConfig(
        kind="sparse", steps=60, seq_len=512, batch_size=8
      ),
    ),
    optimizer=optimizer_lib.OptimizerConfig(peak_lr=3e-3),
  )
