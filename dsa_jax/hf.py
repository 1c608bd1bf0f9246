"""Reads a Hugging Face folder of DeepSeek-V3.2: config.json and safetensors.

The table of names is literal: for each parameter here, where it stands there
and how it is turned. Their linear weights are [out, in], ours [in, out] with
heads apart; layers that are alike are stacked here.
"""

from collections.abc import Callable
import json
import pathlib
from typing import Any, Final

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from dsa_jax import config as config_lib
from dsa_jax import transformer

type Turn = Callable[[np.ndarray, config_lib.ModelConfig], np.ndarray]


def _same(w, cfg):
  del cfg
  return w


def _transposed(w, cfg):
  del cfg
  return w.T


def _heads(w, heads):
  """[heads * width, in] -> [in, heads, width]."""
  return w.T.reshape(w.shape[1], heads, -1)


_ATTENTION: Final[dict[str, tuple[str, Turn]]] = {
  "q_a_DQ": ("q_a_proj.weight", _transposed),
  "q_norm.scale_D": ("q_a_layernorm.weight", _same),
  "q_b_QNX": ("q_b_proj.weight", lambda w, cfg: _heads(w, cfg.num_heads)),
  "kv_a_DX": ("kv_a_proj_with_mqa.weight", _transposed),
  "kv_norm.scale_D": ("kv_a_layernorm.weight", _same),
  "k_b_CNH": (
    "kv_b_proj.weight",
    lambda w, cfg: _heads(w, cfg.num_heads)[..., : cfg.nope_head_dim],
  ),
  "v_b_CNU": (
    "kv_b_proj.weight",
    lambda w, cfg: _heads(w, cfg.num_heads)[..., cfg.nope_head_dim :],
  ),
  "out_NUD": (
    "o_proj.weight",
    lambda w, cfg: w.T.reshape(cfg.num_heads, -1, w.shape[0]),
  ),
  "indexer.q_QMI": (
    "indexer.wq_b.weight",
    lambda w, cfg: _heads(w, cfg.index_heads),
  ),
  "indexer.k_DI": ("indexer.wk.weight", _transposed),
  "indexer.k_norm.scale_D": ("indexer.k_norm.weight", _same),
  "indexer.k_norm.bias_D": ("indexer.k_norm.bias", _same),
  "indexer.w_DM": ("indexer.weights_proj.weight", _transposed),
}


def _mlp(ours: str, theirs: str, letters: str = "DF") -> dict:
  D, F = letters
  return {
    f"{ours}gate_{D}{F}": (f"{theirs}gate_proj.weight", _transposed),
    f"{ours}up_{D}{F}": (f"{theirs}up_proj.weight", _transposed),
    f"{ours}down_{F}{D}": (f"{theirs}down_proj.weight", _transposed),
  }


_LAYER: Final[dict[str, tuple[str, Turn]]] = {
  "attention_norm.scale_D": ("input_layernorm.weight", _same),
  "ffn_norm.scale_D": ("post_attention_layernorm.weight", _same),
  **{
    f"attention.{ours}": (f"self_attn.{theirs}", turn)
    for ours, (theirs, turn) in _ATTENTION.items()
  },
}
_DENSE: Final = _mlp("ffn.", "mlp.")
_MOE: Final = {
  "ffn.router.w_DE": ("mlp.gate.weight", _transposed),
  "ffn.router.bias_E": ("mlp.gate.e_score_correction_bias", _same),
  **_mlp("ffn.shared.", "mlp.shared_experts."),
}
# One tensor an expert there, all of them in one here: E in front.
_EXPERTS: Final = {
  "ffn.gate_EDF": ("mlp.experts.{}.gate_proj.weight", _transposed),
  "ffn.up_EDF": ("mlp.experts.{}.up_proj.weight", _transposed),
  "ffn.down_EFD": ("mlp.experts.{}.down_proj.weight", _transposed),
}
_MTP: Final = {
  "embed_norm.scale_D": ("enorm.weight", _same),
  "hidden_norm.scale_D": ("hnorm.weight", _same),
  "join_XDD": ("eh_proj.weight", lambda w, cfg: w.T.reshape(2, -1, w.shape[0])),
  "final_norm.scale_D": ("shared_head.norm.weight", _same),
}
_TOP: Final = {
  "embed.table_VD": ("model.embed_tokens.weight", _same),
  "final_norm.scale_D": ("model.norm.weight", _same),
  "head.w_DV": ("lm_head.weight", _transposed),
}
# Copies of the trunk's that the released MTP layer carries.
_MTP_COPIES: Final = ("embed_tokens.weight", "shared_head.head.weight")


def load_hf(
  folder: str | pathlib.Path, dtype: DTypeLike | None = None
) -> transformer.Transformer:
  """The model in a Hugging Face folder, sharded over the mesh in context.

  Args:
    folder: Has config.json and one or more model*.safetensors, bf16 or fp32.
    dtype: For parameters and activations; by default the config's. (The
      indexer's head weights and the router's bias are fp32 regardless.)

  Raises:
    FileNotFoundError: No config.json or no safetensors there.
    ImportError: The package safetensors is missing.
    ValueError: The config asks for what is not supported here, or the tensors
      are not exactly those of the model; names the key or the tensor.
  """
  folder = pathlib.Path(folder)
  tensors = _Tensors(folder)
  raw = _read_json(folder / "config.json")
  try:
    cfg = _model_config(raw, dtype, tensors.names)
  except KeyError as e:
    raise ValueError(f"{folder}/config.json lacks the key {e}.") from e
  model = nnx.eval_shape(lambda: transformer.Transformer(cfg, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
  loaded = [_load(path, leaf, cfg, tensors) for path, leaf in leaves]
  tensors.check_all_used(cfg)
  return nnx.merge(graphdef, jax.tree.unflatten(treedef, loaded))


class _Tensors:
  """The tensors of all files of a folder, read when asked for."""

  def __init__(self, folder: pathlib.Path):
    try:
      import safetensors
    except ImportError as e:
      raise ImportError(
        'Reading safetensors needs an extra: pip install "dsa-jax[hf]".'
      ) from e
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
      raise FileNotFoundError(
        f"{folder} has no model.safetensors or model-*-of-*.safetensors."
      )
    self._where = {}
    for file in files:
      # "flax", as numpy itself has no bfloat16.
      opened = safetensors.safe_open(file, framework="flax")
      self._where.update((name, (opened, file)) for name in opened.keys())
    self._used = set()

  @property
  def names(self) -> set[str]:
    return set(self._where)

  def read(self, name: str) -> np.ndarray:
    if name not in self._where:
      raise ValueError(
        f"The folder has no tensor {name}, which the model needs."
      )
    opened, file = self._where[name]
    kind = opened.get_slice(name).get_dtype()
    if kind not in ("F32", "BF16"):
      raise ValueError(
        f"{name} in {file} is {kind}; only F32 and BF16 are read."
      )
    self._used.add(name)
    return np.asarray(opened.get_tensor(name))

  def check_all_used(self, cfg: config_lib.ModelConfig) -> None:
    mtp = f"model.layers.{cfg.num_layers}."
    copies = {mtp + name for name in _MTP_COPIES}
    unknown = sorted(self.names - self._used - copies)
    if unknown:
      raise ValueError(
        f"The folder has {len(unknown)} tensors that the model does not: "
        f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
      )


def _load(path, leaf, cfg, tensors) -> jax.Array:
  """The value of one parameter, stacked over the layers that share it."""
  name = ".".join(str(key.key) for key in path if hasattr(key, "key"))
  stack, _, inside = name.partition(".")
  dense = cfg.num_dense_layers
  if stack == "dense_layers":
    value = np.stack([_of_layer(inside, i, cfg, tensors) for i in range(dense)])
  elif stack == "moe_layers":
    layers = range(dense, cfg.num_layers)
    value = np.stack([_of_layer(inside, i, cfg, tensors) for i in layers])
  elif name.startswith("mtp.block."):
    inside = name.removeprefix("mtp.block.")
    value = _of_layer(inside, cfg.num_layers, cfg, tensors)
  elif stack == "mtp":
    theirs, turn = _MTP[inside]
    value = turn(tensors.read(f"model.layers.{cfg.num_layers}.{theirs}"), cfg)
  else:
    theirs, turn = _TOP[name]
    value = turn(tensors.read(theirs), cfg)
  if value.shape != leaf.shape:
    raise ValueError(f"{name}: {value.shape} in the folder, {leaf.shape} here.")
  value = value.astype(leaf.dtype)
  return (
    jax.device_put(value, leaf.sharding)
    if leaf.sharding
    else jnp.asarray(value)
  )


def _of_layer(inside, layer, cfg, tensors) -> np.ndarray:
  prefix = f"model.layers.{layer}."
  if inside in _EXPERTS:
    theirs, turn = _EXPERTS[inside]
    return np.stack(
      [
        turn(tensors.read(prefix + theirs.format(expert)), cfg)
        for expert in range(cfg.num_experts)
      ]
    )
  moe = layer >= cfg.num_dense_layers
  theirs, turn = (_LAYER | (_MOE if moe else _DENSE))[inside]
  return turn(tensors.read(prefix + theirs), cfg)


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  if not file.exists():
    raise FileNotFoundError(f"{file} is missing.")
  return json.loads(file.read_text(encoding="utf-8"))


def _model_config(
  raw: dict[str, Any], dtype: DTypeLike | None, names: set[str]
) -> config_lib.ModelConfig:
  """Their config in our words; refuses what would give other numbers."""
  required = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "quantization_config": None,
    "model_type": "deepseek_v32",
  }
  for key, value in required.items():
    if raw.get(key, value) != value:
      raise ValueError(f"config.json: {key}={raw[key]!r} is not supported.")
  name = jnp.dtype(dtype or raw.get("dtype") or raw["torch_dtype"]).name
  if name not in ("float32", "bfloat16"):
    raise ValueError(
      f"{name} is no dtype for a model; take float32 or bfloat16."
    )
  layers = raw["num_hidden_layers"]
  has_mtp = any(n.startswith(f"model.layers.{layers}.") for n in names)
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "yarn"):
    raise ValueError(f"config.json: RoPE of type {kind!r} is not supported.")
  yarn = config_lib.YarnConfig()
  if kind == "yarn":
    yarn = config_lib.YarnConfig(
      factor=float(rope["factor"]),
      original_context=rope["original_max_position_embeddings"],
      beta_fast=float(rope.get("beta_fast", 32)),
      beta_slow=float(rope.get("beta_slow", 1)),
      mscale=float(rope.get("mscale", 1.0)),
      mscale_all_dim=float(rope.get("mscale_all_dim", 0.0)),
    )
  return config_lib.ModelConfig(
    vocab_size=raw["vocab_size"],
    embed_dim=raw["hidden_size"],
    num_layers=layers,
    num_dense_layers=raw["first_k_dense_replace"],
    num_heads=raw["num_attention_heads"],
    nope_head_dim=raw["qk_nope_head_dim"],
    rope_head_dim=raw["qk_rope_head_dim"],
    value_head_dim=raw["v_head_dim"],
    q_rank=raw["q_lora_rank"],
    kv_rank=raw["kv_lora_rank"],
    index_heads=raw["index_n_heads"],
    index_head_dim=raw["index_head_dim"],
    top_k=raw["index_topk"],
    dense_ffn_dim=raw["intermediate_size"],
    expert_ffn_dim=raw["moe_intermediate_size"],
    num_experts=raw["n_routed_experts"],
    experts_per_token=raw["num_experts_per_tok"],
    num_shared_experts=raw["n_shared_experts"],
    expert_groups=raw["n_group"],
    groups_per_token=raw["topk_group"],
    routed_scale=float(raw["routed_scaling_factor"]),
    normalize_expert_weights=raw["norm_topk_prob"],
    num_mtp_layers=1 if has_mtp else 0,
    rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
    yarn=yarn,
    norm_eps=raw["rms_norm_eps"],
    init_std=raw["initializer_range"],
    dtype=name,
    param_dtype=name,
  )
