"""Small checkpoints as released, written and read by another package."""

import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "deepseek_v32_tiny"
_NAMES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_RUST = {
  np.dtype(np.float16): "float16",
  np.dtype(np.float32): "float32",
  np.dtype(ml_dtypes.bfloat16): "bfloat16",
  np.dtype(ml_dtypes.float8_e4m3fn): "float8_e4m3fn",
  np.dtype(ml_dtypes.float8_e8m0fnu): "float8_e8m0fnu",
}

ROPE_SCALING = dict(
  type="yarn",
  factor=4.0,
  original_max_position_embeddings=64,
  beta_fast=32.0,
  beta_slow=1.0,
  mscale=1.0,
  mscale_all_dim=1.0,
)
# Every kind of tensor; 160 and 192 are no multiples of a block of 128.
CONFIG = dict(
  architectures=["DeepseekV32ForCausalLM"],
  model_type="deepseek_v32",
  vocab_size=64,
  hidden_size=160,
  num_hidden_layers=3,
  first_k_dense_replace=1,
  num_attention_heads=4,
  num_key_value_heads=4,
  qk_nope_head_dim=48,
  qk_rope_head_dim=16,
  v_head_dim=32,
  q_lora_rank=72,
  kv_lora_rank=40,
  index_n_heads=6,
  index_head_dim=32,
  index_topk=8,
  intermediate_size=192,
  moe_intermediate_size=136,
  n_routed_experts=4,
  num_experts_per_tok=2,
  n_shared_experts=1,
  n_group=2,
  topk_group=1,
  routed_scaling_factor=2.5,
  norm_topk_prob=True,
  scoring_func="sigmoid",
  topk_method="noaux_tc",
  rms_norm_eps=1e-6,
  initializer_range=0.02,
  rope_theta=10000.0,
  num_nextn_predict_layers=1,
  max_position_embeddings=256,
  rope_scaling=ROPE_SCALING,
  torch_dtype="bfloat16",
  bos_token_id=0,
)
FP8 = dict(
  activation_scheme="dynamic",
  fmt="e4m3",
  quant_method="fp8",
  scale_fmt="ue8m0",
  weight_block_size=[128, 128],
)


def shapes(c: dict, indexer: bool = True) -> dict[str, tuple[str, tuple]]:
  """Kind and shape of every tensor that a release with this config has.

  Kinds: "fp8" where the release quantises, "f32" for the router's bias, "bf16".
  """
  D, N, V = c["hidden_size"], c["num_attention_heads"], c["vocab_size"]
  H, R, U = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
  Q, C, L = c["q_lora_rank"], c["kv_lora_rank"], c["num_hidden_layers"]
  M, I = c["index_n_heads"], c["index_head_dim"]
  table = {
    "model.embed_tokens.weight": ("bf16", (V, D)),
    "model.norm.weight": ("bf16", (D,)),
    "lm_head.weight": ("bf16", (V, D)),
  }

  def mlp(name, F):
    table[f"{name}.gate_proj.weight"] = ("fp8", (F, D))
    table[f"{name}.up_proj.weight"] = ("fp8", (F, D))
    table[f"{name}.down_proj.weight"] = ("fp8", (D, F))

  for i in range(L + 1):
    layer = f"model.layers.{i}"
    attention = f"{layer}.self_attn"
    table |= {
      f"{layer}.input_layernorm.weight": ("bf16", (D,)),
      f"{layer}.post_attention_layernorm.weight": ("bf16", (D,)),
      f"{attention}.q_a_proj.weight": ("fp8", (Q, D)),
      f"{attention}.q_a_layernorm.weight": ("bf16", (Q,)),
      f"{attention}.q_b_proj.weight": ("fp8", (N * (H + R), Q)),
      f"{attention}.kv_a_proj_with_mqa.weight": ("fp8", (C + R, D)),
      f"{attention}.kv_a_layernorm.weight": ("bf16", (C,)),
      f"{attention}.kv_b_proj.weight": ("fp8", (N * (H + U), C)),
      f"{attention}.o_proj.weight": ("fp8", (D, N * U)),
    }
    if indexer:
      table |= {
        f"{attention}.indexer.wq_b.weight": ("fp8", (M * I, Q)),
        f"{attention}.indexer.wk.weight": ("fp8", (I, D)),
        f"{attention}.indexer.k_norm.weight": ("bf16", (I,)),
        f"{attention}.indexer.k_norm.bias": ("bf16", (I,)),
        f"{attention}.indexer.weights_proj.weight": ("bf16", (M, D)),
      }
    if i < c["first_k_dense_replace"]:
      mlp(f"{layer}.mlp", c["intermediate_size"])
      continue
    E, F = c["n_routed_experts"], c["moe_intermediate_size"]
    table[f"{layer}.mlp.gate.weight"] = ("bf16", (E, D))
    table[f"{layer}.mlp.gate.e_score_correction_bias"] = ("f32", (E,))
    mlp(f"{layer}.mlp.shared_experts", F * c["n_shared_experts"])
    for expert in range(E):
      mlp(f"{layer}.mlp.experts.{expert}", F)
  mtp = f"model.layers.{L}"
  table |= {
    f"{mtp}.enorm.weight": ("bf16", (D,)),
    f"{mtp}.hnorm.weight": ("bf16", (D,)),
    f"{mtp}.eh_proj.weight": ("bf16", (D, 2 * D)),
    f"{mtp}.shared_head.norm.weight": ("bf16", (D,)),
    f"{mtp}.embed_tokens.weight": ("bf16", (V, D)),
    f"{mtp}.shared_head.head.weight": ("bf16", (V, D)),
  }
  return table


def tensors(form: str, indexer: bool = True, scales: str = "F32", **config):
  """Random tensors of `CONFIG`, as a release in this format has them."""
  rng = np.random.default_rng(0)
  found = {}
  for name, (kind, shape) in shapes(CONFIG | config, indexer).items():
    values = 0.05 * rng.standard_normal(shape, np.float32)
    if form == "float32" or kind == "f32":
      found[name] = values
    elif form == "bf16" or kind == "bf16":
      found[name] = values.astype(ml_dtypes.bfloat16)
    else:
      found |= quantised(name, values, rng, scales)
  for name in ("embed_tokens", "shared_head.head"):
    original = {"embed_tokens": "model.embed_tokens"}.get(name, "lm_head")
    mtp = (CONFIG | config)["num_hidden_layers"]
    found[f"model.layers.{mtp}.{name}.weight"] = found[f"{original}.weight"]
  return found


def quantised(name, values, rng, scales):
  """A weight in FP8, by loops over blocks; scales are as of some release."""
  rows, columns = (-(-size // 128) for size in values.shape)
  weight = np.zeros(values.shape, ml_dtypes.float8_e4m3fn)
  scale = np.zeros((rows, columns), np.float32)
  for i in range(rows):
    for j in range(columns):
      block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
      amax = np.abs(values[block]).max()
      # Any power of two will do that leaves no overflow: not only the least.
      least = 2.0 ** np.ceil(np.log2(amax / 448))
      scale[i, j] = amax / 448 if scales == "any" else least * 2 ** (i + j & 1)
      weight[block] = (values[block] / scale[i, j]).astype(weight.dtype)
  if scales == "E8M0":
    scale = scale.astype(ml_dtypes.float8_e8m0fnu)
  return {name: weight, f"{name}_scale_inv": scale}


def write(folder: pathlib.Path, found: dict, parts: int = 3, **config) -> None:
  """A folder of several files with an index, as others write it."""
  folder.mkdir(exist_ok=True)
  raw = CONFIG | config
  if any(name.endswith("_scale_inv") for name in found):
    raw["quantization_config"] = FP8
  (folder / "config.json").write_text(json.dumps(raw))
  names, where = list(found), {}
  for i in range(parts):
    file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
    some = {name: found[name] for name in names[i::parts]}
    save_file(some, folder / file)
    where |= dict.fromkeys(some, file)
  index = {"metadata": {}, "weight_map": where}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_file(found: dict, file: pathlib.Path) -> None:
  arrays = {name: np.ascontiguousarray(x) for name, x in found.items()}
  specs = {
    name: safetensors.TensorSpec(
      dtype=_RUST[x.dtype],
      shape=list(x.shape),
      data_ptr=x.ctypes.data,
      data_len=x.nbytes,
    )
    for name, x in arrays.items()
  }
  safetensors.serialize_file(specs, str(file), {"format": "pt"})


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a folder, as the package reads them."""
  found = {}
  for file in sorted(folder.glob("*.safetensors")):
    for name, entry in safetensors.deserialize(file.read_bytes()):
      flat = np.frombuffer(entry["data"], _NAMES[entry["dtype"]])
      assert name not in found
      found[name] = flat.reshape(entry["shape"])
  return found


def assert_same(actual: dict, expected: dict) -> None:
  """The same names, shapes, dtypes and bits."""
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    assert actual[name].dtype == x.dtype, name
    assert actual[name].shape == x.shape, name
    assert actual[name].tobytes() == x.tobytes(), name
