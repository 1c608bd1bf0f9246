import collections
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest.mock

from absl.testing import absltest
from absl.testing import parameterized
import grain
import numpy as np
from orbax.checkpoint import v1 as ocp

from tests.chat import tokenizer_test
from train.data import corpus as corpus_lib
from train.data import stream

EOS = 256


class DataTestCase(parameterized.TestCase):
  """Gives a test a folder, and small blocks so that it crosses several."""

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    self.set_block_tokens(256)
    # Small blocks would read most documents in vain.
    self.patch(stream, "_GROUP", 2)

  def patch(self, module, name, value):
    patch = unittest.mock.patch.object(module, name, value)
    patch.start()
    self.addCleanup(patch.stop)

  def set_block_tokens(self, tokens):
    self.patch(corpus_lib, "_BLOCK_TOKENS", tokens)

  def write(self, name, content) -> str:
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
      content if isinstance(content, bytes) else content.encode()
    )
    return str(path)

  def corpus(self, texts, **config) -> corpus_lib.Corpus:
    lines = [json.dumps({"text": text}) for text in texts]
    path = self.write("texts.jsonl", "\n".join(lines))
    return corpus_lib.Corpus(
      corpus_lib.DataConfig(sources=sources(path), **config)
    )

  def words(self, n, length=40):
    """`n` texts of up to `length` bytes that name themselves all along."""
    rng = np.random.default_rng(0)
    # 5 bytes a word: rows of 16 tokens all differ.
    return [f"{i:03d}, " * int(rng.integers(1, length // 5)) for i in range(n)]

  def assert_batches_equal(self, actual, expected):
    self.assertEqual(actual.keys(), expected.keys())
    for name in expected:
      np.testing.assert_array_equal(actual[name], expected[name], name)


def sources(*paths, **config) -> tuple[corpus_lib.SourceConfig, ...]:
  return tuple(corpus_lib.SourceConfig(path=path, **config) for path in paths)


def side(subset) -> list[str]:
  return [subset[i] for i in range(len(subset))]


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def rows(batches, name="tokens"):
  return np.concatenate([batch[name] for batch in batches])


def served(tokens) -> list[str]:
  """The documents that a stream of byte tokens holds; the last may be cut."""
  stream = np.ravel(tokens)
  cuts = np.flatnonzero(stream == EOS)
  pieces = np.split(stream, cuts + 1)
  return [bytes(p[p != EOS].tolist()).decode() for p in pieces if len(p)]


class TrainingBatchesTest(DataTestCase):
  def unshuffled(self, corpus, n, seq_len, seed=0):
    """The stream itself: blocks of one row have nothing to shuffle."""
    self.set_block_tokens(1)
    batches = corpus.batches(seq_len=seq_len, batch_size=1, seed=seed)
    return take(batches, n)

  def test_one_document_comes_back_whole(self):
    text = "".join(f"{i:05d}é" for i in range(200))  # each row is unique
    corpus = self.corpus([text, text])
    self.assertLen(corpus.sources[0].train, 1)
    stream = np.tile([*text.encode(), EOS], 3)
    # A block of 16 rows, then the next: more than two epochs.
    self.set_block_tokens(16 * 96)
    batches = corpus.batches(seq_len=96, batch_size=4, seed=0)
    for block in range(2):
      actual = rows(take(batches, 4))
      expected = stream[block * 16 * 96 :][: 16 * 96].reshape(16, 96)
      self.assertFalse(np.array_equal(actual, expected))  # it is shuffled
      self.assertCountEqual(actual.tolist(), expected.tolist())

  def test_each_epoch_serves_each_training_document_once(self):
    texts = self.words(30) + ["Größe €", "語", "🙂", "a\r\nb\n"] * 3
    corpus = self.corpus(texts, heldout_fraction=0.2)
    train, heldout = (
      side(corpus.sources[0].train),
      side(corpus.sources[0].heldout),
    )
    self.assertCountEqual(train + heldout, texts)
    n = sum(len(text.encode()) + 1 for text in train)
    stream = served(rows(self.unshuffled(corpus, 3 * n // 64 + 1, 64)))
    epochs = [stream[i * len(train) : (i + 1) * len(train)] for i in range(3)]
    for epoch in epochs:
      self.assertCountEqual(epoch, train)
    self.assertNotEqual(epochs[0], epochs[1])
    self.assertNotEqual(epochs[1], epochs[2])
    for text in set(heldout) - set(train):
      self.assertNotIn(text, stream)

  def test_shuffling_rows_loses_and_repeats_none(self):
    corpus = self.corpus(self.words(50))
    expected = rows(self.unshuffled(corpus, 48, 16))
    self.set_block_tokens(256)  # 16 rows
    actual = rows(take(corpus.batches(seq_len=16, batch_size=4, seed=0), 12))
    orders = []
    for block in np.arange(48).reshape(3, 16):
      self.assertCountEqual(actual[block].tolist(), expected[block].tolist())
      known = {row.tobytes(): i for i, row in enumerate(expected[block])}
      orders.append([known[row.tobytes()] for row in actual[block]])
    self.assertNotEqual(orders[0], orders[1])

  def test_arrays_match_a_naive_loop(self):
    texts = self.words(40) + ["Größe €", "語", "🙂"] * 4
    hf = tokenizer_test.write_hf(str(self.folder))
    for tokenizer in ("bytes", hf):
      corpus = self.corpus(texts, tokenizer=tokenizer)
      eos = corpus.tokenizer.eos_id
      rates = {}  # bytes a token, by the ids of the document
      for text in texts:
        ids = (*corpus.tokenizer.encode(text).tolist(), eos)
        rates[ids] = len(text.encode()) / len(ids)
      batches = self.unshuffled(corpus, 100, 16)
      stream = rows(batches).ravel().tolist()
      document, expected = [], []
      for token in stream:
        document.append(token)
        if token == eos:
          expected += [rates[tuple(document)]] * len(document)
          document = []
      actual = rows(batches, "bytes").ravel()[: len(expected)]
      self.assertGreater(len(expected), 1000)
      np.testing.assert_allclose(actual, expected, rtol=1e-6)
      for batch in batches:
        segment, position = 1, 0
        for t in range(16):
          self.assertEqual(batch["segment_ids"][0, t], segment)
          self.assertEqual(batch["positions"][0, t], position)
          position += 1
          if batch["tokens"][0, t] == eos:
            segment, position = segment + 1, 0

  def test_shapes_and_types(self):
    corpus = self.corpus(self.words(9))
    # The second is longer than a block, and than the corpus.
    for b, t in ((4, 16), (3, 500), (1, 1)):
      batch = next(corpus.batches(seq_len=t, batch_size=b, seed=0))
      for name, dtype in (
        ("tokens", np.int32),
        ("segment_ids", np.int32),
        ("positions", np.int32),
        ("bytes", np.float32),
      ):
        self.assertEqual(batch[name].shape, (b, t))
        self.assertEqual(batch[name].dtype, dtype)
      self.assertGreater(batch["segment_ids"].min(), 0)

  def test_the_order_hangs_on_the_seeds_alone(self):
    texts = self.words(50)
    corpus = self.corpus(texts)

    def head(corpus, seed):
      batches = corpus.batches(seq_len=16, batch_size=4, seed=seed)
      return rows(take(batches, 6)).tolist()

    self.assertEqual(head(corpus, 0), head(corpus, 0))
    self.assertEqual(head(corpus, 0), head(self.corpus(texts), 0))
    others = [
      head(corpus, 1),
      head(self.corpus(texts, shuffle_seed=1), 0),
      head(self.corpus(texts, shuffle_seed=1), 1),
    ]
    for other in others:
      self.assertNotEqual(other, head(corpus, 0))
    self.assertNotEqual(others[0], others[1])

  def test_the_next_seed_is_not_the_next_epoch(self):
    corpus = self.corpus(self.words(30))
    n = len(corpus.sources[0].train)

    def epochs(seed):
      stream = served(rows(self.unshuffled(corpus, 9, 256, seed)))
      return [stream[i * n : (i + 1) * n] for i in range(2)]

    self.assertNotEqual(epochs(0)[1], epochs(1)[0])

  def test_a_batch_mixes_documents(self):
    # Each document fills 32 rows.
    texts = [chr(ord("0") + i) * (32 * 64 - 1) for i in range(40)]
    corpus = self.corpus(texts)
    self.set_block_tokens(16 * 32 * 64)
    batches = corpus.batches(seq_len=64, batch_size=8, seed=0)
    distinct = [
      len(np.unique(batch["tokens"][:, 0])) for batch in take(batches, 40)
    ]
    self.assertGreater(np.mean(distinct), 5.5)

  @parameterized.parameters(
    dict(seq_len=0, batch_size=1), dict(seq_len=1, batch_size=0)
  )
  def test_bad_sizes(self, **sizes):
    corpus = self.corpus(self.words(5))
    with self.assertRaisesRegex(corpus_lib.DataError, "must be at least 1"):
      corpus.batches(seed=0, **sizes)
    with self.assertRaisesRegex(corpus_lib.DataError, "must be at least 1"):
      corpus.heldout_batches(max_batches=1, **sizes)

  def test_each_epoch_of_all_shards_serves_each_document_once(self):
    texts = self.words(31)
    corpus = self.corpus(texts, heldout_fraction=0.2, shards=3)
    self.set_block_tokens(1)
    train = side(
      corpus.sources[0].train
    )  # 25: an epoch ends in the middle of a round
    epochs = []
    for shard in range(3):
      batches = corpus.batches(seq_len=8, batch_size=1, seed=0, shard=shard)
      epochs.append(served(rows(take(batches, 400)))[:50])
    in_order = [text for together in zip(*epochs) for text in together]
    for epoch in range(5):
      part = in_order[epoch * len(train) :][: len(train)]
      self.assertCountEqual(part, train)

  def test_shards_are_shuffled_apart(self):
    corpus = self.corpus(["".join(f"{i:04d}" for i in range(99))] * 9, shards=2)
    batches = [
      corpus.batches(seq_len=16, batch_size=4, seed=0, shard=shard)
      for shard in range(2)
    ]
    orders = [rows(take(b, 4)).tolist() for b in batches]
    self.assertNotEqual(*orders)


class ResumeTest(DataTestCase):
  def setUp(self):
    super().setUp()
    self.made = self.corpus(self.words(60))

  def batches(self, **kwargs):
    return self.made.batches(
      **(dict(seq_len=16, batch_size=4, seed=3) | kwargs)
    )

  # A block has 4 batches, an epoch some 17.
  @parameterized.product(
    steps=[0, 1, 3, 4, 5, 8, 21, 50], used=[False, True], prefetch=[0, 2]
  )
  def test_exact(self, steps, used, prefetch):
    def batches():
      iterator = self.batches()
      if prefetch:
        iterator = grain.experimental.ThreadPrefetchDatasetIterator(
          iterator, prefetch
        )
      return iterator

    iterator = batches()
    take(iterator, steps)
    state = iterator.get_state()
    saved = json.dumps(state)
    expected = take(iterator, 20)
    self.assertEqual(json.dumps(state), saved)  # later steps left it alone
    resumed = iterator if used else batches()
    resumed.set_state(json.loads(saved))
    self.assertEqual(json.dumps(resumed.get_state()), saved)
    resumed.start_prefetch()
    for actual, batch in zip(take(resumed, 20), expected):
      self.assert_batches_equal(actual, batch)

  @parameterized.parameters(1, 3, 7, 12)
  def test_every_place_of_a_document(self, seq_len):
    # Blocks of one short row end everywhere, also between documents.
    self.set_block_tokens(1)
    iterator = self.batches(seq_len=seq_len, batch_size=1)
    resumed = self.batches(seq_len=seq_len, batch_size=1)
    for _ in range(40):
      resumed.set_state(json.loads(json.dumps(iterator.get_state())))
      self.assert_batches_equal(next(resumed), next(iterator))

  @parameterized.parameters(0, 6)
  def test_through_orbax(self, steps):
    iterator = self.batches()
    take(iterator, steps)
    with ocp.training.Checkpointer(f"{self.folder}/run") as checkpointer:
      checkpointer.save_checkpointables(steps, dict(dataset=iterator))
    expected = take(iterator, 9)
    resumed = self.batches()
    with ocp.training.Checkpointer(f"{self.folder}/run") as checkpointer:
      checkpointer.load_checkpointables(steps, dict(dataset=resumed))
    for actual, batch in zip(take(resumed, 9), expected):
      self.assert_batches_equal(actual, batch)

  def test_refuses_other_settings(self):
    iterator = self.batches()
    take(iterator, 3)
    state = iterator.get_state()
    for other in (
      self.batches(seq_len=32),
      self.batches(batch_size=8),
      self.batches(seed=4),
      self.corpus(self.words(60), shards=2).batches(
        seq_len=16, batch_size=4, seed=3
      ),
      self.corpus(self.words(61)).batches(seq_len=16, batch_size=4, seed=3),
    ):
      with self.assertRaisesRegex(corpus_lib.DataError, "same settings"):
        other.set_state(state)

  def test_silent_at_exit(self):
    # An iterator that lives until Python exits must neither hang nor complain.
    program = (
      "from train.data import corpus as corpus_lib\n"
      f"s = corpus_lib.SourceConfig(path={str(self.folder)!r} + '/*')\n"
      "c = corpus_lib.Corpus(corpus_lib.DataConfig(sources=(s,)))\n"
      "it = c.batches(seq_len=8, batch_size=2, seed=0)\n"
      "held = c.heldout_batches(seq_len=8, batch_size=1, max_batches=9)\n"
      "next(it), next(held)\n"
    )
    done = subprocess.run(
      [sys.executable, "-W", "error", "-c", program],
      capture_output=True,
      text=True,
      timeout=60,
    )
    self.assertEqual((done.returncode, done.stderr), (0, ""))


class HeldoutTest(DataTestCase):
  def test_all_of_it_in_full_batches(self):
    corpus = self.corpus(self.words(200), heldout_fraction=0.3)
    heldout = side(corpus.sources[0].heldout)
    batches = list(
      corpus.heldout_batches(seq_len=16, batch_size=4, max_batches=10**9)
    )
    n = sum(len(text) + 1 for text in heldout)
    self.assertLen(batches, -(-n // 64))
    for batch in batches:
      self.assertEqual(batch["tokens"].shape, (4, 16))
    real = rows(batches, "segment_ids").ravel() > 0
    self.assertNotEqual(n % 64, 0)  # so the last batch is padded
    np.testing.assert_array_equal(real, np.arange(len(batches) * 64) < n)
    for name in ("tokens", "positions", "bytes"):
      self.assertTrue((rows(batches, name).ravel()[~real] == 0).all(), name)
    self.assertCountEqual(served(rows(batches).ravel()[real]), heldout)
    self.assertAlmostEqual(
      rows(batches, "bytes").sum(), sum(map(len, heldout)), delta=0.01
    )

  def test_same_each_time(self):
    corpus = self.corpus(self.words(200), heldout_fraction=0.3)
    sizes = dict(seq_len=16, batch_size=4, max_batches=7)
    first = list(corpus.heldout_batches(**sizes))
    self.assertLen(first, 7)
    other_seed = self.corpus(
      self.words(200), heldout_fraction=0.3, shuffle_seed=5
    )
    for again in (corpus, other_seed):
      again = list(again.heldout_batches(**sizes))
      self.assertLen(again, 7)
      for actual, batch in zip(again, first):
        self.assert_batches_equal(actual, batch)

  def test_spread_over_documents(self):
    texts = [chr(ord("0") + i) * 5000 for i in range(60)]
    corpus = self.corpus(texts, heldout_fraction=0.2)
    n = len(corpus.sources[0].heldout)
    batches = list(
      corpus.heldout_batches(seq_len=16, batch_size=n, max_batches=2)
    )
    counts = collections.Counter(rows(batches).ravel().tolist())
    self.assertEqual(
      counts, {ord(text[0]): 32 for text in side(corpus.sources[0].heldout)}
    )
    np.testing.assert_allclose(rows(batches, "bytes"), 5000 / 5001)
    # Too few rows for all documents: a row each of some, from all over.
    batches = corpus.heldout_batches(seq_len=16, batch_size=4, max_batches=1)
    self.assertLen(np.unique(rows(list(batches))), 4)


if __name__ == "__main__":
  absltest.main()
