import json
import re
import string
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from dsa_jax.chat import tokenizer as tokenizer_lib
from tests.train.data import corpus_test
from train.data import corpus as corpus_lib
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


class RetrievalTestCase(corpus_test.DataTestCase):
  def retrieval_corpus(self, tokenizer="bytes", **config) -> corpus_lib.Corpus:
    """Texts of one letter each, which tells whose they are; few are short."""
    rng = np.random.default_rng(1)
    texts = [c * int(rng.integers(1, 450)) for c in string.ascii_letters]
    toys = {"bytes": tokenizer_lib.ByteTokenizer, "pairs": PairedDigits}
    with mock.patch.object(
      tokenizer_lib, "load_tokenizer", lambda name: toys[name]()
    ):
      return self.corpus(
        texts,
        tokenizer=tokenizer,
        retrieval=retrieval.RetrievalConfig(**config),
        heldout_fraction=0.2,
      )

  def letters(self, subset) -> set[str]:
    return {text[0] for text in corpus_test.side(subset)}


def rows(corpus, n, *, seq_len=256, batch_size=4, seed=0):
  """The first `n` rows, each a dict of arrays [T]."""
  batches = corpus.batches(seq_len=seq_len, batch_size=batch_size, seed=seed)
  batches = corpus_test.take(batches, n // batch_size)
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


class TrainingRowsTest(RetrievalTestCase):
  @parameterized.product(tokenizer=["bytes", "pairs"], seq_len=[300, 2000])
  def test_each_pair_is_planted_once_and_asked_for_once(
    self, tokenizer, seq_len
  ):
    corpus = self.retrieval_corpus(tokenizer, fraction=1.0)
    in_order = 0
    counts = []
    for row in rows(corpus, 24, seq_len=seq_len):
      *whole, last = documents(row)
      whole += [last] * (len(last) >= 21)
      for document in whole:
        self.assertEqual(document[-1], corpus.tokenizer.eos_id)
        text = corpus.tokenizer.decode(document[:-1])
        found = PAIR.findall(text)
        n = len(found) // 2
        self.assertGreater(n, 0)
        planted, asked = found[:n], found[n:]
        self.assertCountEqual(planted, asked)
        self.assertLen({key for key, _ in planted}, n)
        # The questions are the end; brackets stand nowhere else.
        questions = "".join(f"[{key}{value}]" for key, value in asked)
        self.assertTrue(text.endswith(questions))
        self.assertEqual(text.count("["), 2 * n)
        self.assertLessEqual(n, max(1, len(document) // 40))
        in_order += planted == asked
        counts.append(n)
    self.assertIn(1, counts)
    self.assertGreater(max(counts), seq_len // 100)
    self.assertLess(in_order, 0.8 * len(counts))

  @parameterized.parameters("bytes", "pairs")
  def test_rows_are_full(self, tokenizer):
    corpus = self.retrieval_corpus(tokenizer, fraction=1.0, min_tokens=40)
    eos = corpus.tokenizer.eos_id
    rests = 0
    for row in rows(corpus, 60):
      for name, dtype in (
        ("tokens", np.int32),
        ("segment_ids", np.int32),
        ("positions", np.int32),
        ("bytes", np.float32),
      ):
        self.assertEqual(row[name].shape, (256,))
        self.assertEqual(row[name].dtype, dtype)
      segment, position = 1, 0
      for t in range(256):
        self.assertEqual(row["segment_ids"][t], segment)
        self.assertEqual(row["positions"][t], position)
        position += 1
        if row["tokens"][t] == eos:
          segment, position = segment + 1, 0
      self.assertEqual(row["tokens"][-1], eos)
      *whole, last = documents(row)
      self.assertGreaterEqual(min(map(len, whole), default=40), 40)
      if len(last) < 21:  # text alone
        rests += 1
        self.assertNotIn("[", corpus.tokenizer.decode(last[:-1]))
    self.assertGreater(rests, 0)

  @parameterized.parameters("bytes", "pairs")
  def test_filler_is_the_text_of_the_row(self, tokenizer):
    corpus = self.retrieval_corpus(tokenizer, fraction=1.0)
    packed = rows(self.retrieval_corpus(tokenizer), 40)
    self.assertNoCommonElements(
      self.letters(corpus.sources[0].train),
      self.letters(corpus.sources[0].heldout),
    )
    for row, text_row in zip(rows(corpus, 40), packed):
      is_text = text_row["tokens"] != corpus.tokenizer.eos_id
      text = np.resize(text_row["tokens"][is_text], 256)
      rates = np.resize(text_row["bytes"][is_text], 256)
      used = 0
      for ids, text_bytes in zip(documents(row), documents(row, "bytes")):
        decoded = corpus.tokenizer.decode(ids[:-1])
        filler = PAIR.sub("", decoded)
        end = used + len(filler)
        self.assertEqual(filler, corpus.tokenizer.decode(text[used:end]))
        self.assertLessEqual(set(filler), self.letters(corpus.sources[0].train))
        # The document's bytes, evenly.
        total = rates[used:end].sum() + len(decoded) - len(filler)
        np.testing.assert_allclose(text_bytes, total / len(ids), rtol=1e-5)
        used = end

  def test_lengths_are_log_uniform_and_pairs_uniform(self):
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
    self.assertBetween(min(lengths), 64, 80)
    self.assertBetween(max(lengths), 3500, 4096)
    for quantile in (0.25, 0.5, 0.75):  # 64 to 4096 is 6 doublings
      expected = 64 * 2 ** (6 * quantile)
      self.assertBetween(
        np.quantile(lengths, quantile), expected / 1.35, expected * 1.35
      )
    self.assertBetween(min(counts), 1, 5)
    self.assertBetween(max(counts), 46, 93)
    self.assertBetween(np.median(counts), 20, 50)

  @parameterized.parameters(
    dict(fraction=0.0, batch_size=4, block=8, expected=[0, 0, 0]),
    dict(fraction=0.25, batch_size=4, block=8, expected=[2, 2, 2]),
    dict(fraction=0.3, batch_size=4, block=8, expected=[2, 2, 3]),
    dict(fraction=1.0, batch_size=4, block=8, expected=[8, 8, 8]),
    dict(fraction=0.4, batch_size=1, block=1, expected=[0, 0, 1, 0, 1] * 2),
  )
  def test_share_of_each_block(self, fraction, batch_size, block, expected):
    sizes = dict(n=block * len(expected), seq_len=96, batch_size=batch_size)
    self.set_block_tokens(block * 96)
    actual = rows(self.retrieval_corpus(fraction=fraction), **sizes)
    packed = rows(self.retrieval_corpus(), **sizes)
    planted = np.array([ord("[") in row["tokens"] for row in actual])
    counts = planted.reshape(len(expected), block).sum(1)
    np.testing.assert_array_equal(counts, expected)
    for is_planted, row, text_row in zip(planted, actual, packed):
      if not is_planted:
        self.assert_batches_equal(row, text_row)

  def test_draws_hang_on_the_seed_and_the_block_alone(self):
    corpus = self.retrieval_corpus(fraction=0.5)
    self.set_block_tokens(8 * 256)
    first, again = rows(corpus, 16), rows(corpus, 16)
    for row, other in zip(first, again):
      self.assert_batches_equal(row, other)
    blocks = [pairs(corpus, first[:8]), pairs(corpus, first[8:])]
    other = pairs(corpus, rows(corpus, 16, seed=1))
    for some in (*blocks, other):
      self.assertGreater(len(some), 10)
    self.assertNoCommonElements(*blocks)
    self.assertNoCommonElements(blocks[0] | blocks[1], other)


class ResumeTest(RetrievalTestCase):
  @parameterized.product(steps=[0, 1, 2, 3, 7, 12], fraction=[0.3, 1.0])
  def test_exact(self, steps, fraction):
    self.set_block_tokens(12 * 128)  # 3 batches
    corpus = self.retrieval_corpus(fraction=fraction)
    make = lambda: corpus.batches(seq_len=128, batch_size=4, seed=0)
    iterator = make()
    corpus_test.take(iterator, steps)
    saved = json.dumps(iterator.get_state())
    expected = corpus_test.take(iterator, 9)
    resumed = make()
    resumed.set_state(json.loads(saved))
    self.assertEqual(json.dumps(resumed.get_state()), saved)
    for actual, batch in zip(corpus_test.take(resumed, 9), expected):
      self.assert_batches_equal(actual, batch)

  def test_refuses_other_retrieval(self):
    def batches(**config):
      corpus = self.retrieval_corpus(**config)
      return corpus.batches(seq_len=128, batch_size=4, seed=0)

    state = batches(fraction=0.3).get_state()
    for other in (
      dict(),
      dict(fraction=0.4),
      dict(fraction=0.3, key_letters=3),
      dict(fraction=0.3, value_digits=3),
      dict(fraction=0.3, min_tokens=65),
    ):
      with self.assertRaisesRegex(corpus_lib.DataError, "same settings"):
        batches(**other).set_state(state)
    batches(fraction=0.3, eval_rows=7).set_state(state)
    # Without retrieval, nothing of it matters.
    state = batches().get_state()
    self.assertNotIn("retrieval", state["settings"])
    batches(key_letters=3).set_state(state)


class ProbesTest(RetrievalTestCase):
  @parameterized.product(
    tokenizer=["bytes", "pairs"], length=[201, 300, 1000], seq_len=[1000]
  )
  def test_asks_for_a_pair_at_each_depth(self, tokenizer, length, seq_len):
    corpus = self.retrieval_corpus(tokenizer, eval_rows=12)
    made = corpus.retrieval_probes(seq_len=seq_len, batch_size=4, length=length)
    decode, encode = corpus.tokenizer.decode, corpus.tokenizer.encode
    sizes, orders, rows = set(), set(), set()
    for probes in made:
      self.assertEqual(probes.tokens.shape, (4, seq_len))
      self.assertEqual(probes.at.shape, (4, 10, 4))
      inside = np.tile(np.arange(seq_len) < length, (4, 1))
      np.testing.assert_array_equal(probes.segment_ids, inside)
      np.testing.assert_array_equal(
        probes.positions, inside * np.arange(seq_len)
      )
      self.assertTrue((probes.tokens[~inside] == 0).all())
      np.testing.assert_array_equal(probes.at < 0, probes.answers < 0)
      for tokens, at, answers in zip(probes.tokens, probes.at, probes.answers):
        ids = tokens[:length]
        self.assertEqual(ids[-1], corpus.tokenizer.eos_id)
        text = decode(ids[:-1])
        found = PAIR.findall(text)
        planted, asked = found[:10], found[10:]
        self.assertCountEqual(planted, asked)
        self.assertLen({key for key, _ in planted}, 10)
        encoded = [
          np.concatenate([encode(f"[{key}"), encode(value), encode("]")])
          for key, value in planted
        ]
        context = length - 1 - sum(map(len, encoded))
        self.assertLessEqual(
          set(PAIR.sub("", text)), self.letters(corpus.sources[0].heldout)
        )
        for d, ((key, value), pair) in enumerate(zip(planted, encoded)):
          # Its middle is at its depth of the context.
          (place,) = [
            t
            for t in range(context)
            if np.array_equal(ids[t : t + len(pair)], pair)
          ]
          depth = (place + len(pair) / 2) / context
          self.assertAlmostEqual(depth, (d + 0.5) / 10, delta=0.03)
          # Its question ends where the first prediction is to be its value.
          size = len(encode(value))
          sizes.add(size)
          where = at[d, :size]
          np.testing.assert_array_equal(where, where[0] + np.arange(size))
          self.assertGreaterEqual(where[0], context)
          self.assertTrue(decode(ids[: where[0] + 1]).endswith(f"[{key}"))
          np.testing.assert_array_equal(ids[where + 1], encode(value))
          np.testing.assert_array_equal(answers[d, :size], encode(value))
          np.testing.assert_array_equal(answers[d, size:], -1)
        orders.add(tuple(np.argsort(at[:, 0])))
        rows.add(ids.tobytes())
    self.assertEqual(sizes, {4} if tokenizer == "bytes" else {2, 3, 4})
    self.assertLen(rows, 12)
    self.assertGreater(len(orders), 10)

  @parameterized.parameters((1, 8), (3, 9), (8, 8), (16, 16))
  def test_full_batches(self, batch_size, expected):
    corpus = self.retrieval_corpus(eval_rows=8)
    make = lambda: list(
      corpus.retrieval_probes(seq_len=256, batch_size=batch_size, length=256)
    )
    first, again = make(), make()
    self.assertEqual(len(first) * batch_size, expected)
    for probes, other in zip(first, again):
      self.assertLen(probes.tokens, batch_size)
      self.assert_batches_equal(vars(probes), vars(other))

  def test_rows_do_not_hang_on_the_batch_size(self):
    corpus = self.retrieval_corpus(eval_rows=8)
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


class ErrorsTest(RetrievalTestCase):
  @parameterized.parameters(
    dict(fraction=-0.1),
    dict(fraction=1.1),
    dict(fraction=float("nan")),
    dict(key_letters=0),
    dict(key_letters=13),
    dict(value_digits=0),
    dict(min_tokens=0),
    dict(eval_rows=0),
  )
  def test_config(self, **config):
    ((name, value),) = config.items()
    with self.assertRaisesRegex(
      corpus_lib.DataError, f"{name}={value} must be"
    ):
      retrieval.RetrievalConfig(**config)

  def test_too_short_for_a_pair(self):
    least = r"seq_len=20 .* at least 21, .*raise them, or"
    corpus = self.retrieval_corpus(fraction=0.1)
    with self.assertRaisesRegex(corpus_lib.DataError, least):
      corpus.batches(seq_len=20, batch_size=1, seed=0)
    for row in rows(self.retrieval_corpus(fraction=1.0), 20, seq_len=21):
      self.assertEqual((row["tokens"] == ord("[")).sum(), 2)
    self.retrieval_corpus().batches(seq_len=20, batch_size=1, seed=0)
    corpus = self.retrieval_corpus(fraction=0.1, min_tokens=20)
    with self.assertRaisesRegex(
      corpus_lib.DataError, "min_tokens=20 .* least 21"
    ):
      corpus.batches(seq_len=96, batch_size=1, seed=0)

  def test_few_keys(self):
    corpus = self.retrieval_corpus(fraction=1.0, key_letters=1, value_digits=1)
    for row in rows(corpus, 8, seq_len=4000):
      self.assertLessEqual((documents(row)[0] == ord("[")).sum(), 52)

  def test_probes(self):
    corpus = self.retrieval_corpus()
    for length in (200, 257):
      with self.assertRaisesRegex(
        corpus_lib.DataError, rf"{length=} must be in \[201, seq_len=256\]"
      ):
        corpus.retrieval_probes(seq_len=256, batch_size=1, length=length)
    with self.assertRaisesRegex(corpus_lib.DataError, "must be at least 1"):
      corpus.retrieval_probes(seq_len=256, batch_size=0, length=256)


if __name__ == "__main__":
  absltest.main()
