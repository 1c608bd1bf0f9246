"""The model against an independent implementation's numbers.

tests/golden/*_tiny: transformers 5.23.0 on torch 2.13.0, CPU, fp32.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dsa_jax

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
K = 16


class Golden(NamedTuple):
  """What was expected of a model, and what it gives."""

  full: tuple[int, ...]  # layers with an indexer
  last: int
  expected: dict[str, np.ndarray]
  model: dsa_jax.Transformer
  tokens: jax.Array
  output: Any


@pytest.fixture(
  scope="module",
  params=[
    # A dense layer and three of experts.
    ("deepseek_v32_tiny", (0, 1, 2, 3), 3),
    # The same where layers share an indexer, which rotates neighbours.
    pytest.param(("glm_moe_dsa_tiny", (0, 1, 4), 5), marks=pytest.mark.slow),
  ],
  ids=["deepseek", "glm"],
)
def golden(request) -> Golden:
  name, full, last = request.param
  expected = load_file(FOLDER / name / "expected.safetensors")
  model = dsa_jax.load_hf(FOLDER / name, dtype=jnp.float32)
  tokens = jnp.asarray(expected["input_ids"])
  output = jax.jit(lambda m, t: m.forward(t))(model, tokens)
  return Golden(full, last, expected, model, tokens, output)


def test_logits(golden):
  expected = golden.expected["logits"]
  np.testing.assert_allclose(golden.output.logits, expected, atol=2e-5, rtol=0)


def test_hidden_states(golden):
  assert len(golden.output.hidden) == golden.last + 2
  for i, hidden in enumerate(golden.output.hidden):
    expected = golden.expected[f"hidden.{i}"]
    np.testing.assert_allclose(hidden, expected, atol=2e-5, rtol=0)


def test_selections(golden):
  assert len(golden.output.selected) == golden.last + 1
  for i, selected_BTK in enumerate(golden.output.selected):
    source = max(full for full in golden.full if full <= i)
    expected_BTK = golden.expected[f"selected.{source}"]
    np.testing.assert_array_equal(
      selected_BTK[:, K:], np.sort(expected_BTK)[:, K:]
    )
    for t in range(K):  # a query with few keys reads all of them
      row = [*range(t + 1)] + [-1] * (K - t - 1)
      np.testing.assert_array_equal(selected_BTK[:, t], [row, row])


def test_loss_and_gradients(golden):
  def loss_fn(model):
    losses = model.losses(
      golden.tokens, attention="sparse", lm_loss=True, index_loss=False
    )
    return losses.lm.sum() / (2 * 95)

  loss, grads = jax.jit(jax.value_and_grad(loss_fn, allow_int=True))(
    golden.model
  )
  np.testing.assert_allclose(
    loss, golden.expected["loss"][0], atol=1e-6, rtol=0
  )

  first, moe, last = grads.dense_layers, grads.moe_layers, golden.last
  attention = first.attention
  kv_b_CNX = np.concatenate(
    [attention.k_b_CNH[...][0], attention.v_b_CNU[...][0]], -1
  )
  ours = {
    "lm_head.weight": grads.head.w_DV[...].T,
    "model.embed_tokens.weight": grads.embed.table_VD[...],
    "model.norm.weight": grads.final_norm.scale_D[...],
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (
      attention.kv_a_DX[...][0].T
    ),
    "model.layers.0.self_attn.kv_b_proj.weight": kv_b_CNX.reshape(32, -1).T,
    "model.layers.0.self_attn.q_a_proj.weight": attention.q_a_DQ[...][0].T,
    f"model.layers.{last}.mlp.gate.weight": moe.ffn.router.w_DE[...][-1].T,
    f"model.layers.{last}.mlp.shared_experts.down_proj.weight": (
      moe.ffn.shared.down_FD[...][-1].T
    ),
    f"model.layers.{last}.self_attn.o_proj.weight": (
      moe.attention.out_NUD[...][-1].reshape(-1, 64).T
    ),
  }
  given = {
    name.removeprefix("grad.")
    for name in golden.expected
    if name.startswith("grad.")
  }
  assert set(ours) == given
  for name, grad in ours.items():
    expected = golden.expected[f"grad.{name}"]
    error = np.linalg.norm(grad - expected) / np.linalg.norm(expected)
    assert error < 1e-4, name

  # One norm an expert; gate and up are one matrix there.
  gate_up = np.concatenate(
    [moe.ffn.gate_EDF[...], moe.ffn.up_EDF[...]], -1
  ).reshape(last, 16, -1)
  down = np.asarray(moe.ffn.down_EFD[...]).reshape(last, 16, -1)
  for layer in range(1, last + 1):
    for name, grad in (("gate_up", gate_up), ("down", down)):
      np.testing.assert_allclose(
        np.linalg.norm(grad[layer - 1], axis=-1),
        golden.expected[
          f"gradnorm.model.layers.{layer}.mlp.experts.{name}_proj"
        ],
        rtol=1e-4,
      )


@pytest.mark.slow
def test_greedy_tokens(golden):
  # These were made with token 0 as padding, which DeepSeek's first prompt
  # contains (at 1): it was masked, and the positions closed up.
  prompts = golden.tokens[:, :40]
  actual = dsa_jax.generate(golden.model, prompts, 24, pad_id=0)
  np.testing.assert_array_equal(actual, golden.expected["greedy_ids"])


def test_greedy_tokens_of_a_prompt_without_padding(golden):
  actual = dsa_jax.generate(golden.model, golden.tokens[:, :40], 24)
  np.testing.assert_array_equal(actual[1:], golden.expected["greedy_ids"][1:])


@pytest.mark.slow
def test_greedy_tokens_in_odd_pages_and_chunks(golden):
  """Of 5 and 7 tokens; in calls of 3 steps, and with fewer slots than rows."""
  engine = dsa_jax.Engine(
    golden.model, slots=1, pool_tokens=70, page=5, chunk=7, steps=3
  )
  prompts = np.asarray(golden.tokens[1:, :40])
  params = dsa_jax.SamplingParams(max_tokens=24, temperature=0.0)
  samples = engine.generate([*prompts, *prompts], params)
  for (sample,), expected in zip(
    samples, [*golden.expected["greedy_ids"][1:]] * 2, strict=True
  ):
    np.testing.assert_array_equal(sample.tokens, expected[40:])
