"""The engine's benchmark, whole, on a model that a CPU can do."""

import json
import sys
from typing import Any

import jaxtyping
import pytest

from dsa_jax.engine import bench


def run(monkeypatch, capsys, *options) -> list[dict[str, Any]]:
  """The rows that it prints after its own settings."""
  monkeypatch.setattr(sys, "argv", ["bench", *options, "--model=tiny"])
  bench.main()
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]


@pytest.fixture
def unchecked():
  """What is lowered has shapes for arrays."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
  "more",
  [[], ["--speculate"], ["--index-key-dtype=float8_e4m3fn"]],
  ids=["", "drafts", "8 bits"],
)
def test_steps_are_timed_at_each_length(monkeypatch, capsys, more):
  lengths = ["--lengths", "128", "384", "--slots", "2", "--steps=2"]
  short, long = run(monkeypatch, capsys, "decode", *lengths, *more)
  assert (short["length"], long["length"]) == (128, 384)
  for row in short, long:
    assert row["ms_a_step"] > 0
    if "--speculate" in more:  # of a model with random weights, a few are right
      assert 1 < row["tokens_a_step"] < 2
    else:
      assert row["tokens_a_step"] == 1
    assert row["aliased_mb"] >= row["pool_mb"]
  assert long["pool_mb"] == pytest.approx(3 * short["pool_mb"], abs=0.2)
  # Slots, tokens, layers and bytes: of latents, rotated and index keys.
  layers, keys = 5 if "--speculate" in more else 4, 4 * (32 + 16)
  keys += 32 + 4 if "--index-key-dtype=float8_e4m3fn" in more else 4 * 32
  assert long["pool_mb"] == round(2 * 384 * layers * keys / 1e6, 1)


@pytest.mark.slow
def test_prompts_are_timed(monkeypatch, capsys):
  (row,) = run(monkeypatch, capsys, "prefill", "--lengths=100", "--chunk=64")
  assert row["ms"] > 0
  (row,) = run(monkeypatch, capsys, "group", "--lengths=100", "--chunk=64")
  assert row["times"] == pytest.approx(row["apart_s"] / row["together_s"], 0.1)


@pytest.mark.slow
def test_a_load_is_done_whole(monkeypatch, capsys):
  sizes = ["--prompts=3", "--samples=2", "--prompt=9", "--mean=8"]
  sizes += ["--longest=64", "--steps=4", "--chunk=8", "--slots=2"]
  (row,) = run(monkeypatch, capsys, "load", *sizes)
  # 6 samples of 8 tokens in the mean, each rounded down.
  assert 6 * 7 <= row["tokens"] <= 6 * 8
  assert row["calls"] >= row["tokens"] / (2 * 4)


@pytest.mark.slow
def test_the_host_is_watched(monkeypatch, capsys):
  sizes = ["--lengths=256", "--slots=2", "--steps=4", "--chunk=64"]
  (row,) = run(monkeypatch, capsys, "host", *sizes)
  assert 0 < row["ms_of_the_host"]
  assert row["late"].endswith(f" of {bench._CALLS} calls")


@pytest.mark.parametrize(
  "options, said",
  [
    (["decode", "--lengths", "0"], "0 is no whole number above 0"),
    (["decode", "--slots", "²"], "² is no whole number above 0"),
    (["decode", "--lengths", "200"], "multiples of 128 above 113"),
    (["host", "--lengths", "768"], "multiples of 128 above 769"),
    (["group", "--speculate"], "--speculate is for decode, not for group"),
    (["host", "--attention=dense"], "for decode and prefill, not for host"),
    (["load", "--sigma=nan"], "--sigma=nan is not from 0 to 4"),
    (["load", "--longest=100"], "--longest=100: a sample of"),
    (["prefill", "--chunk=70000"], "chunk=70000"),
    (["prefill", "--latent-dtype=float8_e4m3fn"], "kv_rank=32, no multiple"),
  ],
)
def test_what_cannot_be_timed_is_refused(monkeypatch, capsys, options, said):
  with pytest.raises(SystemExit) as e:
    run(monkeypatch, capsys, *options)
  assert e.value.code == 2
  assert said in capsys.readouterr().err
