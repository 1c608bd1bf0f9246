"""An engine whose cache is in 8 bits: what it rounds, and that it does so once.

Equal results are compared in bfloat16, to the last bit: its rounding hides in
which order sums are added. Where float32 sums differ in their last bit, now and
then a number rounds to the other neighbour in 8 bits, an eighth away.
"""

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np
import pytest

from dsa_jax import indexer
from dsa_jax import mla
from dsa_jax.engine import request as request_lib
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import SamplingParams
import pallas_kernels
from pallas_kernels import crossover
from tests.engine import engines
from tests.engine.engine_test import expected_log_probs
from tests.engine.engine_test import same
from tests.kernels import eight_bits
from tests.model import models

BF16 = dataclasses.replace(models.WIDE, dtype="bfloat16")
BOTH = models.EIGHT_BITS
INDEX = {"index_key_dtype": "float8_e4m3fn"}
LATENT = {"latent_dtype": "float8_e4m3fn"}


def callback(f, x):
  return jax.pure_callback(f, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.fixture
def teach(monkeypatch):
  """Lets forward passes of training round their keys as NumPy does."""
  project, call = mla.MLA._project, indexer.Indexer.__call__

  def rounded_rows(self, x, frame):
    *queries, kv = project(self, x, frame)
    C = self.cfg.kv_rank
    return *queries, callback(lambda x: eight_bits.rounded_latents(x, C), kv)

  def rounded_index(self, *args):
    index = call(self, *args)
    q, k = (callback(eight_bits.rounded_index, x) for x in (index.q, index.k))
    return pallas_kernels.Index(q, k, index.w)

  def teach(index_key_dtype=None, latent_dtype=None):
    if latent_dtype is not None:
      monkeypatch.setattr(mla.MLA, "_project", rounded_rows)
    if index_key_dtype is not None:
      monkeypatch.setattr(indexer.Indexer, "__call__", rounded_index)

    # A function of its own: others have been compiled without.
    def logits(model, tokens, segment_ids, attention):
      return model(tokens, segment_ids=segment_ids, attention=attention)

    monkeypatch.setattr(
      engines, "_logits", jax.jit(logits, static_argnames="attention")
    )

  return teach


def errors(results, requests, attention):
  """Of each token's log-prob over the whole vocabulary, against training's."""
  expected = expected_log_probs(
    results, requests, model=models.model(models.WIDE), attention=attention
  )
  return np.concatenate(
    [
      np.abs(result.untruncated - untruncated)
      for result, (_, untruncated, _) in zip(results, expected)
    ]
  )


@pytest.mark.parametrize(
  "dtypes, speculate, attention",
  [
    (BOTH, True, "sparse"),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (INDEX, False, "sparse"),
        (LATENT, False, "sparse"),
        (BOTH, False, "dense"),
        (BOTH, False, "expanded"),
      )
    ),
  ],
)
def test_log_probs_are_those_of_keys_that_numpy_rounds(
  teach, monkeypatch, dtypes, speculate, attention
):
  if attention == "expanded":  # as long chunks of prompts are attended
    monkeypatch.setattr(crossover, "expanding_is_faster", lambda T: T > 1)
    attention = "dense"
  requests = engines.requests(24, seed=5, temperature=1.0)
  engine = engines.engine(
    models.WIDE, speculate=speculate, attention=attention, **dtypes
  )
  results = engines.run(engine, requests)
  off = errors(results, requests, attention)
  assert np.median(off) > 0.02
  teach(**dtypes)
  off = errors(results, requests, attention)
  # More only after numbers that round the other way, in a few sequences.
  assert np.quantile(off, 0.7) < 1e-5
  assert off.max() < 0.01


def requests(count, max_tokens=20):
  """In any order of lengths, all kinds of sampling."""
  made = engines.requests(count, seed=4, max_tokens=max_tokens, stop_ids=())
  return [Request(request.tokens[:24], request.params) for request in made]


@functools.cache
def expected(count):
  """What those requests get where there is room for all."""
  return engines.run(engines.engine(BF16, **BOTH), requests(count))


def assert_same(found, wanted):
  for a, b in zip(found, wanted, strict=True):
    same(a, b)


def test_sequences_that_lose_their_pages_go_on_as_if_they_had_not():
  engine = engines.engine(BF16, pool_tokens=64, **BOTH)
  assert_same(engines.run(engine, requests(12)), expected(12))
  assert engine.stats.preemptions > 3


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(chunk=5), dict(page=8), dict(steps=1)])
def test_no_size_changes_anything(sizes):
  engine = engines.engine(BF16, **sizes, **BOTH)
  assert_same(engines.run(engine, requests(6)), expected(6))


@pytest.mark.slow
def test_drafts_change_nothing():
  engine = engines.engine(BF16, speculate=True, **BOTH)
  assert_same(engines.run(engine, requests(6)), expected(6))
  assert engine.stats.drafts > 30


@pytest.mark.parametrize(
  "speculate", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_what_is_found_is_what_was_computed(speculate):
  """The whole prompt, and a part of it."""
  prompt = np.random.default_rng(0).integers(0, 64, 33)
  params = SamplingParams(max_tokens=9, seed=5)
  other = np.append(prompt[:22], [1, 2, 3])
  engine = engines.engine(BF16, speculate=speculate, **BOTH)
  first = engines.run(engine, [Request(prompt, params)])
  again = engines.run(engine, [Request(prompt, params)])
  part = engines.run(engine, [Request(other, params)])
  assert (again[0].cached_tokens, part[0].cached_tokens) == (32, 20)
  assert_same(again, first)
  alone = engines.engine(BF16, speculate=speculate, **BOTH)
  assert_same(part, engines.run(alone, [Request(other, params)]))


def test_samples_of_a_prompt_go_on_from_copies_of_its_last_page():
  prompt = np.random.default_rng(1).integers(0, 64, 18)  # pages of 4
  params = SamplingParams(max_tokens=9, seed=3, n=4)
  engine = engines.engine(BF16, **BOTH)
  results = engine.submit(Request(prompt, params)).results()
  assert engine.stats.prefill_tokens == 17
  for seed, result in zip(request_lib.seeds(params), results, strict=True):
    alone = SamplingParams(max_tokens=9, seed=seed)
    engine = engines.engine(BF16, **BOTH)
    assert_same([result], engines.run(engine, [Request(prompt, alone)]))


@pytest.mark.slow
def test_no_row_of_older_weights_is_read():
  other = models.model(dataclasses.replace(BF16, init_std=0.22))
  engine = engines.engine(BF16, **BOTH)
  before = engines.run(engine, requests(6))
  engine.swap_weights(nnx.split(other)[1], version=1)
  after = engines.run(engine, requests(6))
  assert not np.array_equal(before[0].log_probs, after[0].log_probs)
  fresh = engines.engine(dataclasses.replace(BF16, init_std=0.22), **BOTH)
  assert_same(after, engines.run(fresh, requests(6)))


@pytest.mark.parametrize(
  "dtypes, widths, named",
  [
    (LATENT, dict(kv_rank=96), "latent_dtype=.* kv_rank=96"),
    (INDEX, dict(index_head_dim=24), "index_key_dtype=.* index_head_dim=24"),
  ],
)
def test_widths_that_cannot_be_rounded_are_refused(dtypes, widths, named):
  cfg = dataclasses.replace(models.WIDE, **widths)
  with pytest.raises(ValueError, match=f"{named}.*leave it out") as error:
    engines.engine(cfg, **dtypes)
  assert "\n" not in str(error.value)
