"""config.json of a released model <-> ModelConfig."""

import dataclasses
import json
import pathlib
from typing import Any, Final, Literal
import warnings

import jax.numpy as jnp
from jax.typing import DTypeLike

from dsa_jax import config as config_lib
from dsa_jax.hf import files
from dsa_jax.hf import fp8

type Format = Literal["bf16", "fp8", "float32"]

# Their key for each number or switch that both have.
_SAME: Final = {
  "vocab_size": "vocab_size",
  "hidden_size": "embed_dim",
  "num_hidden_layers": "num_layers",
  "first_k_dense_replace": "num_dense_layers",
  "num_attention_heads": "num_heads",
  "qk_nope_head_dim": "nope_head_dim",
  "qk_rope_head_dim": "rope_head_dim",
  "v_head_dim": "value_head_dim",
  "q_lora_rank": "q_rank",
  "kv_lora_rank": "kv_rank",
  "index_n_heads": "index_heads",
  "index_head_dim": "index_head_dim",
  "index_topk": "top_k",
  "intermediate_size": "dense_ffn_dim",
  "moe_intermediate_size": "expert_ffn_dim",
  "n_routed_experts": "num_experts",
  "num_experts_per_tok": "experts_per_token",
  "n_shared_experts": "num_shared_experts",
  "n_group": "expert_groups",
  "topk_group": "groups_per_token",
  "routed_scaling_factor": "routed_scale",
  "norm_topk_prob": "normalize_expert_weights",
  "rms_norm_eps": "norm_eps",
  "initializer_range": "init_std",
}
# V3 and V3.1 have no indexer; it gets V3.2's.
_V32_INDEXER: Final = {
  "index_n_heads": 64,
  "index_head_dim": 128,
  "index_topk": 2048,
}
# What the model is, whatever the config leaves unsaid.
_MUST_BE: Final = {
  "hidden_act": "silu",
  "tie_word_embeddings": False,
  "attention_bias": False,
  "attention_dropout": 0.0,
  "mlp_bias": False,
  "scoring_func": "sigmoid",
  "topk_method": "noaux_tc",
  "moe_layer_freq": 1,
  "rope_interleave": True,
}
_MODEL_TYPES: Final = {
  "deepseek_v3": "DeepseekV3ForCausalLM",
  "deepseek_v32": "DeepseekV32ForCausalLM",
  "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
# Read elsewhere here, or without a bearing on the model's numbers.
_NO_MATTER: Final = frozenset(
  """architectures auto_map aux_loss_alpha bos_token_id dtype eos_token_id
  ep_size head_dim index_share_for_mtp_iteration index_skip_topk_offset
  index_topk_freq index_topk_pattern indexer_rope_interleave indexer_types
  layer_types max_position_embeddings mlp_layer_types model_type
  moe_router_dtype num_key_value_heads num_nextn_predict_layers
  output_router_logits pad_token_id pretraining_tp qk_head_dim
  quantization_config rope_parameters rope_scaling rope_theta
  router_aux_loss_coef seq_aux torch_dtype transformers_version
  use_cache""".split()
)
_QUANTISED: Final = {
  "activation_scheme": "dynamic",
  "fmt": "e4m3",
  "quant_method": "fp8",
  "scale_fmt": "ue8m0",
  "weight_block_size": [fp8.BLOCK, fp8.BLOCK],
}


def read_model_config(
  folder: str | pathlib.Path, dtype: DTypeLike | None = None
) -> config_lib.ModelConfig:
  """The config of the model in a Hugging Face folder.

  Keys that are unknown here are told by a warning.

  Args:
    folder: Has config.json and safetensors; of these the headers are read, to
      see whether there is an MTP layer.
    dtype: For parameters and activations; by default the config's.

  Raises:
    FileNotFoundError: No config.json or no safetensors there.
    ValueError: The config asks for what is not supported here; names the key.
  """
  folder = pathlib.Path(folder)
  return parse(read_json(folder), dtype, set(files.Folder(folder).entries))


def read_json(folder: pathlib.Path) -> dict[str, Any]:
  """config.json of a folder, as it is.

  Raises:
    FileNotFoundError: It is missing.
    ValueError: It is no JSON object.
  """
  file = folder / "config.json"
  if not file.exists():
    raise FileNotFoundError(f"{file} is missing.")
  try:
    raw = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as e:
    raise ValueError(f"{file} is no JSON: {e}.") from e
  if not isinstance(raw, dict):
    raise ValueError(f"{file} is no JSON object.")
  return raw


def parse(
  raw: dict[str, Any], dtype: DTypeLike | None, names: set[str]
) -> config_lib.ModelConfig:
  """Their config in our words; refuses what would give other numbers.

  Args:
    raw: config.json.
    dtype: For parameters and activations; by default the config's.
    names: Of the folder's tensors.

  Raises:
    ValueError: A key is missing, or has a value that is not supported.
  """
  kind = raw.get("model_type", "deepseek_v32")
  if kind not in _MODEL_TYPES:
    _refuse("model_type", kind, f"one of {', '.join(_MODEL_TYPES)}")
  if kind == "deepseek_v3":
    raw = _V32_INDEXER | raw
  for key in _SAME:
    if key not in raw:
      raise ValueError(f"config.json lacks the key {key}.")
  _check(raw)
  unknown = sorted(raw.keys() - _SAME.keys() - _MUST_BE.keys() - _NO_MATTER)
  if unknown:
    warnings.warn(
      f"config.json has keys that are unknown here: {', '.join(unknown)}. They"
      " are ignored.",
      stacklevel=3,
    )
  asked: Any = dtype or raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
  name = jnp.dtype(asked).name
  if name not in ("float32", "bfloat16"):
    raise ValueError(
      f"{name} is no dtype for a model; take float32 or bfloat16."
    )
  layers = raw["num_hidden_layers"]
  has_mtp = any(n.startswith(f"model.layers.{layers}.") for n in names)
  if raw.get("num_nextn_predict_layers", 0) and not has_mtp:
    warnings.warn(
      f"config.json: num_nextn_predict_layers="
      f"{raw['num_nextn_predict_layers']}, but the folder has no tensor of"
      f" layer {layers}: the model is read without MTP.",
      stacklevel=3,
    )
  values: dict[str, Any] = {ours: raw[key] for key, ours in _SAME.items()}
  for ours in ("routed_scale", "norm_eps", "init_std"):
    values[ours] = float(values[ours])
  theta, yarn = _rope(raw)
  return config_lib.ModelConfig(
    **values,
    index_rope_interleaved=bool(
      raw.get("indexer_rope_interleave", kind == "glm_moe_dsa")
    ),
    indexer_types=_indexer_types(raw),
    num_mtp_layers=1 if has_mtp else 0,
    rope_theta=theta,
    yarn=yarn,
    dtype=name,
    param_dtype=name,
  )


def to_json(
  cfg: config_lib.ModelConfig, form: Format, like: dict[str, Any] | None
) -> dict[str, Any]:
  """The config as released.

  Args:
    cfg: Of the model.
    form: What its weights are written as.
    like: A config.json to take over what says nothing of the model's numbers.

  Raises:
    ValueError: Read again, it would be another model.
  """
  interleaved = cfg.index_rope_interleaved
  kind = "glm_moe_dsa" if interleaved or cfg.indexer_types else "deepseek_v32"
  same = {key: getattr(cfg, ours) for key, ours in _SAME.items()}
  context = round(cfg.yarn.original_context * cfg.yarn.factor)
  raw: dict[str, Any] = {
    "max_position_embeddings": context,
    "num_key_value_heads": cfg.num_heads,
    "use_cache": True,
    **_MUST_BE,
    **(like or {}),
    **same,
    "architectures": [_MODEL_TYPES[kind]],
    "model_type": kind,
    "num_nextn_predict_layers": cfg.num_mtp_layers,
    "torch_dtype": "float32" if form == "float32" else "bfloat16",
  }
  if kind == "glm_moe_dsa":
    full = ("full",) * cfg.num_layers
    raw["indexer_types"] = list(cfg.indexer_types or full)
    raw["indexer_rope_interleave"] = interleaved
  else:
    for key in ("indexer_types", "indexer_rope_interleave", "auto_map"):
      raw.pop(key, None)
  if "dtype" in raw:  # as newer versions spell it
    raw["dtype"] = raw.pop("torch_dtype")
  raw.pop("quantization_config", None)
  if form == "fp8":
    raw["quantization_config"] = (like or {}).get(
      "quantization_config", _QUANTISED
    )
  if like is None or _rope(like) != (cfg.rope_theta, cfg.yarn):
    raw.pop("rope_parameters", None)
    raw["rope_theta"] = cfg.rope_theta
    raw["rope_scaling"] = _rope_scaling(cfg.yarn)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # told when it was read
    names = {f"model.layers.{cfg.num_layers}."} if cfg.num_mtp_layers else set()
    again = parse(raw, cfg.dtype, names)
  for field in dataclasses.fields(cfg):
    if field.name in ("param_dtype", "remat", "rules", "indexer_types"):
      continue
    was, now = getattr(cfg, field.name), getattr(again, field.name)
    if was != now:
      raise ValueError(
        f"config.json cannot say that {field.name}={was!r}; it would be read"
        f" as {now!r}."
      )
  return raw


def _check(raw: dict[str, Any]) -> None:
  for key, value in _MUST_BE.items():
    if raw.get(key, value) != value:
      _refuse(key, raw[key], repr(value))
  layers, dense = raw["num_hidden_layers"], raw["first_k_dense_replace"]
  heads = raw["num_attention_heads"]
  width = raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
  mlps = ["dense"] * dense + ["sparse"] * (layers - dense)
  for key, value in (
    ("num_key_value_heads", heads),
    ("qk_head_dim", width),
    ("mlp_layer_types", mlps),
  ):
    if raw.get(key) not in (None, value):
      _refuse(key, raw[key], repr(value))
  sparse = {"indexed_attention", "deepseek_sparse_attention"}
  others = sorted(set(raw.get("layer_types") or ()) - sparse)
  if others and raw.get("model_type") != "deepseek_v3":
    _refuse("layer_types", others[0], " or ".join(sorted(sparse)))
  if raw.get("num_nextn_predict_layers", 0) not in (0, 1):
    _refuse(
      "num_nextn_predict_layers", raw["num_nextn_predict_layers"], "0 or 1"
    )
  quantised = raw.get("quantization_config") or {}
  for key, value in _QUANTISED.items():
    if quantised.get(key, value) not in (value, None):
      _refuse(f"quantization_config.{key}", quantised[key], repr(value))


def _refuse(key: str, value: Any, supported: str) -> None:
  raise ValueError(
    f"config.json: {key}={value!r} is not supported; it must be {supported}."
  )


def _rope(raw: dict[str, Any]) -> tuple[float, config_lib.YarnConfig]:
  """Base and YaRN, in either spelling."""
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "yarn"):
    _refuse("rope_scaling.type", kind, "yarn")
  if kind == "default":
    return theta, config_lib.YarnConfig()
  for key in ("factor", "original_max_position_embeddings"):
    if key not in rope:
      raise ValueError(f"config.json: rope_scaling lacks the key {key}.")
  return theta, config_lib.YarnConfig(
    factor=float(rope["factor"]),
    original_context=rope["original_max_position_embeddings"],
    beta_fast=float(rope.get("beta_fast", 32)),
    beta_slow=float(rope.get("beta_slow", 1)),
    mscale=float(rope.get("mscale", 1.0)),
    mscale_all_dim=float(rope.get("mscale_all_dim", 0.0)),
  )


def _rope_scaling(yarn: config_lib.YarnConfig) -> dict[str, Any] | None:
  if yarn == config_lib.YarnConfig():
    return None
  return {
    "type": "yarn",
    "factor": yarn.factor,
    "original_max_position_embeddings": yarn.original_context,
    "beta_fast": yarn.beta_fast,
    "beta_slow": yarn.beta_slow,
    "mscale": yarn.mscale,
    "mscale_all_dim": yarn.mscale_all_dim,
  }


def _indexer_types(raw: dict[str, Any]) -> tuple[Any, ...]:
  """Which layers have an indexer; () if all do.

  GLM says it by a list, a pattern of F and S, or a period and its offset.
  """
  layers = raw["num_hidden_layers"]
  types = raw.get("indexer_types")
  if types is None and (pattern := raw.get("index_topk_pattern")):
    types = ["full" if letter == "F" else "shared" for letter in pattern]
  if types is None:
    period = raw.get("index_topk_freq") or 1
    offset = raw.get("index_skip_topk_offset", 2)
    types = [
      "shared" if max(layer - offset + 1, 0) % period else "full"
      for layer in range(layers)
    ]
  return tuple(types) if "shared" in types else ()
