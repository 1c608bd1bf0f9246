"""config.json of a released model <-> ModelConfig."""

import dataclasses
import pathlib
import re
from typing import Any, Final, Literal
import warnings

import jax.numpy as jnp
from jax.typing import DTypeLike

from dsa_jax import config as config_lib
from dsa_jax import json_file
from dsa_jax import ranges
from dsa_jax.hf import files
from dsa_jax.hf import fp8
from dsa_jax.hf import rope_json
from dsa_jax.hf import section as section_lib

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
# Without a bearing on the model's numbers, or what the tensors say themselves.
_NO_MATTER: Final = (
  *("architectures", "auto_map", "aux_loss_alpha", "bos_token_id"),
  *("eos_token_id", "ep_size", "index_share_for_mtp_iteration"),
  *("max_position_embeddings", "moe_router_dtype", "output_router_logits"),
  *("pad_token_id", "pretraining_tp", "router_aux_loss_coef", "seq_aux"),
  *("transformers_version", "use_cache"),
)
_QUANTISED: Final = {
  "activation_scheme": "dynamic",
  "fmt": "e4m3",
  "quant_method": "fp8",
  "scale_fmt": "ue8m0",
  "weight_block_size": [fp8.BLOCK, fp8.BLOCK],
}
_MAX_BYTES: Final = 2**20  # of the file; the longest have a tenth
_DTYPES: Final = ("float32", "bfloat16")
_LETTERS: Final = {"F": "full", "S": "shared"}
# Our words in an error of ModelConfig, and theirs.
_THEIRS: Final = {ours: key for key, ours in _SAME.items()}
_OURS: Final = re.compile(rf"\b(?:self\.)?({'|'.join(_THEIRS)})\b")
_TOLD: Final = 20  # unknown keys that a warning names


@dataclasses.dataclass(frozen=True)
class _Kinds:
  """What keys may be that are no fields of ModelConfig."""

  model_type: Literal["deepseek_v3", "deepseek_v32", "glm_moe_dsa"]
  dtype: str
  num_nextn_predict_layers: Literal[0, 1]
  layer_types: tuple[str, ...]
  index_topk_pattern: str
  index_topk_freq: ranges.Index
  index_skip_topk_offset: ranges.Index


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
    ValueError: The config asks for what is not supported here, or for more
      than the folder has tensors of; names file and key.
  """
  return read(files.Folder(pathlib.Path(folder)), dtype)


def read(
  stored: files.Folder, dtype: DTypeLike | None
) -> config_lib.ModelConfig:
  """As `read_model_config`, of a folder whose headers were read."""
  file = stored.path / "config.json"
  raw = read_json(stored.path)
  cfg = parse(raw, dtype, set(stored.entries), str(file))
  # Before anything is made of a size that only these numbers say.
  least = 3 * cfg.num_moe_layers * cfg.num_experts + 7 * cfg.num_layers
  if least > len(stored.entries):
    raise ValueError(
      f"{file}: num_hidden_layers={cfg.num_layers} and"
      f" n_routed_experts={cfg.num_experts} make {least:,} tensors or more; the"
      f" folder has {len(stored.entries):,}."
    )
  return cfg


def read_json(folder: pathlib.Path) -> dict[str, Any]:
  """config.json of a folder, as it is.

  Raises:
    FileNotFoundError: It is missing.
    ValueError: It is no JSON object.
  """
  file = folder / "config.json"
  try:
    return json_file.read(file, _MAX_BYTES)
  except FileNotFoundError as e:
    raise FileNotFoundError(f"{file} is missing.") from e


def parse(
  raw: dict[str, Any],
  dtype: DTypeLike | None,
  names: set[str],
  file: str = "config.json",
) -> config_lib.ModelConfig:
  """Their config in our words; refuses what would give other numbers.

  Args:
    raw: config.json.
    dtype: For parameters and activations; by default the config's.
    names: Of the folder's tensors.
    file: How errors and warnings call it.

  Raises:
    ValueError: A key is missing, or has a value that is not supported; names
      file and key.
  """
  section = section_lib.Section(raw, file)
  cfg = _parse(section, dtype)
  key = "num_nextn_predict_layers"
  said = section.get(key, _Kinds, default=None)
  if unread := section.unread():
    warnings.warn(
      f"{file} has keys that are unknown here: {_listed(unread)}. They are"
      " ignored.",
      stacklevel=4,
    )
  mtp = f"model.layers.{cfg.num_layers}."
  has_mtp = any(name.startswith(mtp) for name in names)
  if said is not None and bool(said) != has_mtp:
    has, reads = ("tensors", "with") if has_mtp else ("no tensor", "without")
    warnings.warn(
      f"{file}: {key}={said}, but the folder has {has} of layer"
      f" {cfg.num_layers}: the model is read {reads} MTP.",
      stacklevel=4,
    )
  return dataclasses.replace(cfg, num_mtp_layers=1 if has_mtp else 0)


def to_json(
  cfg: config_lib.ModelConfig, form: Format, like: dict[str, Any] | None
) -> dict[str, Any]:
  """The config as released.

  Args:
    cfg: Of the model.
    form: What its weights are written as.
    like: A config.json to take over what says nothing of the model's numbers.
      What is unknown here is left out, by a warning.

  Raises:
    ValueError: `like` is not supported; or what is written, read again, would
      be another model.
  """
  kept, was = _kept(like, cfg.dtype)
  interleaved = cfg.index_rope_interleaved
  kind = "glm_moe_dsa" if interleaved or cfg.indexer_types else "deepseek_v32"
  raw: dict[str, Any] = {
    "num_key_value_heads": cfg.num_heads,
    "use_cache": True,
    **_MUST_BE,
    **kept,
    **{key: getattr(cfg, ours) for key, ours in _SAME.items()},
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
  if like is not None and like.get("model_type") == "deepseek_v3":
    raw.pop("layer_types", None)  # full attention; what is written has DSA
  if "dtype" in raw:  # as newer versions spell it
    raw["dtype"] = raw.pop("torch_dtype")
  quantised = raw.pop("quantization_config", None)
  if form == "fp8":
    raw["quantization_config"] = quantised or _QUANTISED
  if was is None or was.indexer_types != _shared(cfg):
    for key in ("index_topk_pattern", "index_topk_freq"):
      raw.pop(key, None)
  if was is None or (was.rope_theta, was.yarn) != (cfg.rope_theta, cfg.yarn):
    raw.pop("rope_parameters", None)
    raw |= rope_json.write(cfg.rope_theta, cfg.yarn)
  if was is None or was.yarn != cfg.yarn:
    context = round(cfg.yarn.original_context * cfg.yarn.factor)
    raw["max_position_embeddings"] = context
  _check_says(raw, cfg)
  return raw


def _shared(
  cfg: config_lib.ModelConfig,
) -> tuple[Literal["full", "shared"], ...]:
  """Kinds of layers as they are read: none where all have an indexer."""
  return cfg.indexer_types if cfg.shares_index else ()


def _kept(
  like: dict[str, Any] | None, dtype: DTypeLike
) -> tuple[dict[str, Any], config_lib.ModelConfig | None]:
  """What a config.json says that is known here, and its model."""
  if like is None:
    return {}, None
  section = section_lib.Section(like, "config.json")
  was = _parse(section, dtype)
  section.skip("num_nextn_predict_layers")
  if unread := section.unread():
    warnings.warn(
      "config.json is written without keys that are unknown here:"
      f" {_listed(unread)}.",
      stacklevel=5,
    )
  return section.kept(), was


def _check_says(raw: dict[str, Any], cfg: config_lib.ModelConfig) -> None:
  """What is to be written is read as this model."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # told when it was read
    names = {f"model.layers.{cfg.num_layers}."} if cfg.num_mtp_layers else set()
    again = parse(raw, cfg.dtype, names)
  cfg = dataclasses.replace(cfg, indexer_types=_shared(cfg))
  for field in dataclasses.fields(cfg):
    if field.name in ("param_dtype", "remat", "rules"):
      continue
    was, now = getattr(cfg, field.name), getattr(again, field.name)
    if was != now:
      raise ValueError(
        f"config.json cannot say that {field.name}={was!r}; it would be read"
        f" as {now!r}."
      )


def _parse(
  section: section_lib.Section, dtype: DTypeLike | None
) -> config_lib.ModelConfig:
  """The config without MTP, which the tensors tell of."""
  if section.is_null("q_lora_rank"):
    raise section.error(
      "q_lora_rank is null: models whose queries have no latent (Moonlight,"
      " DeepSeek-V2-Lite) are not supported."
    )
  kind = section.get("model_type", _Kinds, default="deepseek_v32")
  given = _V32_INDEXER if kind == "deepseek_v3" else {}
  values: dict[str, Any] = {
    ours: section.get(
      key, config_lib.ModelConfig, ours, given.get(key, section_lib.REQUIRED)
    )
    for key, ours in _SAME.items()
  }
  for ours in ("routed_scale", "norm_eps", "init_std"):
    values[ours] = float(values[ours])
  for key, value in _MUST_BE.items():
    section.expect(key, value)
  if quantised := section.section("quantization_config"):
    for key, value in _QUANTISED.items():
      quantised.expect(key, value)
  section.skip(*_NO_MATTER)
  interleaved = "index_rope_interleaved"
  values[interleaved] = section.get(
    "indexer_rope_interleave",
    config_lib.ModelConfig,
    interleaved,
    kind == "glm_moe_dsa",
  )
  values["indexer_types"] = _indexer_types(section, values["num_layers"])
  values["rope_theta"], values["yarn"] = rope_json.read(section)
  values["dtype"] = values["param_dtype"] = _dtype(section, dtype)
  try:
    cfg = config_lib.ModelConfig(**values)
  except ValueError as e:
    raise section.error(_OURS.sub(lambda m: _THEIRS[m[1]], str(e))) from e
  _check_derived(section, cfg, kind)
  return cfg


def _check_derived(
  section: section_lib.Section, cfg: config_lib.ModelConfig, kind: str
) -> None:
  """What follows from other keys is said no other way."""
  rope, width = cfg.rope_head_dim, cfg.nope_head_dim + cfg.rope_head_dim
  heads = "num_attention_heads"
  section.expect("num_key_value_heads", cfg.num_heads, None, by=heads)
  widths = "qk_nope_head_dim and qk_rope_head_dim"
  section.expect("qk_head_dim", width, None, by=widths)
  section.expect("head_dim", rope, width, None, by=widths)
  mlps = ["dense"] * cfg.num_dense_layers + ["sparse"] * cfg.num_moe_layers
  depths = "num_hidden_layers and first_k_dense_replace"
  section.expect("mlp_layer_types", mlps, None, by=depths)
  known = ("indexed_attention", "deepseek_sparse_attention")
  if kind == "deepseek_v3":
    known = ("full_attention",)
  layers = section.get("layer_types", _Kinds, default=None)
  if layers is not None and (
    len(layers) != cfg.num_layers or set(layers) - set(known)
  ):
    section.refuse(
      "layer_types",
      f"must be {' or '.join(known)} for each of num_hidden_layers",
    )


def _dtype(section: section_lib.Section, asked: DTypeLike | None) -> str:
  """The dtype that was asked for, or else the config's."""
  new = section.get("dtype", _Kinds, default=None)
  old = section.get("torch_dtype", _Kinds, "dtype", default=None)
  if None not in (new, old) and new != old:
    raise section.error(f"dtype={new!r}, but torch_dtype={old!r}; keep one.")
  if asked is not None:
    name = jnp.dtype(asked).name
    if name not in _DTYPES:
      raise ValueError(f"dtype={name} must be {' or '.join(_DTYPES)}.")
    return name
  name = next((x for x in (new, old) if x is not None), "bfloat16")
  if name not in _DTYPES:
    section.refuse(
      "torch_dtype" if new is None else "dtype",
      f"must be {' or '.join(_DTYPES)}, or another dtype be asked for",
    )
  return name


def _indexer_types(
  section: section_lib.Section, layers: int
) -> tuple[str, ...]:
  """Which layers have an indexer; () if all do.

  GLM says it by a list, a pattern of F and S, or a period and its offset.
  """
  said: dict[str, tuple[str, ...]] = {}
  types = section.get("indexer_types", config_lib.ModelConfig, default=None)
  if types is not None:
    said["indexer_types"] = types
  pattern = section.get("index_topk_pattern", _Kinds, default=None)
  if pattern is not None:
    if set(pattern) - set(_LETTERS):
      section.refuse("index_topk_pattern", "must be of F and S alone")
    said["index_topk_pattern"] = tuple(_LETTERS[x] for x in pattern)
  period = section.get("index_topk_freq", _Kinds, default=None)
  offset = section.get("index_skip_topk_offset", _Kinds, default=2)
  if period is not None:
    said["index_topk_freq"] = tuple(
      "shared" if max(layer - offset + 1, 0) % max(period, 1) else "full"
      for layer in range(layers)
    )
  first = next(iter(said), "")
  for key, found in said.items():
    if len(found) != layers:
      section.refuse(key, f"must have num_hidden_layers={layers} entries")
    if found != said[first]:
      raise section.error(f"{first} and {key} contradict each other; keep one.")
  return said[first] if "shared" in said.get(first, ()) else ()


def _listed(keys: list[str]) -> str:
  """Keys on one line, however odd and many they are."""
  shown = [json_file.dotted([key]) for key in keys[:_TOLD]]
  return ", ".join(shown) + ", ..." * (len(keys) > _TOLD)
