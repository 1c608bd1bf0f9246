"""Checkpoints as Hugging Face folders hold them, in and out."""

from dsa_jax.hf.config_json import read_model_config as read_model_config
from dsa_jax.hf.load import load_hf as load_hf
from dsa_jax.hf.save import save_hf as save_hf
