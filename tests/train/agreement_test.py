"""python -m train.agreement: caches in 8 bits beside the plain one."""

import dataclasses
import json
import sys

import numpy as np
import pytest

import dsa_jax
from tests.model import models
from tests.train import runs
from train import agreement

MODEL = dataclasses.replace(
  runs.ONE_LAYER, dtype="float32", num_layers=2, kv_rank=128, init_std=0.2
)
SIZES = {"prompts": 3, "length": 40, "max-tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A Hugging Face folder with a tokenizer beside it, and a text."""
  folder = tmp_path_factory.mktemp("agreement")
  dsa_jax.save_hf(models.model(MODEL), folder / "hf", format="float32")
  runs.write_text(folder)
  return folder


@pytest.fixture
def call(monkeypatch, capsys, folder):
  """Runs the program; gives its lines, or what it says against it."""
  monkeypatch.setattr(agreement.trained.Trained, "tokenizer", "bytes")

  def call(**said):
    options = SIZES | {"text": folder / "0.txt"} | said
    args = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["agreement", str(folder / "hf"), *args])
    try:
      agreement.main()
    except SystemExit as e:
      return e.code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

  return call


@pytest.mark.slow
def test_each_cache_is_compared_with_the_plain_one(call):
  plain, index_keys, latents, both = call()
  assert plain == dict(
    cache="plain", nats=0, nats_worse=0, selected=1, tokens=24
  )
  # The first layer selects by what attention has not touched; keys of both.
  for row in index_keys, latents, both:
    assert 0 < row["nats"] < 1 and abs(row["nats_worse"]) <= row["nats"]
    assert 0.5 < row["selected"] < 1 and row["tokens"] < 24
  assert index_keys["selected"] < latents["selected"]


def result(log_probs, tokens, selected) -> dsa_jax.Result:
  """Of a prompt of 4 tokens and 3 that follow."""
  nothing = np.zeros(3, np.float32)
  return dsa_jax.Result(
    prompt=np.zeros(4, np.int32),
    tokens=np.array(tokens, np.int32),
    text=None,
    log_probs=nothing,
    untruncated=nothing,
    finish="length",
    versions=np.zeros(3, np.int32),
    cached_tokens=0,
    prompt_log_probs=np.array(log_probs, np.float32),
    kept=None,
    experts=None,
    selected=np.array(selected, np.int32),
    preemptions=0,
  )


def test_what_two_results_share_is_counted():
  """Of the keys, those of the prompt's one query that sees more than 2."""
  start, end = [[[0, -1]] * 2, [[0, 1]] * 2], [[[0, 1]] * 2] * 3
  a = result([-1, -2, -3], [5, 6, 7], [*start, [[0, 2], [1, 2]], *end])
  end = [[[1, 2]] * 2] * 3
  b = result([-2, -2, -2], [5, 8, 7], [*start, [[0, 1], [1, 2]], *end])
  found = agreement._compare(a, b, 2)
  np.testing.assert_allclose(found, (2 / 3, 0, 3 / 4, 1))


@pytest.mark.parametrize(
  "said, wrong",
  [
    ({"prompts": 99}, "--prompts=99 of --length=40 take 3960; lower one"),
    ({"text": "/no/file"}, "/no/file"),
    ({"length": 0}, "--length=0 must be at least 1"),
    (
      {"length": MODEL.top_k + 1},
      f"--length={MODEL.top_k + 1}: the model selects top_k={MODEL.top_k} keys",
    ),
  ],
)
def test_what_cannot_be_compared_is_told_in_a_line(call, said, wrong):
  found = call(**said)
  assert isinstance(found, str) and wrong in found and "\n" not in found
