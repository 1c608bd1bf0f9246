"""What a config.json asks for, in words old and new."""

import dataclasses
from typing import Any

import pytest

import dsa_jax
from dsa_jax import config as config_lib
from dsa_jax.hf import config_json
from tests.hf import folders

MTP = {"model.layers.3.enorm.weight"}


def parse(**changes):
  raw = {k: v for k, v in (folders.CONFIG | changes).items() if v != "none"}
  return config_json.parse(raw, None, MTP)


def test_both_spellings_of_rope():
  old = parse()
  scaling: Any = dict(folders.ROPE_SCALING)
  scaling["rope_type"] = scaling.pop("type")
  new = parse(
    rope_scaling="none",
    rope_theta="none",
    rope_parameters=scaling | {"rope_theta": 10000.0},
    torch_dtype="none",
    dtype="bfloat16",
  )
  assert old == new
  assert old.yarn.factor == 4.0 and old.num_mtp_layers == 1


def test_unknown_keys_are_told():
  with pytest.warns(UserWarning, match="unknown here: flux_capacitor"):
    parse(flux_capacitor=1.21)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("tie_word_embeddings", True),
    ("scoring_func", "softmax"),
    ("moe_layer_freq", 2),
    ("rope_interleave", False),
    ("model_type", "llama"),
    ("num_key_value_heads", 2),
    ("mlp_layer_types", ["sparse", "dense", "sparse"]),
    ("layer_types", ["indexed_attention", "full_attention"]),
    ("num_nextn_predict_layers", 2),
    ("num_nextn_predict_layers", True),
    ("attention_bias", 0),
    ("moe_layer_freq", True),
    ("hidden_act", None),
    ("head_dim", 40),
    ("partial_rotary_factor", 0.5),
    ("torch_dtype", "float16"),
    ("torch_dtype", ""),
    ("routed_scaling_factor", True),
    ("hidden_size", 160.0),
    ("n_routed_experts", 10**12),
    ("norm_topk_prob", 1),
    ("quantization_config", "fp8"),
  ],
)
def test_refuses_what_it_cannot_honour(key, value):
  with pytest.raises(ValueError, match=f"{key}=.*is not supported"):
    parse(**{key: value})


@pytest.mark.parametrize(
  "layers",
  [["sliding_attention"] * 3, ["full_attention"] * 2, [], "full_attention"],
)
def test_v3_has_full_attention_in_every_layer(layers):
  with pytest.raises(ValueError, match="layer_types=.*is not supported"):
    parse(model_type="deepseek_v3", layer_types=layers)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("quant_method", "gptq"),
    ("fmt", "e5m2"),
    ("weight_block_size", [64, 64]),
    ("activation_scheme", "static"),
  ],
)
def test_refuses_other_quantisations(key, value):
  with pytest.raises(ValueError, match=f"quantization_config.{key}="):
    parse(quantization_config=folders.FP8 | {key: value})


def test_unknown_keys_are_told_at_any_depth():
  rope = folders.ROPE_SCALING | {"long_factor": [1.0], "low_freq_factor": 1}
  fp8 = folders.FP8 | {"modules_to_not_convert": ["lm_head"]}
  told = (
    "unknown here: original_max_position_embeddings,"
    " quantization_config.modules_to_not_convert, rope_scaling.long_factor,"
    " rope_scaling.low_freq_factor"
  )
  with pytest.warns(UserWarning, match=told):
    parse(
      rope_scaling=rope,
      quantization_config=fp8,
      original_max_position_embeddings=4,
    )


def test_models_without_a_query_latent_are_refused():
  """Moonlight is of V3's type, DeepSeek-V2-Lite of its own."""
  for kind in ("deepseek_v3", "deepseek_v2"):
    with pytest.raises(ValueError, match="q_lora_rank is null: .*Moonlight"):
      parse(model_type=kind, q_lora_rank=None)


@pytest.mark.parametrize(
  ("said", "told"),
  [
    (dict(num_nextn_predict_layers=0), "=0, but the folder has tensors of"),
    (dict(num_hidden_layers=2), "=1, but the folder has no tensor of layer 2"),
  ],
)
def test_an_mtp_layer_that_config_and_tensors_disagree_on(said, told):
  with pytest.warns(UserWarning, match=told):
    parse(**said)


@pytest.mark.parametrize("key", ["kv_lora_rank", "index_topk"])
def test_names_a_missing_key(key):
  with pytest.raises(ValueError, match=f"lacks the key {key}"):
    parse(**{key: "none"})


def test_v3_has_no_indexer():
  cfg = parse(
    model_type="deepseek_v3",
    index_n_heads="none",
    index_head_dim="none",
    index_topk="none",
  )
  assert (cfg.index_heads, cfg.index_head_dim, cfg.top_k) == (64, 128, 2048)


class TestGlm:
  GLM = dict(
    model_type="glm_moe_dsa",
    rope_scaling="none",
    num_hidden_layers=8,
    num_nextn_predict_layers=0,
  )
  FULL = (
    "full",
    "full",
    "full",
    "shared",
    "shared",
    "shared",
    "full",
    "shared",
  )

  @pytest.mark.parametrize(
    "said",
    [
      dict(indexer_types=list(FULL)),
      dict(index_topk_pattern="FFFSSSFS"),
      dict(index_topk_freq=4, index_skip_topk_offset=3),
    ],
  )
  def test_layers_that_share_an_indexer(self, said):
    cfg = parse(**self.GLM, **said)
    assert cfg.indexer_types == self.FULL
    assert cfg.index_rope_interleaved

  @pytest.mark.parametrize(
    "said",
    [
      dict(indexer_types=list(FULL), index_topk_pattern="FFFFFFFF"),
      dict(indexer_types=list(FULL), index_topk_freq=2),
      dict(index_topk_pattern="FFFSSSFS", index_topk_freq=1),
      dict(indexer_types=list(FULL[:7])),
      dict(index_topk_pattern="FFFSSSFX"),
      dict(index_topk_freq=True),
    ],
  )
  def test_what_contradicts_itself(self, said):
    with pytest.raises(ValueError, match=f"config.json: .*{[*said][-1]}"):
      parse(**self.GLM, **said)

  def test_by_default_each_has_one(self):
    cfg = parse(**self.GLM, indexer_rope_interleave=False)
    assert cfg.indexer_types == ()
    assert not cfg.index_rope_interleaved


class TestWritten:
  @pytest.mark.parametrize(
    "cfg",
    [
      config_lib.v32_671b(),
      dataclasses.replace(
        config_lib.tiny(),
        index_rope_interleaved=True,
        indexer_types=("full", "full", "shared", "full"),
      ),
      dataclasses.replace(
        config_lib.tiny(), yarn=dsa_jax.YarnConfig(factor=2.5, mscale=0.7)
      ),
    ],
    ids=["released", "glm", "yarn"],
  )
  def test_is_read_as_the_same(self, cfg):
    cfg = dataclasses.replace(cfg, dtype="bfloat16", param_dtype="bfloat16")
    raw = config_json.to_json(cfg, "fp8", None)
    names = {f"model.layers.{cfg.num_layers}.enorm.weight"}
    assert config_json.parse(raw, None, names) == cfg
    assert raw["quantization_config"] == folders.FP8

  def test_keeps_what_has_no_bearing(self):
    like = folders.CONFIG | {"quantization_config": folders.FP8}
    cfg = parse()
    raw = config_json.to_json(cfg, "bf16", like)
    assert raw["bos_token_id"] == 0
    assert raw["rope_scaling"] == folders.CONFIG["rope_scaling"]
    assert "quantization_config" not in raw

  def test_leaves_out_what_is_unknown_here(self):
    """At any depth: another reader would take it for what the model is."""
    rope = folders.ROPE_SCALING | {"short_factor": [1.0]}
    fp8 = folders.FP8 | {"ignored_layers": ["lm_head"]}
    like = folders.CONFIG | {"chat": "yes", "rope_scaling": rope}
    like |= {"quantization_config": fp8}
    told = "without .*: chat, quantization_config.ignored_layers, rope_scaling"
    with pytest.warns(UserWarning, match=told):
      raw = config_json.to_json(parse(), "fp8", like)
    assert "chat" not in raw
    assert raw["rope_scaling"] == folders.ROPE_SCALING
    assert raw["quantization_config"] == folders.FP8

  @pytest.mark.parametrize("interleaved", [True, False])
  def test_other_indexers_replace_the_old(self, interleaved):
    said = dict(index_topk_freq=2, index_skip_topk_offset=1)
    like = folders.CONFIG | said | dict(model_type="glm_moe_dsa")
    cfg = parse(**said, model_type="glm_moe_dsa")
    raw = config_json.to_json(cfg, "bf16", like)
    assert raw["indexer_types"] == ["full", "shared", "full"]
    assert raw["index_topk_freq"] == 2
    cfg = dataclasses.replace(
      cfg, indexer_types=(), index_rope_interleaved=interleaved
    )
    raw = config_json.to_json(cfg, "bf16", like)
    assert "index_topk_freq" not in raw
    assert config_json.parse(raw, None, MTP) == cfg

  def test_dsa_replaces_full_attention(self):
    said = dict(model_type="deepseek_v3", layer_types=["full_attention"] * 3)
    cfg = parse(**said)
    raw = config_json.to_json(cfg, "bf16", folders.CONFIG | said)
    assert "layer_types" not in raw
    assert config_json.parse(raw, None, MTP) == cfg

  def test_longer_contexts_replace_the_old(self):
    cfg = parse()
    yarn = dataclasses.replace(cfg.yarn, factor=8.0)
    cfg = dataclasses.replace(cfg, yarn=yarn)
    raw = config_json.to_json(cfg, "bf16", folders.CONFIG)
    assert raw["rope_scaling"]["factor"] == 8.0
    assert raw["max_position_embeddings"] == 512
