"""A checkpoint comes back bit for bit, and has the released one's tensors."""

import collections
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import dsa_jax
from dsa_jax import config as config_lib
from dsa_jax.hf import save
from tests.hf import folders


@pytest.mark.parametrize(
  ("form", "scales"),
  [
    pytest.param("float32", "F32", marks=pytest.mark.slow),
    ("bf16", "F32"),
    ("fp8", "F32"),
    ("fp8", "any"),
    ("fp8", "E8M0"),
  ],
)
def test_comes_back_bit_for_bit(tmp_path, form, scales):
  found = folders.tensors(form, scales=scales)
  folders.write(tmp_path / "in", found)
  model = dsa_jax.load_hf(
    tmp_path / "in", dtype="float32" if form == "float32" else None
  )
  dsa_jax.save_hf(model, tmp_path / "out", format=form, max_shard_size="300KB")
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
  folders.assert_same(folders.read(tmp_path / "out"), found)
  before = json.loads((tmp_path / "in" / "config.json").read_text())
  after = json.loads((tmp_path / "out" / "config.json").read_text())
  before["torch_dtype"] = "float32" if form == "float32" else "bfloat16"
  assert before.items() <= after.items()
  again = dsa_jax.load_hf(tmp_path / "out")
  assert again.config == model.config
  for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(model)):
    np.testing.assert_array_equal(x, y)


def test_a_changed_weight_is_quantised_anew(tmp_path):
  found = folders.tensors("fp8", scales="any")
  folders.write(tmp_path / "in", found)
  model = dsa_jax.load_hf(tmp_path / "in")
  moe: Any = model.moe_layers
  gate = moe.ffn.gate_EDF
  # One weight, far larger than its block's scale allows.
  gate[...] = gate[...].at[1, 2, 130, 3].set(1000.0)
  dsa_jax.save_hf(model, tmp_path / "out", format="fp8")
  actual = folders.read(tmp_path / "out")
  name = "model.layers.2.mlp.experts.2.gate_proj.weight"
  scale = actual.pop(name + "_scale_inv")
  expected_scale = found.pop(name + "_scale_inv")
  assert scale[0, 1] == 4.0 != expected_scale[0, 1]  # 1000 / 448, rounded up
  np.testing.assert_array_equal(scale[:, 0], expected_scale[:, 0])
  weight, expected = actual.pop(name), found.pop(name)
  assert float(weight[3, 130]) * 4.0 == 1024.0  # the nearest e4m3
  np.testing.assert_array_equal(weight[:, :128], expected[:, :128])
  folders.assert_same(actual, found)


def test_without_the_folder_it_came_from(tmp_path):
  folders.write(tmp_path / "in", folders.tensors("fp8"))
  model = dsa_jax.load_hf(tmp_path / "in")
  (tmp_path / "in").rename(tmp_path / "moved")
  with pytest.warns(UserWarning, match="is gone"):
    dsa_jax.save_hf(model, tmp_path / "out", format="fp8")
  again = dsa_jax.load_hf(tmp_path / "out")
  for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(model)):
    np.testing.assert_array_equal(x, y)  # another scale, the same weights


def test_what_belongs_to_a_model_comes_along(tmp_path):
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  for name in ("tokenizer.json", "chat_template.jinja"):
    (tmp_path / "in" / name).write_text(name)
  (tmp_path / "in" / "encoding").mkdir()
  (tmp_path / "in" / "encoding" / "chat.py").write_text("chat")
  model = dsa_jax.load_hf(tmp_path / "in")
  dsa_jax.save_hf(model, tmp_path / "out")
  assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
  assert (tmp_path / "out" / "encoding" / "chat.py").read_text() == "chat"
  assert (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.slow
def test_tensors_are_those_of_the_release(tmp_path):
  raw = dict(
    hidden_size=7168,
    num_attention_heads=128,
    vocab_size=129280,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    num_hidden_layers=61,
    index_n_heads=64,
    index_head_dim=128,
    first_k_dense_replace=3,
    intermediate_size=18432,
    n_routed_experts=256,
    moe_intermediate_size=2048,
    n_shared_experts=1,
  )
  expected = {}
  for name, (kind, shape) in folders.shapes(raw).items():
    dtype = {"fp8": "float8_e4m3fn", "f32": "float32"}.get(kind, "bfloat16")
    if name.endswith("weights_proj.weight"):
      dtype = "float32"  # as it is trained; bf16 where the release has it
    expected[name] = (dtype, shape)
    if kind == "fp8":
      blocks = tuple(-(-size // 128) for size in shape)
      expected[name + "_scale_inv"] = ("float32", blocks)
  export = save.Export(config_lib.v32_671b(), tmp_path, "fp8", 5 * 10**9, None)
  names = export.plan(lambda place: pytest.fail(f"{place} was read"))
  specs = [spec for i in range(len(names)) for spec in export.specs(i)]
  assert {s.name: (s.dtype.name, s.shape) for s in specs} == expected
  # DeepSeek-V3's index has 91,991; seven more for each of 62 indexers.
  assert len(specs) == len(expected) == 91_991 + 7 * 62
  sizes = collections.Counter()
  for i, name in enumerate(names):
    assert name == f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
    sizes[name] += sum(spec.size for spec in export.specs(i))
  assert max(sizes.values()) <= 5 * 10**9
  assert sum(sizes.values()) == pytest.approx(690e9, rel=0.01)
  assert not any(pathlib.Path(tmp_path).iterdir())


@pytest.mark.parametrize("size", ["", "5 apples", "0GB", -1, "5TB5"])
def test_refuses_sizes_that_are_none(tmp_path, size):
  with pytest.raises(ValueError, match="max_shard_size"):
    save.parse_size(size)


def test_refuses_a_folder_with_something_in_it(tmp_path):
  folders.write(tmp_path / "in", folders.tensors("bf16"))
  model = dsa_jax.load_hf(tmp_path / "in")
  with pytest.raises(ValueError, match="is not empty"):
    dsa_jax.save_hf(model, tmp_path / "in")
