"""Decoding equals teacher forcing, below and above K tokens."""

import functools
import inspect

import chex
import jax
import numpy as np
import pytest

import dsa_jax
from dsa_jax import cache as cache_lib
from tests.model import models


@functools.partial(jax.jit, static_argnames="attention")
def logits(model, tokens, attention="sparse"):
  return model(tokens, attention=attention)


@jax.jit
def decode(model, tokens, cache):
  return model.decode(tokens, cache)


@pytest.mark.parametrize(
  "attention", ["sparse", pytest.param("dense", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  "prefill",
  [
    pytest.param(1, marks=pytest.mark.slow),
    pytest.param(5, marks=pytest.mark.slow),
    12,
  ],
)
def test_logits_equal_the_full_forward(attention, prefill):
  # K = 8: 5 tokens are prefilled below it and 12 above.
  model, tokens = models.model(), models.tokens(2, 24)
  full = logits(model, tokens, attention)
  cache = cache_lib.make_cache(models.CONFIG, 2, 24, attention=attention)
  last, cache = decode(model, tokens[:, :prefill], cache)
  np.testing.assert_allclose(last, full[:, prefill - 1], atol=1e-4, rtol=0)
  for t in range(prefill, 24):
    last, cache = decode(model, tokens[:, t : t + 1], cache)
    np.testing.assert_allclose(last, full[:, t], atol=1e-4, rtol=0)


def test_the_cache_holds_the_latent_and_the_index_key_alone():
  cfg = models.CONFIG
  cache = cache_lib.make_cache(cfg, 2, 24)
  sizes = {x.shape for x in jax.tree.leaves(cache.layers)}
  width = cfg.kv_rank + cfg.rope_head_dim
  assert sizes == {(3, 2, 24, width), (3, 2, 24, cfg.index_head_dim)}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_greedy_tokens_are_those_of_the_full_forward(attention):
  model, prompt = models.model(), models.tokens(2, 10)
  tokens = np.asarray(dsa_jax.generate(model, prompt, 14, attention=attention))
  chex.assert_shape(tokens, (2, 24))
  np.testing.assert_array_equal(tokens[:, :10], prompt)
  expected = np.argmax(logits(model, tokens, attention), -1)
  np.testing.assert_array_equal(tokens[:, 10:], expected[:, 9:-1])


@pytest.mark.slow
def test_padding_is_left_out_wherever_it_stands():
  model, prompt = models.model(), models.tokens(3, 12)
  pad = 63
  prompt = np.where(prompt == pad, 0, prompt)
  ragged = prompt.copy()
  ragged[1, 9:] = pad  # at the end
  ragged[2, [0, 3, 4]] = pad  # in front and between
  tokens = np.asarray(dsa_jax.generate(model, ragged, 8, pad_id=pad))
  whole = dsa_jax.generate(model, ragged[:1], 8)
  np.testing.assert_array_equal(tokens[0, 12:], whole[0, 12:])
  alone = ragged[1:][ragged[1:] != pad].reshape(2, 9)
  expected = dsa_jax.generate(model, alone, 8)
  np.testing.assert_array_equal(tokens[1:, 12:], expected[:, 9:])


@pytest.mark.slow
def test_samples_follow_the_temperature():
  model = models.model()
  prompt = np.repeat(models.tokens(1, 4), 512, 0)
  rng = jax.random.key(0)
  tokens = np.asarray(dsa_jax.generate(model, prompt, 1, 2.0, rng))[:, -1]
  p = np.asarray(jax.nn.softmax(logits(model, prompt[:1])[0, -1] / 2.0))
  frequency = np.bincount(tokens, minlength=64) / 512
  np.testing.assert_allclose(frequency, p, atol=5 * np.sqrt(p.max() / 512))
  assert np.corrcoef(frequency, p)[0, 1] > 0.8
  again = dsa_jax.generate(model, prompt, 1, 2.0, rng)
  np.testing.assert_array_equal(again[:, -1], tokens)


@pytest.mark.slow
def test_compiles_once(caplog):
  model, prompt = models.model(), models.tokens(2, 10)
  with jax.log_compiles(False):
    dsa_jax.generate(model, prompt, 14)  # as for the greedy tokens
  caplog.clear()
  with jax.log_compiles():
    dsa_jax.generate(model, prompt + 1 - prompt.min(), 14)
  assert "jax._src.dispatch" not in {x.name for x in caplog.records}


def refuse(named, tokens=None, max_new_tokens=1, **kwargs):
  """That `generate` refuses these arguments; types that jaxtyping would refuse
  in tests go past it."""
  tokens = models.tokens(2, 4) if tokens is None else tokens
  plain = inspect.unwrap(dsa_jax.generate)
  with pytest.raises(ValueError, match=named) as error:
    plain(models.model(), tokens, max_new_tokens, **kwargs)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 2**20 + 1, 10**12, 1.0, True, "4"])
def test_refuses_numbers_of_tokens(value):
  refuse("max_new_tokens=", max_new_tokens=value)


@pytest.mark.parametrize(
  "value", [-1.0, np.nan, np.inf, -np.inf, 1e7, None, "hot", True]
)
def test_refuses_temperatures(value):
  refuse("temperature=", temperature=value, rng=jax.random.key(0))


@pytest.mark.parametrize(
  "rng", [None, 0, np.zeros(2, np.uint32), jax.random.split(jax.random.key(0))]
)
def test_refuses_what_is_no_key(rng):
  refuse("rng=", temperature=1.0, rng=rng)


@pytest.mark.parametrize("bad", [-1, 64, 2**31, -(2**31)])
def test_refuses_ids_outside_the_vocabulary(bad):
  tokens = models.tokens(3, 5).astype(np.int64)
  tokens[1, 3] = bad
  refuse(rf"tokens\[1, 3\]={bad} is no id: the vocabulary has 64", tokens)
  refuse("pad_id=", pad_id=bad)


@pytest.mark.parametrize("rows", [[0], [2], [1, 2]])
def test_refuses_padding_alone(rows):
  tokens = models.tokens(3, 5)
  tokens = np.where(tokens == 63, 0, tokens)
  tokens[rows] = 63
  refuse(f"row {rows[0]} of the tokens is padding alone", tokens, pad_id=63)


@pytest.mark.parametrize(
  "tokens",
  [
    np.ones((1, 4), np.float32),
    np.ones((1, 4), bool),
    np.ones((1, 4), "timedelta64[s]"),
    jax.numpy.ones((1, 4), "int4"),
    jax.random.split(jax.random.key(0), (1, 4)),
    [[1, 2]],
    "text",
    np.ones(4, np.int32),
    np.ones((1, 1, 4), np.int32),
    np.ones((0, 4), np.int32),
    np.ones((1, 0), np.int32),
  ],
)
def test_refuses_what_are_no_prompts(tokens):
  refuse("whole numbers|empty or not", tokens)


@pytest.mark.slow
def test_a_temperature_near_0_takes_the_likeliest():
  """No logit overflows, whatever it is divided by."""
  model, prompt = models.model(), models.tokens(2, 10)
  rng = jax.random.key(0)
  expected = dsa_jax.generate(model, prompt, 4)
  for temperature in (1e-30, 1e-37, 1e-46):
    tokens = dsa_jax.generate(model, prompt, 4, temperature, rng)
    np.testing.assert_array_equal(tokens, expected)


def test_refuses_an_empty_prompt():
  with pytest.raises(ValueError, match="empty"):
    dsa_jax.generate(models.model(), np.zeros((1, 0), np.int32), 1)


@pytest.mark.parametrize(
  ("batch", "size", "attention", "named"),
  [
    (0, 4, "sparse", "batch=0"),
    (-1, 4, "sparse", "batch=-1"),
    (1, 0, "sparse", "size=0"),
    (1, 2.0, "sparse", "size=2.0"),
    (1, 2**62, "sparse", "size=4611686018427387904"),
    (True, 4, "sparse", "batch=True"),
    (1, 4, "full", "attention='full'"),
  ],
)
def test_refuses_caches(batch, size, attention, named):
  plain = inspect.unwrap(cache_lib.make_cache)
  with pytest.raises(ValueError, match=named):
    plain(models.CONFIG, batch, size, attention=attention)


def test_refuses_rows_that_do_not_divide():
  with jax.set_mesh(dsa_jax.make_mesh(data=2)):
    refuse("3 prompts do not divide among the 2 devices", models.tokens(3, 4))


def test_refuses_to_share_a_token_among_devices():
  with jax.set_mesh(dsa_jax.make_mesh(context=2)):
    with pytest.raises(ValueError, match="seq=None"):
      dsa_jax.generate(models.model(), models.tokens(2, 4), 1)
