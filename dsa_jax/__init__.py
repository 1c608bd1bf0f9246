"""DeepSeek-V3.2 in JAX: MLA, DeepSeek Sparse Attention, experts and MTP."""

from dsa_jax.config import ModelConfig as ModelConfig
from dsa_jax.config import YarnConfig as YarnConfig
from dsa_jax.frame import make_frame as make_frame
from dsa_jax.generate import generate as generate
from dsa_jax.hf import load_hf as load_hf
from dsa_jax.hf import read_model_config as read_model_config
from dsa_jax.hf import save_hf as save_hf
from dsa_jax.indexer import Indexer as Indexer
from dsa_jax.mla import MLA as MLA
from dsa_jax.sharding import make_mesh as make_mesh
from dsa_jax.sharding import ShardingRules as ShardingRules
from dsa_jax.transformer import Transformer as Transformer
