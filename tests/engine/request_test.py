"""Requests: what is admitted, what is refused, and in which words."""

import copy
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.engine import request as request_lib

Request, SamplingParams = request_lib.Request, request_lib.SamplingParams
ENGINE: dict[str, Any] = dict(vocab=100, max_length=48, has_tokenizer=True)


def check(tokens, options=None, **engine):
  given: dict[str, Any] = {"max_tokens": 8} | (options or {})
  params = SamplingParams(**given)
  request_lib.check(Request(tokens, params), **ENGINE | engine)


@pytest.mark.parametrize(
  "tokens",
  [
    [1, 2, 99],
    (1, 2, 99),
    [np.int8(1), np.uint64(2), np.array(99)],
    np.array([1, 2, 99]),
    np.array([1, 2, 99], np.uint8),
    np.array([1, 2, 99], ">i8"),
    np.array([1, 0, 2, 0, 99])[::2],
    jnp.array([1, 2, 99]),
    range(1, 100, 49),
  ],
)
def test_prompts(tokens):
  request = Request(tokens)
  assert request.tokens.dtype == np.int32
  assert request.tokens.tolist() == [1, tokens[1], 99]
  check(tokens)


def test_a_prompt_is_the_requests_own():
  given = np.array([1, 2, 3], np.int32)
  request = Request(given)
  given[0] = 9
  assert request.tokens.tolist() == [1, 2, 3]
  with pytest.raises(ValueError, match="read-only"):
    request.tokens[0] = 9
  with pytest.raises(dataclasses.FrozenInstanceError):
    request.tokens = given  # pyrefly: ignore[read-only]
  other = dataclasses.replace(request, params=SamplingParams(n=2))
  assert other.tokens.tolist() == [1, 2, 3]
  assert other != request
  assert request == request


@pytest.mark.parametrize(
  "tokens, message",
  [
    ([], r"shape \(0,\).*at least one token"),
    (np.zeros(0, np.int64), r"shape \(0,\)"),
    (np.zeros((2, 3), np.int64), r"shape \(2, 3\).*not \[P\]"),
    (jnp.zeros((1, 3), int), r"shape \(1, 3\)"),
    (np.array(3), r"shape \(\)"),
    ([1, True], r"tokens\[1\]=True is no id"),
    ([1, np.True_], r"tokens\[1\]=np.True_ is no id"),
    ([1, 2.0], r"tokens\[1\]=2.0 is no id"),
    ([1, np.float32(2)], r"tokens\[1\]=np.float32\(2.0\) is no id"),
    ([1, [2]], r"tokens\[1\]=\[2\] is no id"),
    ([1, np.array([2])], r"tokens\[1\]=array\(\[2\]\) is no id"),
    ([1, None], r"tokens\[1\]=None is no id"),
    ([1, "2"], r"tokens\[1\]='2' is no id"),
    ([1, np.timedelta64(1, "s")], r"tokens\[1\]=.* is no id"),
    ([1, -1], r"tokens\[1\]=-1 is no id"),
    ([1, 2**31], r"tokens\[1\]=2147483648 is no id"),
    ([1, 10**40], r"tokens\[1\]=2\^132 or more is no id"),
    ([1, -(10**40)], r"tokens\[1\]=-2\^132 or more is no id"),
    (np.array([1, -1], np.int8), r"tokens\[1\]=.*-1.* is no id"),
    (np.array([1, 2**63], np.uint64), r"tokens\[1\]=.* is no id"),
    (np.array([2**32 + 1]), r"tokens\[0\]=.* is no id"),
    ("123", "tokens='123' must be a list or an array of whole numbers"),
    (b"123", "must be a list or an array"),
    ({1, 2}, "must be a list or an array"),
    ({1: 2}, "must be a list or an array"),
    (None, "must be a list or an array"),
    (np.array([1, 2], object), "must be a list or an array"),
    (np.array([1.0, 2.0]), "must be a list or an array"),
    (np.array([True]), "must be a list or an array"),
    (np.array([1], "m8[s]"), "must be a list or an array"),
    (jnp.zeros(3), "must be a list or an array"),
    (jnp.zeros(3, jnp.bfloat16), "must be a list or an array"),
    (iter([1, 2]), "must be a list or an array"),
  ],
)
def test_what_is_no_prompt(tokens, message):
  with pytest.raises(ValueError, match=message) as e:
    Request(tokens)
  assert "\n" not in str(e.value)
  assert len(str(e.value)) < 300


@pytest.mark.parametrize(
  "options, engine, message",
  [
    (
      dict(stop_ids=(1, 100)),
      {},
      r"stop_ids\[1\]=100 is no id: .* 100, from 0",
    ),
    (
      dict(top_k=101),
      {},
      "top_k=101 is above the vocabulary's 100.*0 keeps all",
    ),
    (
      dict(max_tokens=46),
      {},
      "3 .* max_tokens=46 are more than the 48 .* a slot",
    ),
    (dict(stop=("x",)), dict(has_tokenizer=False), r"stop=\('x',\) are texts"),
    ({}, dict(vocab=98), r"tokens\[1\]=98 is no id: the vocabulary has 98"),
  ],
)
def test_what_an_engine_cannot_do(options, engine, message):
  with pytest.raises(ValueError, match=message) as e:
    check([97, 98, 99], options, **engine)
  assert "\n" not in str(e.value)


def test_the_most_an_engine_can_do():
  check(
    [97, 98, 99], dict(max_tokens=45, top_k=100, stop_ids=(0, 99), stop=("x",))
  )
  check([1, 2, 3], dict(max_tokens=61), max_length=64)
  check([1, 2, 3], has_tokenizer=False)


@pytest.mark.parametrize(
  "name, value",
  [
    *(("max_tokens", x) for x in (0, -1, True, 2.0, 2**31, None, "1")),
    *(("temperature", x) for x in (-0.1, float("nan"), float("inf"), 2e6, "1")),
    *(("temperature", x) for x in (True, None, 10**40)),
    *(("top_k", x) for x in (-1, 1.0, None)),
    *(("top_p", x) for x in (0, 0.0, 1e-45, 1.1, float("nan"), -1)),
    *(("min_p", x) for x in (-0.1, 1, 1 - 1e-12, float("nan"))),
    *(("seed", x) for x in (-1, 2**32, 1.0, True, "1")),
    *(("stop_ids", x) for x in ([1], (-1,), (True,), (1.0,), 1, (1,) * 9)),
    *(("stop", x) for x in ("x", ["x"], ("",), (1,), ("\0",), ("x",) * 65)),
    *(("n", x) for x in (0, 1025, 1.0)),
    *(("prompt_log_probs", x) for x in (1, None)),
  ],
)
def test_what_are_no_params(name, value):
  params = copy.copy(SamplingParams())
  object.__setattr__(params, name, value)  # jaxtyping checks types in tests
  with pytest.raises(ValueError, match=f"^{name}=.* must be ") as e:
    params.__post_init__()
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "options",
  [
    dict(temperature=0),
    dict(temperature=1e6, top_p=1, min_p=0),
    dict(top_p=1e-6, min_p=0.999, n=1024, seed=2**32 - 1, max_tokens=1),
    dict(stop_ids=tuple(range(8)), stop=("x",) * 64, seed=0),
  ],
)
def test_params(options):
  params = SamplingParams(**options)
  assert {name: getattr(params, name) for name in options} == options


def test_seeds():
  many = request_lib.seeds(SamplingParams(seed=7, n=1024))
  assert many[0] == 7
  assert len(set(many)) == 1024
  assert all(type(x) is int and 0 <= x < 2**32 for x in many)
  assert request_lib.seeds(SamplingParams(seed=7, n=3)) == many[:3]
  assert request_lib.seeds(SamplingParams(seed=7)) == [7]
  # Neighbours share none, unlike seed + j.
  others = request_lib.seeds(SamplingParams(seed=8, n=1024))
  assert len(set(many) & set(others)) <= 1
  fresh = [request_lib.seeds(SamplingParams(n=2)) for _ in range(4)]
  assert len({x for pair in fresh for x in pair}) == 8


def test_equal_draws_are_made_again(monkeypatch):
  """Two samples of a request are never the same by chance."""

  class Sequence:
    def __init__(self, entropy):
      self.entropy = entropy

    def generate_state(self, n):
      return np.array([self.entropy, 5, 5, 6, 7, 8][:n], np.uint32)

  monkeypatch.setattr(np.random, "SeedSequence", Sequence)
  assert request_lib.seeds(SamplingParams(seed=3, n=3)) == [3, 5, 6]


def test_a_result_has_matching_shapes():
  arrays: dict[str, Any] = dict(
    prompt=np.zeros(3, np.int32),
    tokens=np.zeros(2, np.int32),
    log_probs=np.zeros(2, np.float32),
    untruncated=np.zeros(2, np.float32),
    versions=np.zeros(2, np.int32),
    prompt_log_probs=np.zeros(2, np.float32),
    kept=(np.array([0, 1, 3]), np.zeros(3, np.int32)),
    experts=np.zeros((4, 2, 8), np.uint8),
    selected=np.zeros((4, 3, 16), np.int32),
  )
  rest: dict[str, Any] = dict(
    text=None, finish="stop", cached_tokens=0, preemptions=0
  )
  request_lib.Result(**arrays, **rest)
  for name in ("log_probs", "versions", "prompt_log_probs", "experts"):
    wrong: dict[str, Any] = {name: np.repeat(arrays[name], 2, 0)}
    with pytest.raises(TypeError, match=name):
      request_lib.Result(**arrays | wrong, **rest)
