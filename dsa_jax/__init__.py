"""DeepSeek-V3.2 in JAX: MLA, DeepSeek Sparse Attention, experts and MTP."""

from dsa_jax.config import ModelConfig
from dsa_jax.config import YarnConfig
from dsa_jax.engine.engine import Engine
from dsa_jax.engine.generation import generate
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import Result
from dsa_jax.engine.request import SamplingParams
from dsa_jax.frame import make_frame
from dsa_jax.hf import load_hf
from dsa_jax.hf import read_model_config
from dsa_jax.hf import save_hf
from dsa_jax.indexer import Indexer
from dsa_jax.mla import MLA
from dsa_jax.sharding import make_mesh
from dsa_jax.sharding import ShardingRules
from dsa_jax.transformer import Transformer

__all__ = [
  "Engine",
  "Indexer",
  "MLA",
  "ModelConfig",
  "Request",
  "Result",
  "SamplingParams",
  "ShardingRules",
  "Transformer",
  "YarnConfig",
  "generate",
  "load_hf",
  "make_frame",
  "make_mesh",
  "read_model_config",
  "save_hf",
]
