"""Folders of checkpoints: several files, bf16, and what is refused."""

import json
import pathlib
import shutil

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import dsa_jax

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "deepseek_v32_tiny"


@pytest.fixture
def folder(tmp_path):
  shutil.copy(GOLDEN / "config.json", tmp_path)
  return tmp_path


@pytest.fixture(scope="module")
def tensors():
  return load_file(GOLDEN / "model.safetensors")


def parameters(model):
  return nnx.to_pure_dict(nnx.state(model))


def edit(folder, **keys):
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_several_files_in_bfloat16(folder, tensors):
  names = sorted(tensors)
  for i, part in enumerate((names[::2], names[1::2])):
    half = {n: tensors[n].astype(jnp.bfloat16) for n in part}
    save_file(half, folder / f"model-0000{i + 1}-of-00002.safetensors")
  arrays = parameters(dsa_jax.load_hf(folder, dtype=jnp.bfloat16))
  head = arrays["head"]["w_DV"]
  assert head.dtype == jnp.bfloat16
  expected = tensors["lm_head.weight"].astype(jnp.bfloat16).T
  np.testing.assert_array_equal(head, expected)
  # The router's bias and the indexer's head weights stay in fp32.
  layers = arrays["moe_layers"]
  assert layers["ffn"]["router"]["bias_E"].dtype == jnp.float32
  assert layers["attention"]["indexer"]["w_DM"].dtype == jnp.float32


def test_the_dtype_of_the_config_is_the_default(folder, tensors):
  save_file(tensors, folder / "model.safetensors")
  assert dsa_jax.load_hf(folder).config.dtype == "float32"


def test_mtp_is_read_where_it_is(folder, tensors):
  more = dict(tensors)
  for name, tensor in tensors.items():
    if name.startswith("model.layers.3."):
      more[name.replace("layers.3", "layers.4")] = tensor * 2
  rng = np.random.default_rng(0)
  mtp = "model.layers.4."
  more[mtp + "eh_proj.weight"] = np.float32(rng.normal(size=(64, 128)))
  for name in ("enorm", "hnorm", "shared_head.norm"):
    more[f"{mtp}{name}.weight"] = np.float32(rng.normal(size=64))
  more[mtp + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
  save_file(more, folder / "model.safetensors")
  mtp_arrays = parameters(dsa_jax.load_hf(folder))["mtp"]
  join = np.asarray(mtp_arrays["join_XDD"])
  np.testing.assert_array_equal(
    np.concatenate(list(join)), more[mtp + "eh_proj.weight"].T
  )
  np.testing.assert_array_equal(
    mtp_arrays["block"]["ffn"]["router"]["w_DE"],
    2 * tensors["model.layers.3.mlp.gate.weight"].T,
  )


class TestRefusals:
  def test_no_folder(self, tmp_path):
    with pytest.raises(FileNotFoundError, match="safetensors"):
      dsa_jax.load_hf(tmp_path / "none")

  def test_no_config(self, tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="config.json"):
      dsa_jax.load_hf(tmp_path)

  def test_a_missing_tensor(self, folder, tensors):
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    save_file(
      {n: t for n, t in tensors.items() if n != name},
      folder / "model.safetensors",
    )
    with pytest.raises(ValueError, match=name):
      dsa_jax.load_hf(folder)

  def test_a_tensor_too_many(self, folder, tensors):
    extra = {"model.extra.weight": np.ones(3, np.float32)}
    save_file(tensors | extra, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.extra.weight"):
      dsa_jax.load_hf(folder)

  def test_a_wrong_shape(self, folder, tensors):
    wrong = {"lm_head.weight": np.ones((250, 64), np.float32)}
    save_file(tensors | wrong, folder / "model.safetensors")
    with pytest.raises(ValueError, match="head.w_DV"):
      dsa_jax.load_hf(folder)

  @pytest.mark.parametrize(
    ("key", "value"),
    [
      ("quantization_config", {"quant_method": "fp8"}),
      ("model_type", "glm_moe_dsa"),
      ("tie_word_embeddings", True),
      ("scoring_func", "softmax"),
      ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
    ],
  )
  def test_what_would_give_other_numbers(self, folder, tensors, key, value):
    save_file(tensors, folder / "model.safetensors")
    edit(folder, **{key: value})
    with pytest.raises(ValueError, match="is not supported"):
      dsa_jax.load_hf(folder)
