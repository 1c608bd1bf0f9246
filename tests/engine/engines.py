"""Engines, prompts and the teacher-forced forward that the tests here share."""

import functools
from typing import Any

import jax
import numpy as np

from dsa_jax.engine.engine import Engine
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import Result
from dsa_jax.engine.request import SamplingParams
from tests.model import models

# K = 8: most queries choose. A page, a chunk and a call end in odd places.
SIZES: dict[str, Any] = dict(
  slots=6, pool_tokens=768, page=4, chunk=12, steps=5
)
LONGEST = 64


def engine(cfg=models.CONFIG, **kwargs) -> Engine:
  """An engine; those of the same sizes share their compiled programs."""
  sizes: dict[str, Any] = {**SIZES, "returns": ("kept", "experts"), **kwargs}
  return Engine(models.model(cfg), **sizes)


def requests(count: int, seed: int = 0, **kwargs) -> list[Request]:
  """Ragged ones: prompts of 1 to 50 tokens, every kind of sampling."""
  rng = np.random.default_rng(seed)
  found = []
  for i in range(count):
    params: dict = dict(max_tokens=int(rng.integers(1, 13)), seed=i)
    params["temperature"] = float(rng.choice([0, 0.3, 1, 2]))
    params["top_k"] = int(rng.choice([0, 0, 5, 30]))
    params["top_p"] = float(rng.choice([1, 1, 0.9, 0.5]))
    params["min_p"] = float(rng.choice([0, 0, 0.05]))
    if i % 5 == 0:
      params["stop_ids"] = tuple(map(int, rng.choice(64, 8, replace=False)))
    length = int(rng.integers(1, 51))
    tokens = rng.integers(0, models.CONFIG.vocab_size, length)
    found.append(Request(tokens, SamplingParams(**{**params, **kwargs})))
  return found


def run(engine: Engine, requests: list[Request]) -> list[Result]:
  """The first sample of each."""
  handles = [engine.submit(request) for request in requests]
  return [handle.results()[0] for handle in handles]


@functools.partial(jax.jit, static_argnames="attention")
def _logits(model, tokens, segment_ids, attention):
  return model(tokens, segment_ids=segment_ids, attention=attention)


def logits(sequences, model=None, attention="sparse") -> np.ndarray:
  """Teacher-forced, [sequences, LONGEST, V]: the forward pass of training."""
  rows = -(-len(sequences) // 8) * 8
  tokens = np.zeros((rows, LONGEST), np.int32)
  segments = np.zeros((rows, LONGEST), np.int32)
  for i, sequence in enumerate(sequences):
    tokens[i, : len(sequence)] = sequence
    segments[i, : len(sequence)] = 1
  model = models.model() if model is None else model
  parts = [
    _logits(model, tokens[i : i + 8], segments[i : i + 8], attention)
    for i in range(0, rows, 8)
  ]
  return np.concatenate(parts)[: len(sequences)]


def log_softmax(x: np.ndarray) -> np.ndarray:
  x = x.astype(np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))
