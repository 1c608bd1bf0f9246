"""A 16B model (2.6B active) on a node of 8 H200, made sparse at 32K tokens.

Parameters, moments and gradients take 16 bytes each. The devices share the
14.4B of the experts, 29 GB each, and exchange tokens over NVLink; the other
1.5B, 23 GB, each of them has whole, which saves gathering them. A microbatch is
one sequence a device, of which it keeps each of 27 layers' input (134 MB) and
selected keys (268 MB): 11 GB.
"""

from dsa_jax import config as model_lib
from train import config as config_lib
from train.host import mesh as mesh_lib
from train.learn import optimizer as optimizer_lib
from train.learn import stages as stages_lib
from train.run import checkpoint as checkpoint_lib


def config() -> config_lib.TrainConfig:
  pretrain = stages_lib.StageConfig(
    kind="pretrain",
    steps=100_000,
    seq_len=4096,
    batch_size=1024,
    microbatches=16,
  )
  long = dict(seq_len=32_768, batch_size=128, microbatches=16)
  return config_lib.TrainConfig(
    run_dir="runs/h200_node",
    model=model_lib.ModelConfig(
      vocab_size=129_280,
      embed_dim=2048,
      num_layers=27,
      num_dense_layers=1,
      num_heads=16,
      nope_head_dim=128,
      rope_head_dim=64,
      value_head_dim=128,
      q_rank=1024,
      kv_rank=512,
      index_heads=16,
      index_head_dim=128,
      top_k=2048,
      dense_ffn_dim=10_944,
      expert_ffn_dim=1408,
      num_experts=64,
      experts_per_token=6,
      num_shared_experts=2,
      routed_scale=1.0,
      yarn=model_lib.YarnConfig(factor=8.0),
      remat="selection",
    ),
    stages=(
      pretrain,
      stages_lib.StageConfig(kind="extend", steps=2000, lr_scale=0.1, **long),
      stages_lib.StageConfig(kind="warmup", steps=1000, **long),
      stages_lib.StageConfig(kind="sparse", steps=5000, lr_scale=0.05, **long),
    ),
    optimizer=optimizer_lib.OptimizerConfig(
      peak_lr=4e-4, warmup=0.02, decay=0.3
    ),
    mesh=mesh_lib.MeshConfig(expert=8),
    checkpoint=checkpoint_lib.CheckpointConfig(every=500),
  )
