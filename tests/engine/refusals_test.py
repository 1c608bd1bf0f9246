"""What an engine refuses before anything runs; it harms nobody."""

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest

import dsa_jax
from dsa_jax import ranges
from dsa_jax.engine import settings as settings_lib
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import SamplingParams
from tests.engine import engines
from tests.engine.engine_test import same
from tests.model import models


def refuse(match, **kwargs):
  """That no engine is made so; types that tests would refuse go past that."""
  plain = inspect.unwrap(dsa_jax.Engine.__init__)
  sizes = {**engines.SIZES, **kwargs}
  with pytest.raises(ValueError, match=match) as error:
    plain(object.__new__(dsa_jax.Engine), models.model(), **sizes)
  assert "\n" not in str(error.value)


SIZES = ("slots", "pool_tokens", "page", "chunk", "lanes", "steps")


@pytest.mark.parametrize("name", [*SIZES, "max_length"])
@pytest.mark.parametrize("value", [0, -1, 2**40])
def test_sizes(name, value):
  refuse(f"{name}={value if value < 2**32 else ''}", **{name: value})


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [1.5, True, None, "8"])
def test_what_is_no_size(name, value):
  assert ranges.violation(settings_lib.Settings, name, value)


@pytest.mark.parametrize(
  "name, value",
  [
    *(("returns", x) for x in ("kept", ["kept"], ("kept", "logits"), None)),
    *(("attention", x) for x in ("flash", None)),
    *(("index_key_dtype", x) for x in ("bfloat16", "float8_e5m2", 8)),
    *(("latent_dtype", x) for x in ("bfloat16", "float8_e5m2", 8)),
    *(("speculate", x) for x in (1, "yes", None)),
  ],
)
def test_what_is_no_choice(name, value):
  assert ranges.violation(settings_lib.Settings, name, value)


def test_pools_below_what_attention_reads():
  refuse(r"pool_tokens=4 .*top_k=8 keys; give at least 8", pool_tokens=4)
  refuse("pool_tokens=3 are less than a page", pool_tokens=3, attention="dense")


def test_what_is_returned():
  refuse("selects no keys", returns=("selected",), attention="dense")


PROMPT = list(range(10))
BAD: list[tuple[str, list[int], dict[str, Any]]] = [
  ("tokens have shape", [], {}),
  (r"tokens\[1\]=64 is no id", [3, 64], {}),
  (r"tokens\[0\]=-1 is no id", [-1], {}),
  (r"tokens\[2\]=True", [1, 2, True], {}),
  ("10 tokens .* max_tokens=760 .* 768", PROMPT, dict(max_tokens=760)),
  (r"stop_ids\[0\]=64 is no id", PROMPT, dict(stop_ids=(64,))),
  ("top_k=65", PROMPT, dict(top_k=65)),
  ("top_p=0", PROMPT, dict(top_p=0.0)),
  ("top_p=nan", PROMPT, dict(top_p=float("nan"))),
  ("min_p=1.0", PROMPT, dict(min_p=1.0)),
  ("temperature=nan", PROMPT, dict(temperature=float("nan"))),
  ("temperature=-1", PROMPT, dict(temperature=-1.0)),
  ("seed=-1", PROMPT, dict(seed=-1)),
  ("max_tokens=0", PROMPT, dict(max_tokens=0)),
  ("n=0", PROMPT, dict(n=0)),
  ("no tokenizer", PROMPT, dict(stop=("x",))),
]


@pytest.mark.parametrize("match, tokens, params", BAD)
def test_requests(match, tokens, params):
  engine = engines.engine()
  with pytest.raises(ValueError, match=match) as error:
    engine.submit(Request(tokens, SamplingParams(**params)))
  assert "\n" not in str(error.value)
  assert engine.stats.waiting == 0


def test_a_request_that_is_refused_harms_no_other():
  requests = engines.requests(4, seed=3)
  expected = engines.run(engines.engine(), requests)
  engine = engines.engine()
  handles = []
  for request in requests:
    handles.append(engine.submit(request))
    engine.step()
    for _, tokens, params in BAD:
      with pytest.raises(ValueError):
        engine.submit(Request(tokens, SamplingParams(**params)))
  for handle, whole in zip(handles, expected):
    same(handle.results()[0], whole)


def test_of_many_prompts_all_are_refused_or_none():
  engine = engines.engine()
  params = SamplingParams(max_tokens=3)
  with pytest.raises(ValueError, match=r"tokens\[0\]=99"):
    engine.generate([[1], [2], [99]], params)
  assert engine.stats.waiting == 0
  with pytest.raises(ValueError, match="2 prompts, but 1 SamplingParams"):
    engine.generate([[1], [2]], [params])
  assert engine.stats.waiting == 0
  assert engine.stats.decoded_tokens == 0


def test_the_longest_that_fits_runs():
  cfg = dataclasses.replace(models.CONFIG, num_mtp_layers=0)
  engine = dsa_jax.Engine(
    models.model(cfg), slots=2, pool_tokens=32, page=4, chunk=8, steps=5
  )
  request = Request(np.arange(20), SamplingParams(max_tokens=12, seed=0))
  (result,) = engine.submit(request).results()
  assert len(result.tokens) == 12
  assert engine.stats.preemptions == 0
