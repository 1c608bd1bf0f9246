"""Pairs planted in the rows, and probes that ask for one at each depth."""

import json
import re
import string

import chex
import numpy as np
import pytest

from dsa_jax.chat import tokenizer as tokenizer_lib
from tests.train.data import corpora
from train.data import corpus as corpus_lib
from train.data import manifest
from train.data import retrieval

PAIR = re.compile(r"\[([a-z]{4})([0-9]{4})\]")


class PairedDigits:
  """Bytes, but two digits of which the second is even are one token."""

  eos_id = 400
  vocab_size = 401

  def encode(self, text):
    pieces = re.findall(r"[0-9][02468]|.", text)
    ids = [256 + int(p) if len(p) == 2 else ord(p) for p in pieces]
    return np.array(ids, np.int32)

  def decode(self, ids):
    pieces = [f"{i - 256:02d}" if i >= 256 else chr(i) for i in map(int, ids)]
    return "".join(pieces)


@pytest.fixture
def retrieval_corpus(tmp_path, monkeypatch):
  """Texts of one letter each, which tells whose they are; few are short."""
  rng = np.random.default_rng(1)
  texts = [c * int(rng.integers(1, 450)) for c in string.ascii_letters]
  toys = {"bytes": tokenizer_lib.ByteTokenizer, "pairs": PairedDigits}
  monkeypatch.setattr(
    tokenizer_lib, "load_tokenizer", lambda name: toys[name]()
  )
  # A toy has no file.
  monkeypatch.setattr(manifest, "of_tokenizer", lambda name, eos_id: eos_id)

  def make(tokenizer="bytes", **config) -> corpus_lib.Corpus:
    return corpora.make(
      tmp_path,
      texts,
      tokenizer=tokenizer,
      retrieval=retrieval.RetrievalConfig(**config),
      heldout_fraction=0.2,
    )

  return make


def letters(subset) -> set[str]:
  return {text[0] for text in corpora.side(subset)}


def rows(corpus, n, *, seq_len=256, batch_size=4, seed=0):
  """The first `n` rows, each a dict of arrays [T]."""
  batches = corpus.batches(seq_len=seq_len, batch_size=batch_size, seed=seed)
  batches = corpora.take(batches, n // batch_size)
  return [
    {name: array[b] for name, array in batch.items()}
    for batch in batches
    for b in range(batch_size)
  ]


def documents(row, name="tokens") -> list[np.ndarray]:
  cuts = np.flatnonzero(np.diff(row["segment_ids"])) + 1
  return np.split(row[name], cuts)


def pairs(corpus, rows) -> set[str]:
  texts = [corpus.tokenizer.decode(row["tokens"]) for row in rows]
  return set(PAIR.findall("".join(texts)))


@pytest.mark.parametrize("tokenizer", ["bytes", "pairs"])
@pytest.mark.parametrize("seq_len", [300, 2000])
def test_each_pair_is_planted_once_and_asked_for_once(
  retrieval_corpus, tokenizer, seq_len
):
  corpus = retrieval_corpus(tokenizer, fraction=1.0)
  in_order = 0
  counts = []
  for row in rows(corpus, 24, seq_len=seq_len):
    *whole, last = documents(row)
    whole += [last] * (len(last) >= 21)
    for document in whole:
      assert document[-1] == corpus.tokenizer.eos_id
      text = corpus.tokenizer.decode(document[:-1])
      found = PAIR.findall(text)
      n = len(found) // 2
      assert n > 0
      planted, asked = found[:n], found[n:]
      assert sorted(planted) == sorted(asked)
      assert len({key for key, _ in planted}) == n
      # The questions are the end; brackets stand nowhere else.
      questions = "".join(f"[{key}{value}]" for key, value in asked)
      assert text.endswith(questions)
      assert text.count("[") == 2 * n
      assert n <= max(1, len(document) // 40)
      in_order += planted == asked
      counts.append(n)
  assert 1 in counts
  assert max(counts) > seq_len // 100
  assert in_order < 0.8 * len(counts)


@pytest.mark.parametrize("tokenizer", ["bytes", "pairs"])
def test_rows_are_full(retrieval_corpus, tokenizer):
  corpus = retrieval_corpus(tokenizer, fraction=1.0, min_tokens=40)
  eos = corpus.tokenizer.eos_id
  rests = 0
  for row in rows(corpus, 60):
    for name, dtype in (
      ("tokens", np.int32),
      ("segment_ids", np.int32),
      ("positions", np.int32),
      ("bytes", np.float32),
    ):
      assert row[name].shape == (256,)
      assert row[name].dtype == dtype
    segment, position = 1, 0
    for t in range(256):
      assert row["segment_ids"][t] == segment
      assert row["positions"][t] == position
      position += 1
      if row["tokens"][t] == eos:
        segment, position = segment + 1, 0
    assert row["tokens"][-1] == eos
    *whole, last = documents(row)
    assert min(map(len, whole), default=40) >= 40
    if len(last) < 21:  # text alone
      rests += 1
      assert "[" not in corpus.tokenizer.decode(last[:-1])
  assert rests > 0


@pytest.mark.parametrize("tokenizer", ["bytes", "pairs"])
def test_filler_is_the_text_of_the_row(retrieval_corpus, tokenizer):
  corpus = retrieval_corpus(tokenizer, fraction=1.0)
  packed = rows(retrieval_corpus(tokenizer), 40)
  (source,) = corpus.sources
  assert letters(source.train).isdisjoint(letters(source.heldout))
  for row, text_row in zip(rows(corpus, 40), packed):
    is_text = text_row["tokens"] != corpus.tokenizer.eos_id
    text = np.resize(text_row["tokens"][is_text], 256)
    rates = np.resize(text_row["bytes"][is_text], 256)
    used = 0
    for ids, text_bytes in zip(documents(row), documents(row, "bytes")):
      decoded = corpus.tokenizer.decode(ids[:-1])
      filler = PAIR.sub("", decoded)
      end = used + len(filler)
      assert filler == corpus.tokenizer.decode(text[used:end])
      assert set(filler) <= letters(source.train)
      # The document's bytes, evenly.
      total = rates[used:end].sum() + len(decoded) - len(filler)
      np.testing.assert_allclose(text_bytes, total / len(ids), rtol=1e-5)
      used = end


def test_lengths_are_log_uniform_and_pairs_uniform():
  config = retrieval.RetrievalConfig(fraction=1.0)
  planter = retrieval.Planter(config, tokenizer_lib.ByteTokenizer())
  rng = np.random.default_rng(0)
  text, text_bytes = np.full(4096, 97, np.int32), np.ones(4096, np.float32)
  made = [planter.plant(text, text_bytes, rng) for _ in range(600)]
  lengths = [len(documents(row)[0]) for row in made]
  counts = []  # of pairs, in a half to a whole row
  for row in made:
    first = documents(row)[0]
    if len(first) >= 2048:
      counts.append((first == ord("[")).sum() // 2)
  assert 64 <= min(lengths) <= 80
  assert 3500 <= max(lengths) <= 4096
  for quantile in (0.25, 0.5, 0.75):  # 64 to 4096 is 6 doublings
    expected = 64 * 2 ** (6 * quantile)
    assert expected / 1.35 <= np.quantile(lengths, quantile) <= expected * 1.35
  assert 1 <= min(counts) <= 5
  assert 46 <= max(counts) <= 93
  assert 20 <= np.median(counts) <= 50


@pytest.mark.parametrize(
  "fraction, batch_size, block, expected",
  [
    (0.0, 4, 8, [0, 0, 0]),
    (0.25, 4, 8, [2, 2, 2]),
    (0.3, 4, 8, [2, 2, 3]),
    (1.0, 4, 8, [8, 8, 8]),
    (0.4, 1, 1, [0, 0, 1, 0, 1] * 2),
  ],
)
def test_share_of_each_block(
  retrieval_corpus, set_block_tokens, fraction, batch_size, block, expected
):
  sizes = dict(n=block * len(expected), seq_len=96, batch_size=batch_size)
  set_block_tokens(block * 96)
  actual = rows(retrieval_corpus(fraction=fraction), **sizes)
  packed = rows(retrieval_corpus(), **sizes)
  planted = np.array([ord("[") in row["tokens"] for row in actual])
  counts = planted.reshape(len(expected), block).sum(1)
  np.testing.assert_array_equal(counts, expected)
  for is_planted, row, text_row in zip(planted, actual, packed):
    if not is_planted:
      chex.assert_trees_all_equal(row, text_row)


def test_draws_hang_on_the_seed_and_the_block_alone(
  retrieval_corpus, set_block_tokens
):
  corpus = retrieval_corpus(fraction=0.5)
  set_block_tokens(8 * 256)
  first, again = rows(corpus, 16), rows(corpus, 16)
  chex.assert_trees_all_equal(first, again)
  blocks = [pairs(corpus, first[:8]), pairs(corpus, first[8:])]
  other = pairs(corpus, rows(corpus, 16, seed=1))
  for some in (*blocks, other):
    assert len(some) > 10
  assert blocks[0].isdisjoint(blocks[1])
  assert other.isdisjoint(blocks[0] | blocks[1])


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 12])
@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_resumes_exactly(retrieval_corpus, set_block_tokens, steps, fraction):
  set_block_tokens(12 * 128)  # 3 batches
  corpus = retrieval_corpus(fraction=fraction)
  make = lambda: corpus.batches(seq_len=128, batch_size=4, seed=0)
  iterator = make()
  corpora.take(iterator, steps)
  saved = json.dumps(iterator.get_state())
  expected = corpora.take(iterator, 9)
  resumed = make()
  resumed.set_state(json.loads(saved))
  assert json.dumps(resumed.get_state()) == saved
  chex.assert_trees_all_equal(corpora.take(resumed, 9), expected)


def test_refuses_other_retrieval(retrieval_corpus):
  def batches(**config):
    corpus = retrieval_corpus(**config)
    return corpus.batches(seq_len=128, batch_size=4, seed=0)

  state = batches(fraction=0.3).get_state()
  for other in (
    dict(),
    dict(fraction=0.4),
    dict(fraction=0.3, key_letters=3),
    dict(fraction=0.3, value_digits=3),
    dict(fraction=0.3, min_tokens=65),
  ):
    with pytest.raises(corpus_lib.DataError, match="same settings"):
      batches(**other).set_state(state)
  batches(fraction=0.3, eval_rows=7).set_state(state)
  # Without retrieval, nothing of it matters.
  state = batches().get_state()
  assert "retrieval" not in state["settings"]
  batches(key_letters=3).set_state(state)


@pytest.mark.parametrize("tokenizer", ["bytes", "pairs"])
@pytest.mark.parametrize("length", [201, 300, 1000])
def test_asks_for_a_pair_at_each_depth(retrieval_corpus, tokenizer, length):
  seq_len = 1000
  corpus = retrieval_corpus(tokenizer, eval_rows=12)
  made = corpus.retrieval_probes(seq_len=seq_len, batch_size=4, length=length)
  decode, encode = corpus.tokenizer.decode, corpus.tokenizer.encode
  sizes, orders, rows = set(), set(), set()
  for probes in made:
    assert probes.tokens.shape == (4, seq_len)
    assert probes.at.shape == (4, 10, 4)
    inside = np.tile(np.arange(seq_len) < length, (4, 1))
    np.testing.assert_array_equal(probes.segment_ids, inside)
    np.testing.assert_array_equal(probes.positions, inside * np.arange(seq_len))
    assert (probes.tokens[~inside] == 0).all()
    np.testing.assert_array_equal(probes.at < 0, probes.answers < 0)
    for tokens, at, answers in zip(probes.tokens, probes.at, probes.answers):
      ids = tokens[:length]
      assert ids[-1] == corpus.tokenizer.eos_id
      text = decode(ids[:-1])
      found = PAIR.findall(text)
      planted, asked = found[:10], found[10:]
      assert sorted(planted) == sorted(asked)
      assert len({key for key, _ in planted}) == 10
      encoded = [
        np.concatenate([encode(f"[{key}"), encode(value), encode("]")])
        for key, value in planted
      ]
      context = length - 1 - sum(map(len, encoded))
      assert set(PAIR.sub("", text)) <= letters(corpus.sources[0].heldout)
      for d, ((key, value), pair) in enumerate(zip(planted, encoded)):
        # Its middle is at its depth of the context.
        (place,) = [
          t
          for t in range(context)
          if np.array_equal(ids[t : t + len(pair)], pair)
        ]
        depth = (place + len(pair) / 2) / context
        assert depth == pytest.approx((d + 0.5) / 10, abs=0.03)
        # Its question ends where the first prediction is to be its value.
        size = len(encode(value))
        sizes.add(size)
        where = at[d, :size]
        np.testing.assert_array_equal(where, where[0] + np.arange(size))
        assert where[0] >= context
        assert decode(ids[: where[0] + 1]).endswith(f"[{key}")
        np.testing.assert_array_equal(ids[where + 1], encode(value))
        np.testing.assert_array_equal(answers[d, :size], encode(value))
        np.testing.assert_array_equal(answers[d, size:], -1)
      orders.add(tuple(np.argsort(at[:, 0])))
      rows.add(ids.tobytes())
  assert sizes == ({4} if tokenizer == "bytes" else {2, 3, 4})
  assert len(rows) == 12
  assert len(orders) > 10


@pytest.mark.parametrize(
  "batch_size, expected", [(1, 8), (3, 9), (8, 8), (16, 16)]
)
def test_probes_in_full_batches(retrieval_corpus, batch_size, expected):
  corpus = retrieval_corpus(eval_rows=8)
  make = lambda: list(
    corpus.retrieval_probes(seq_len=256, batch_size=batch_size, length=256)
  )
  first, again = make(), make()
  assert len(first) * batch_size == expected
  for probes, other in zip(first, again):
    assert len(probes.tokens) == batch_size
    chex.assert_trees_all_equal(vars(probes), vars(other))


def test_rows_do_not_hang_on_the_batch_size(retrieval_corpus):
  corpus = retrieval_corpus(eval_rows=8)
  first, second = [
    np.concatenate(
      [
        probes.tokens
        for probes in corpus.retrieval_probes(
          seq_len=256, batch_size=batch_size, length=256
        )
      ]
    )
    for batch_size in (2, 8)
  ]
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
  "config",
  [
    dict(fraction=-0.1),
    dict(fraction=1.1),
    dict(fraction=float("nan")),
    dict(key_letters=0),
    dict(key_letters=13),
    dict(value_digits=0),
    dict(min_tokens=0),
    dict(eval_rows=0),
  ],
)
def test_config_is_checked(config):
  ((name, value),) = config.items()
  with pytest.raises(corpus_lib.DataError, match=f"{name}={value} must be"):
    retrieval.RetrievalConfig(**config)


def test_too_short_for_a_pair(retrieval_corpus):
  least = r"seq_len=20 .* at least 21, .*raise them, or"
  corpus = retrieval_corpus(fraction=0.1)
  with pytest.raises(corpus_lib.DataError, match=least):
    corpus.batches(seq_len=20, batch_size=1, seed=0)
  for row in rows(retrieval_corpus(fraction=1.0), 20, seq_len=21):
    assert (row["tokens"] == ord("[")).sum() == 2
  retrieval_corpus().batches(seq_len=20, batch_size=1, seed=0)
  corpus = retrieval_corpus(fraction=0.1, min_tokens=20)
  with pytest.raises(corpus_lib.DataError, match="min_tokens=20 .* least 21"):
    corpus.batches(seq_len=96, batch_size=1, seed=0)


def test_few_keys(retrieval_corpus):
  corpus = retrieval_corpus(fraction=1.0, key_letters=1, value_digits=1)
  for row in rows(corpus, 8, seq_len=4000):
    assert (documents(row)[0] == ord("[")).sum() <= 52


def test_probes_are_checked(retrieval_corpus):
  corpus = retrieval_corpus()
  for length in (200, 257):
    with pytest.raises(
      corpus_lib.DataError, match=rf"{length=} must be in \[201, seq_len=256\]"
    ):
      corpus.retrieval_probes(seq_len=256, batch_size=1, length=length)
  with pytest.raises(corpus_lib.DataError, match="must be at least 1"):
    corpus.retrieval_probes(seq_len=256, batch_size=0, length=256)
