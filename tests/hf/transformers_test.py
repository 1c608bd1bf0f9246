"""transformers reads what is written here; runs where it and torch are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dsa_jax
from tests.hf.folders import GOLDEN

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v32_tiny", "glm_moe_dsa_tiny"])
def test_gives_our_logits(tmp_path, name):
  source = GOLDEN.parent / name
  model = dsa_jax.load_hf(source)
  dsa_jax.save_hf(
    model, tmp_path / "out", format="float32", max_shard_size="1MB"
  )
  theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out",
    dtype=torch.float32,
    attn_implementation="eager",
    output_loading_info=True,
  )
  assert not found["missing_keys"] and not found["unexpected_keys"]
  tokens = load_file(source / "expected.safetensors")["input_ids"]
  with torch.no_grad():
    expected = theirs(torch.asarray(tokens).long()).logits
  actual = jax.jit(lambda m, t: m(t))(model, jnp.asarray(tokens))
  np.testing.assert_allclose(actual, expected.numpy(), atol=2e-5, rtol=0)
