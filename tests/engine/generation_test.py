"""`generate`: a batch of prompts through an engine of its own."""

import functools
import inspect

import chex
import jax
import numpy as np
import pytest

import dsa_jax
from tests.model import models

# All of one shape, which is compiled once: K = 8 is exceeded by most tokens.
PROMPTS, NEW = models.tokens(3, 10), 14
PAD = 63  # where it is given


def generate(*args, prompts=PROMPTS, **kwargs) -> np.ndarray:
  tokens = dsa_jax.generate(models.model(), prompts, NEW, *args, **kwargs)
  chex.assert_shape(tokens, (3, 24))
  np.testing.assert_array_equal(tokens[:, :10], prompts)
  return np.asarray(tokens)


@functools.partial(jax.jit, static_argnames="attention")
def logits(model, tokens, attention="sparse"):
  return model(tokens, attention=attention)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_greedy_tokens_are_those_of_the_full_forward(attention):
  tokens = generate(attention=attention)
  expected = np.argmax(logits(models.model(), tokens, attention), -1)
  np.testing.assert_array_equal(tokens[:, 10:], expected[:, 9:-1])


@pytest.mark.slow
def test_padding_is_left_out_wherever_it_stands():
  prompts = np.where(PROMPTS == PAD, 0, PROMPTS)
  prompts[1, 7:] = PAD  # at the end
  prompts[2, [0, 3, 4]] = PAD  # in front and between
  tokens = generate(prompts=prompts, pad_id=PAD)
  closed_up = np.zeros_like(tokens)
  for row, prompt in enumerate(prompts):
    known = prompt[prompt != PAD]
    closed_up[row, : len(known) + NEW] = [*known, *tokens[row, 10:]]
  expected = np.argmax(logits(models.model(), closed_up), -1)
  for row, first in enumerate((10, 7, 7)):
    np.testing.assert_array_equal(
      tokens[row, 10:], expected[row, first - 1 : first - 1 + NEW]
    )


@pytest.mark.slow
def test_samples_follow_the_temperature():
  """The likeliest token is drawn as often as it should be."""
  hits, expected, variance, untempered = 0, 0.0, 0.0, 0.0
  for seed in range(8):
    tokens = generate(0.5, jax.random.key(seed))
    of_all = logits(models.model(), tokens)[:, 9:-1]
    p = np.asarray(jax.nn.softmax(of_all / 0.5))
    hits += (tokens[:, 10:] == p.argmax(-1)).sum()
    expected += p.max(-1).sum()
    variance += (p.max(-1) * (1 - p.max(-1))).sum()
    untempered += np.asarray(jax.nn.softmax(of_all)).max(-1).sum()
  assert abs(hits - expected) < 4 * variance**0.5
  assert expected - untempered > 8 * variance**0.5  # what is right is far off
  again = generate(0.5, jax.random.key(seed))
  np.testing.assert_array_equal(again, tokens)


@pytest.mark.slow
def test_rows_are_sampled_each_by_its_own_key():
  alike = np.repeat(PROMPTS[:1], 3, 0)
  tokens = generate(2.0, jax.random.key(0), prompts=alike)
  assert len({tuple(row) for row in tokens.tolist()}) == 3


@pytest.mark.slow
def test_compiles_once(caplog):
  generate()
  caplog.clear()
  with jax.log_compiles():
    generate(prompts=PROMPTS[::-1])
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


@pytest.mark.parametrize("attention", ["full", None, True])
def test_refuses_ways_to_attend(attention):
  refuse("attention=", attention=attention)


def test_refuses_to_be_compiled():
  with pytest.raises(ValueError, match="outside of jax.jit"):
    jax.jit(lambda x: dsa_jax.generate(models.model(), x, 1))(
      models.tokens(1, 4)
    )


@pytest.mark.slow
def test_a_temperature_near_0_takes_the_likeliest():
  """No logit overflows, whatever it is divided by."""
  expected = generate()
  for temperature in (1e-30, 1e-37, 1e-46):
    tokens = generate(temperature, jax.random.key(0))
    np.testing.assert_array_equal(tokens, expected)


def test_refuses_an_empty_prompt():
  with pytest.raises(ValueError, match="empty"):
    dsa_jax.generate(models.model(), np.zeros((1, 0), np.int32), 1)


def test_refuses_rows_that_do_not_divide():
  with jax.set_mesh(dsa_jax.make_mesh(data=2)):
    refuse("3 prompts do not divide among the 2 devices", models.tokens(3, 4))
