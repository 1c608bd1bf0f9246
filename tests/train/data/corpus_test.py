"""Rows of one source: their order, going on where one stopped, held out."""

import collections
import json
import subprocess
import sys

import chex
import grain
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from tests.chat import tokenizer_test
from tests.train.data import corpora
from train.data import corpus as corpus_lib


@pytest.fixture
def unshuffled(set_block_tokens):
  """The stream itself: blocks of one row have nothing to shuffle."""

  def first_rows(corpus, n, seq_len, seed=0):
    set_block_tokens(1)
    batches = corpus.batches(seq_len=seq_len, batch_size=1, seed=seed)
    return corpora.take(batches, n)

  return first_rows


def test_one_document_comes_back_whole(tmp_path, set_block_tokens):
  text = "".join(f"{i:05d}é" for i in range(200))  # each row is unique
  corpus = corpora.make(tmp_path, [text, text])
  assert len(corpus.sources[0].train) == 1
  stream = np.tile([*text.encode(), corpora.EOS], 3)
  # A block of 16 rows, then the next: more than two epochs.
  set_block_tokens(16 * 96)
  batches = corpus.batches(seq_len=96, batch_size=4, seed=0)
  for block in range(2):
    actual = corpora.take_rows(batches, 4)
    expected = stream[block * 16 * 96 :][: 16 * 96].reshape(16, 96)
    assert not np.array_equal(actual, expected)  # it is shuffled
    assert sorted(actual.tolist()) == sorted(expected.tolist())


def test_each_epoch_serves_each_training_document_once(tmp_path, unshuffled):
  texts = corpora.words(30) + ["Größe €", "語", "🙂", "a\r\nb\n"] * 3
  corpus = corpora.make(tmp_path, texts, heldout_fraction=0.2)
  (source,) = corpus.sources
  train, heldout = corpora.side(source.train), corpora.side(source.heldout)
  assert sorted(train + heldout) == sorted(texts)
  n = sum(len(text.encode()) + 1 for text in train)
  stream = corpora.served(corpora.rows(unshuffled(corpus, 3 * n // 64 + 1, 64)))
  epochs = [stream[i * len(train) : (i + 1) * len(train)] for i in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(train)
  assert epochs[0] != epochs[1]
  assert epochs[1] != epochs[2]
  for text in set(heldout) - set(train):
    assert text not in stream


def test_shuffling_rows_loses_and_repeats_none(
  tmp_path, set_block_tokens, unshuffled
):
  corpus = corpora.make(tmp_path, corpora.words(50))
  expected = corpora.rows(unshuffled(corpus, 48, 16))
  set_block_tokens(256)  # 16 rows
  batches = corpus.batches(seq_len=16, batch_size=4, seed=0)
  actual = corpora.take_rows(batches, 12)
  orders = []
  for block in np.arange(48).reshape(3, 16):
    assert sorted(actual[block].tolist()) == sorted(expected[block].tolist())
    known = {row.tobytes(): i for i, row in enumerate(expected[block])}
    orders.append([known[row.tobytes()] for row in actual[block]])
  assert orders[0] != orders[1]


def test_arrays_match_a_naive_loop(tmp_path, unshuffled):
  texts = corpora.words(40) + ["Größe €", "語", "🙂"] * 4
  hf = tokenizer_test.write_hf(tmp_path)
  for tokenizer in ("bytes", hf):
    corpus = corpora.make(tmp_path, texts, tokenizer=tokenizer)
    eos = corpus.tokenizer.eos_id
    rates = {}  # bytes a token, by the ids of the document
    for text in texts:
      ids = (*corpus.tokenizer.encode(text).tolist(), eos)
      rates[ids] = len(text.encode()) / len(ids)
    batches = unshuffled(corpus, 100, 16)
    stream = corpora.rows(batches).ravel().tolist()
    document, expected = [], []
    for token in stream:
      document.append(token)
      if token == eos:
        expected += [rates[tuple(document)]] * len(document)
        document = []
    actual = corpora.rows(batches, "bytes").ravel()[: len(expected)]
    assert len(expected) > 1000
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for batch in batches:
      segment, position = 1, 0
      for t in range(16):
        assert batch["segment_ids"][0, t] == segment
        assert batch["positions"][0, t] == position
        position += 1
        if batch["tokens"][0, t] == eos:
          segment, position = segment + 1, 0


def test_shapes_and_types(tmp_path):
  corpus = corpora.make(tmp_path, corpora.words(9))
  # The second is longer than a block, and than the corpus.
  for b, t in ((4, 16), (3, 500), (1, 1)):
    batch = next(corpus.batches(seq_len=t, batch_size=b, seed=0))
    for name, dtype in (
      ("tokens", np.int32),
      ("segment_ids", np.int32),
      ("positions", np.int32),
      ("bytes", np.float32),
    ):
      assert batch[name].shape == (b, t)
      assert batch[name].dtype == dtype
    assert batch["segment_ids"].min() > 0


def test_the_order_hangs_on_the_seeds_alone(tmp_path):
  texts = corpora.words(50)
  corpus = corpora.make(tmp_path, texts)

  def head(corpus, seed):
    batches = corpus.batches(seq_len=16, batch_size=4, seed=seed)
    return corpora.take_rows(batches, 6).tolist()

  assert head(corpus, 0) == head(corpus, 0)
  assert head(corpus, 0) == head(corpora.make(tmp_path, texts), 0)
  others = [
    head(corpus, 1),
    head(corpora.make(tmp_path, texts, shuffle_seed=1), 0),
    head(corpora.make(tmp_path, texts, shuffle_seed=1), 1),
  ]
  for other in others:
    assert other != head(corpus, 0)
  assert others[0] != others[1]


def test_the_next_seed_is_not_the_next_epoch(tmp_path, unshuffled):
  corpus = corpora.make(tmp_path, corpora.words(30))
  n = len(corpus.sources[0].train)

  def epochs(seed):
    stream = corpora.served(corpora.rows(unshuffled(corpus, 9, 256, seed)))
    return [stream[i * n : (i + 1) * n] for i in range(2)]

  assert epochs(0)[1] != epochs(1)[0]


def test_a_batch_mixes_documents(tmp_path, set_block_tokens):
  # Each document fills 32 rows.
  texts = [chr(ord("0") + i) * (32 * 64 - 1) for i in range(40)]
  corpus = corpora.make(tmp_path, texts)
  set_block_tokens(16 * 32 * 64)
  batches = corpus.batches(seq_len=64, batch_size=8, seed=0)
  distinct = [
    len(np.unique(batch["tokens"][:, 0])) for batch in corpora.take(batches, 40)
  ]
  assert np.mean(distinct) > 5.5


@pytest.mark.parametrize("seq_len, batch_size", [(0, 1), (1, 0)])
def test_bad_sizes(tmp_path, seq_len, batch_size):
  sizes = dict(seq_len=seq_len, batch_size=batch_size)
  corpus = corpora.make(tmp_path, corpora.words(5))
  with pytest.raises(corpus_lib.DataError, match="must be at least 1"):
    corpus.batches(seed=0, **sizes)
  with pytest.raises(corpus_lib.DataError, match="must be at least 1"):
    corpus.heldout_batches(max_batches=1, **sizes)


@pytest.mark.slow
def test_each_epoch_of_all_shards_serves_each_document_once(
  tmp_path, set_block_tokens
):
  texts = corpora.words(31)
  corpus = corpora.make(tmp_path, texts, heldout_fraction=0.2, shards=3)
  set_block_tokens(1)
  # 25: an epoch ends in the middle of a round.
  train = corpora.side(corpus.sources[0].train)
  epochs = []
  for shard in range(3):
    batches = corpus.batches(seq_len=8, batch_size=1, seed=0, shard=shard)
    epochs.append(corpora.served(corpora.take_rows(batches, 400))[:50])
  in_order = [text for together in zip(*epochs) for text in together]
  for epoch in range(5):
    part = in_order[epoch * len(train) :][: len(train)]
    assert sorted(part) == sorted(train)


def test_shards_are_shuffled_apart(tmp_path):
  text = "".join(f"{i:04d}" for i in range(99))
  corpus = corpora.make(tmp_path, [text] * 9, shards=2)
  batches = [
    corpus.batches(seq_len=16, batch_size=4, seed=0, shard=shard)
    for shard in range(2)
  ]
  first, second = (corpora.take_rows(b, 4).tolist() for b in batches)
  assert first != second


@pytest.fixture
def corpus(tmp_path):
  return corpora.make(tmp_path, corpora.words(60))


def iterate(corpus, seq_len=16, batch_size=4, seed=3):
  return corpus.batches(seq_len=seq_len, batch_size=batch_size, seed=seed)


# A block has 4 batches, an epoch some 17.
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 8, 21, 50])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resumes_exactly(corpus, steps, used, prefetch):
  def batches():
    iterator = iterate(corpus)
    if prefetch:
      iterator = grain.experimental.ThreadPrefetchDatasetIterator(
        iterator, prefetch
      )
    return iterator

  iterator = batches()
  corpora.take(iterator, steps)
  state = iterator.get_state()
  saved = json.dumps(state)
  expected = corpora.take(iterator, 20)
  assert json.dumps(state) == saved  # later steps left it alone
  resumed = iterator if used else batches()
  resumed.set_state(json.loads(saved))
  assert json.dumps(resumed.get_state()) == saved
  resumed.start_prefetch()
  chex.assert_trees_all_equal(corpora.take(resumed, 20), expected)


@pytest.mark.parametrize("seq_len", [1, 3, 7, 12])
def test_resumes_at_every_place_of_a_document(
  set_block_tokens, corpus, seq_len
):
  # Blocks of one short row end everywhere, also between documents.
  set_block_tokens(1)
  iterator = iterate(corpus, seq_len, batch_size=1)
  resumed = iterate(corpus, seq_len, batch_size=1)
  for _ in range(40):
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    chex.assert_trees_all_equal(next(resumed), next(iterator))


@pytest.mark.parametrize("steps", [0, 6])
def test_resumes_through_orbax(tmp_path, corpus, steps):
  iterator = iterate(corpus)
  corpora.take(iterator, steps)
  with ocp.training.Checkpointer(f"{tmp_path}/run") as checkpointer:
    checkpointer.save_checkpointables(steps, dict(dataset=iterator))
  expected = corpora.take(iterator, 9)
  resumed = iterate(corpus)
  with ocp.training.Checkpointer(f"{tmp_path}/run") as checkpointer:
    checkpointer.load_checkpointables(steps, dict(dataset=resumed))
  chex.assert_trees_all_equal(corpora.take(resumed, 9), expected)


def test_refuses_other_settings(tmp_path, corpus):
  iterator = iterate(corpus)
  corpora.take(iterator, 3)
  state = iterator.get_state()
  for other in (
    iterate(corpus, seq_len=32),
    iterate(corpus, batch_size=8),
    iterate(corpus, seed=4),
    iterate(corpora.make(tmp_path, corpora.words(60), shards=2)),
    iterate(corpora.make(tmp_path, corpora.words(61))),
  ):
    with pytest.raises(corpus_lib.DataError, match="same settings"):
      other.set_state(state)


@pytest.mark.usefixtures("corpus")
def test_silent_at_exit(tmp_path):
  # An iterator that lives until Python exits must neither hang nor complain.
  program = (
    "from train.data import corpus as corpus_lib\n"
    f"s = corpus_lib.SourceConfig(path={str(tmp_path)!r} + '/*')\n"
    "c = corpus_lib.Corpus(corpus_lib.DataConfig(sources=(s,)))\n"
    "it = c.batches(seq_len=8, batch_size=2, seed=0)\n"
    "held = c.heldout_batches(seq_len=8, batch_size=1, max_batches=9)\n"
    "next(it), next(held)\n"
  )
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", program],
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert (done.returncode, done.stderr) == (0, "")


def test_all_heldout_in_full_batches(tmp_path):
  corpus = corpora.make(tmp_path, corpora.words(200), heldout_fraction=0.3)
  heldout = corpora.side(corpus.sources[0].heldout)
  batches = list(
    corpus.heldout_batches(seq_len=16, batch_size=4, max_batches=10**9)
  )
  n = sum(len(text) + 1 for text in heldout)
  assert len(batches) == -(-n // 64)
  for batch in batches:
    assert batch["tokens"].shape == (4, 16)
  real = corpora.rows(batches, "segment_ids").ravel() > 0
  assert n % 64 != 0  # so the last batch is padded
  np.testing.assert_array_equal(real, np.arange(len(batches) * 64) < n)
  for name in ("tokens", "positions", "bytes"):
    assert (corpora.rows(batches, name).ravel()[~real] == 0).all(), name
  shown = corpora.served(corpora.rows(batches).ravel()[real])
  assert sorted(shown) == sorted(heldout)
  text_bytes = corpora.rows(batches, "bytes").sum()
  assert text_bytes == pytest.approx(sum(map(len, heldout)), abs=0.01)


def test_heldout_same_each_time(tmp_path):
  corpus = corpora.make(tmp_path, corpora.words(200), heldout_fraction=0.3)
  sizes = dict(seq_len=16, batch_size=4, max_batches=7)
  first = list(corpus.heldout_batches(**sizes))
  assert len(first) == 7
  other_seed = corpora.make(
    tmp_path, corpora.words(200), heldout_fraction=0.3, shuffle_seed=5
  )
  for again in (corpus, other_seed):
    chex.assert_trees_all_equal(list(again.heldout_batches(**sizes)), first)


def test_heldout_spread_over_documents(tmp_path):
  texts = [chr(ord("0") + i) * 5000 for i in range(60)]
  corpus = corpora.make(tmp_path, texts, heldout_fraction=0.2)
  heldout = corpora.side(corpus.sources[0].heldout)
  n = len(heldout)
  batches = list(
    corpus.heldout_batches(seq_len=16, batch_size=n, max_batches=2)
  )
  counts = collections.Counter(corpora.rows(batches).ravel().tolist())
  assert counts == {ord(text[0]): 32 for text in heldout}
  np.testing.assert_allclose(corpora.rows(batches, "bytes"), 5000 / 5001)
  # Too few rows for all documents: a row each of some, from all over.
  batches = corpus.heldout_batches(seq_len=16, batch_size=4, max_batches=1)
  assert len(np.unique(corpora.rows(list(batches)))) == 4
