"""Folders of checkpoints: several files, bf16, and what is refused."""

import json
import shutil
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import dsa_jax
from tests.hf import folders
from tests.hf.folders import GOLDEN


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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="lm_head.weight.*needs"):
      dsa_jax.load_hf(folder)

  def test_a_config_of_another_model(self, folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    edit(folder, scoring_func="softmax")
    with pytest.raises(ValueError, match="scoring_func='softmax' is not"):
      dsa_jax.load_hf(folder)

  def test_a_missing_scale(self, tmp_path):
    found = folders.tensors("fp8")
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    del found[name]
    folders.write(tmp_path, found)
    with pytest.raises(ValueError, match=f"F8_E4M3, but there is no {name}"):
      dsa_jax.load_hf(tmp_path)

  def test_a_scale_of_other_blocks(self, tmp_path):
    found = folders.tensors("fp8")
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    found[name] = np.ones((3, 1), np.float32)
    folders.write(tmp_path, found)
    with pytest.raises(ValueError, match=rf"{name} .*\[3, 1\].*\[2, 1\]"):
      dsa_jax.load_hf(tmp_path)

  @pytest.mark.parametrize(
    ("name", "dtype"),
    [("model.norm.weight", "float8_e4m3fn"), ("lm_head.weight", "float16")],
  )
  def test_other_quantisations(self, tmp_path, name, dtype):
    found = folders.tensors("bf16")
    found[name] = found[name].astype(dtype)
    folders.write(tmp_path, found)
    with pytest.raises(ValueError, match=f"{name} in .*-of-00003.safetensors"):
      dsa_jax.load_hf(tmp_path)


class TestGolden:
  """The independent implementation's logits, whatever way the weights came."""

  def logits(self, model):
    tokens = jnp.asarray(self.expected()["input_ids"])
    return jax.jit(lambda m, t: m(t))(model, tokens)

  def expected(self):
    return load_file(GOLDEN / "expected.safetensors")

  @pytest.mark.slow
  def test_several_files_onto_a_mesh(self, folder, tensors):
    names = sorted(tensors)
    for i in range(3):
      part = {n: tensors[n] for n in names[i::3]}
      save_file(part, folder / f"model-0000{i + 1}-of-00003.safetensors")
    mesh = dsa_jax.make_mesh(expert=2, context=2, tensor=2)
    model = dsa_jax.load_hf(folder, mesh=mesh)
    moe: Any = model.moe_layers
    gate = moe.ffn.gate_EDF[...]
    assert gate.sharding.mesh == mesh
    assert gate.addressable_shards[0].data.size * 8 == gate.size
    with jax.set_mesh(mesh):
      logits = self.logits(model)
    np.testing.assert_allclose(
      logits, self.expected()["logits"], atol=2e-5, rtol=0
    )

  @pytest.mark.slow
  @pytest.mark.parametrize("form", ["bf16", "fp8"])
  def test_rounded_weights(self, folder, tmp_path, tensors, form):
    """A folder in this format, and the same rounded weights in float32."""
    rounded, stored = {}, {}
    rng = np.random.default_rng(0)
    for name, x in tensors.items():
      quantises = x.ndim == 2 and not any(
        part in name
        for part in ("embed", "lm_head", "gate.weight", "weights_proj")
      )
      if name.endswith("bias") and "correction" in name:
        rounded[name] = stored[name] = x
      elif form == "fp8" and quantises:
        pair = folders.quantised(name, x, rng, "any")
        stored |= pair
        scale = np.kron(pair[name + "_scale_inv"], np.ones((128, 128)))
        scale = scale[: x.shape[0], : x.shape[1]].astype(np.float32)
        rounded[name] = pair[name].astype(np.float32) * scale
      else:
        stored[name] = x.astype(ml_dtypes.bfloat16)
        rounded[name] = stored[name].astype(np.float32)
    save_file(rounded, folder / "model.safetensors")
    raw = json.loads((GOLDEN / "config.json").read_text())
    other = tmp_path / form
    folders.write(other, stored, parts=4)
    (other / "config.json").write_text(json.dumps(raw))
    expected = dsa_jax.load_hf(folder)
    actual = dsa_jax.load_hf(other, dtype="float32")
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
      np.testing.assert_array_equal(x, y)
    # Near the golden logits, but for selections that rounding turns over.
    error = np.abs(self.logits(actual) - self.expected()["logits"])
    assert np.median(error) < {"bf16": 0.1, "fp8": 0.2}[form]


class TestWithoutIndexer:
  """DeepSeek-V3 and V3.1."""

  @pytest.fixture
  def v3(self, tmp_path):
    found = folders.tensors("fp8", indexer=False)
    folders.write(tmp_path / "v3", found, model_type="deepseek_v3")
    return tmp_path / "v3"

  @pytest.mark.parametrize("stage", [None, "sparse"])
  def test_is_refused_where_keys_are_chosen(self, v3, stage):
    with pytest.raises(ValueError, match='stage="warmup"'):
      dsa_jax.load_hf(v3, stage=stage)

  @pytest.mark.slow
  def test_warmup_begins_with_a_new_one(self, v3, tmp_path):
    with pytest.warns(UserWarning, match="has no indexer: it gets a new one"):
      model = dsa_jax.load_hf(v3, stage="warmup")
    moe: Any = model.moe_layers
    indexer = moe.attention.indexer
    assert 0.01 < np.std(indexer.q_QMI[...].astype(jnp.float32)) < 0.03
    np.testing.assert_array_equal(indexer.k_norm.scale_D[...], 1)
    # The rest is that of a folder with an indexer.
    folders.write(tmp_path / "v32", folders.tensors("fp8", indexer=True))
    dsa_jax.save_hf(model, tmp_path / "out", format="fp8")
    written = folders.read(tmp_path / "out")
    rest = {n: x for n, x in written.items() if ".indexer." not in n}
    folders.assert_same(rest, folders.tensors("fp8", indexer=False))
    assert written.keys() == folders.tensors("fp8").keys()
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == "deepseek_v32"


def test_copies_of_the_mtp_layer_that_differ_are_told(tmp_path):
  found = folders.tensors("bf16")
  name = "model.layers.3.embed_tokens.weight"
  found[name] = found[name] * 2
  folders.write(tmp_path, found)
  with pytest.warns(UserWarning, match="embed_tokens.weight differs from"):
    dsa_jax.load_hf(tmp_path)
