"""The benchmark's command line, on a model that a CPU can do."""

import dataclasses
import json
import sys
import types
from typing import Any

import pytest

from dsa_jax import config as config_lib
from dsa_jax.engine.bench import __main__ as bench

TINY = dataclasses.replace(config_lib.tiny(), num_mtp_layers=0)
ARGS = types.SimpleNamespace(
  steps=2, chunk=16, speculate=False, index_key_dtype=None, latent_dtype=None
)
DRAFTS = types.SimpleNamespace(**vars(ARGS) | {"speculate": True})


def run(monkeypatch, capsys, *options) -> list[dict[str, Any]]:
  """The rows that it prints after its own settings."""
  monkeypatch.setattr(sys, "argv", ["bench", *options, "--model=tiny"])
  bench.main()
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]


def failed(monkeypatch, capsys, *options) -> str:
  """What it says as it ends with exit code 1, and nothing of Python's."""
  with pytest.raises(SystemExit) as e:
    run(monkeypatch, capsys, *options)
  said = str(e.value.code)  # a text: Python prints it, and exits with 1
  assert said.startswith("error: ")
  return said
