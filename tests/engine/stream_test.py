"""Samples as they come: their pieces make the whole, up to a stop text."""

import dataclasses
import itertools

import pytest

from dsa_jax.chat import tokenizer as tokenizer_lib
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import SamplingParams
from tests.engine import engines
from tests.model import models

CFG = dataclasses.replace(models.CONFIG, vocab_size=264)
TOKENIZER = tokenizer_lib.load_tokenizer("bytes")


def engine():
  return engines.engine(CFG, tokenizer=TOKENIZER)


def hot(seed, **kwargs):
  """Random bytes: few are whole characters."""
  params = SamplingParams(temperature=8.0, seed=seed, max_tokens=40, **kwargs)
  return Request(TOKENIZER.encode("prompt"), params)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_make_the_whole(seed):
  running = engine()
  other = running.submit(hot(99))
  handle = running.submit(hot(seed))
  tokens, text = [], ""
  for delta in handle.stream():
    assert delta.tokens or delta.text
    tokens += delta.tokens
    text += delta.text
  (result,) = handle.results()
  assert tokens == result.tokens.tolist()
  assert text == result.text == TOKENIZER.decode(result.tokens)
  assert len(other.results()[0].tokens) == 40


def test_a_stop_text_ends_a_sample_and_frees_its_slot():
  (whole,) = engine().submit(hot(1)).results()
  text = whole.text
  assert text is not None
  stop = text[9:11]
  running = engine()
  handle = running.submit(hot(1, stop=(stop, "never seen")))
  pieces = [delta.text for delta in handle.stream()]
  (result,) = handle.results()
  assert "".join(pieces) == result.text == text[: text.index(stop)]
  assert result.finish == "stop"
  used = len(result.tokens)
  assert result.tokens.tolist() == whole.tokens[:used].tolist()
  assert TOKENIZER.decode(result.tokens).startswith(f"{result.text}{stop}")
  while running.step():
    pass
  assert running.stats.running == 0
  assert running.stats.free_pages == 768 // 4


def test_samples_stream_side_by_side():
  params = dataclasses.replace(hot(5).params, n=3)
  request = Request(TOKENIZER.encode("prompt"), params)
  handle = engine().submit(request)
  texts, counts = [""] * 3, [0] * 3
  for deltas in itertools.zip_longest(*(handle.stream(i) for i in range(3))):
    for i, delta in enumerate(deltas):
      if delta is not None:
        texts[i] += delta.text
        counts[i] += len(delta.tokens)
  results = handle.results()
  assert texts == [r.text for r in results]
  assert counts == [len(r.tokens) for r in results] == [40] * 3
  assert len(set(texts)) == 3


def test_a_stream_that_is_cancelled_shows_all_that_there_is():
  handle = engine().submit(hot(7))
  text = ""
  for i, delta in enumerate(handle.stream()):
    text += delta.text
    if i == 1:
      handle.cancel()
  (result,) = handle.results()
  assert result.finish == "cancelled"
  assert text == result.text == TOKENIZER.decode(result.tokens)
