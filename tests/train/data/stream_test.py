"""Several sources: shares of the tokens, order, exactly once, held out."""

import collections
import json

import chex
import numpy as np
import pytest

from tests.train.data import corpora
from train.data import corpus as corpus_lib
from train.data import retrieval


def mixed(folder, texts, weights, **config) -> corpus_lib.Corpus:
  """A corpus with a source a, b, ... for each list of texts."""
  sources = []
  for name, some, weight in zip("abcd", texts, weights):
    path = corpora.write_json_lines(folder / f"{name}.jsonl", some)
    sources.append(corpus_lib.SourceConfig(path=path, weight=weight))
  return corpus_lib.Corpus(
    corpus_lib.DataConfig(sources=tuple(sources), **config)
  )


def named(letter, n) -> list[str]:
  """`n` texts of up to 60 bytes that name their source and themselves."""
  rng = np.random.default_rng(ord(letter))
  return [f"{letter}{i:03d}" * int(rng.integers(1, 15)) for i in range(n)]


@pytest.mark.parametrize(
  "weights, batch_size",
  [
    ((7.0, 2.0, 1.0), 1),
    ((0.5, 0.25, 0.25), 4),
    ((1.0, 100.0, 3.3), 6),
  ],
)
def test_each_source_has_its_share(
  tmp_path, set_block_tokens, weights, batch_size
):
  corpus = mixed(tmp_path, [named(x, 20) for x in "abc"], weights)
  assert corpus.source_names == ("a", "b", "c")
  set_block_tokens(96)
  iterator = corpus.batches(seq_len=16, batch_size=batch_size, seed=0)
  shares = np.array(weights) / sum(weights)
  count = np.zeros(3)
  for n in range(1, 61):
    batch = next(iterator)
    assert batch["sources"].dtype == np.int32
    # Rows of 16 tokens show the letter of their source.
    for tokens, numbers in zip(batch["tokens"], batch["sources"]):
      letters = set(bytes(x for x in tokens if 97 <= x <= 99).decode())
      assert letters == {"abc"[numbers[0]]}
      assert set(numbers) == {numbers[0]}
      count[numbers[0]] += 1
    if iterator.get_state()["dealt"] == 0:  # between blocks
      total = n * batch_size
      np.testing.assert_array_less(abs(count - shares * total), 1.01)


def test_a_source_is_read_as_if_it_were_alone(tmp_path, set_block_tokens):
  texts = [named("a", 30), named("b", 7)]
  set_block_tokens(1)  # blocks of a row: nothing is shuffled

  def stream(corpus):
    batches = corpus.batches(seq_len=16, batch_size=1, seed=3)
    batches = corpora.take(batches, 120)
    return corpora.rows(batches), corpora.rows(batches, "sources")[:, 0]

  together, numbers = stream(mixed(tmp_path, texts, (1.0, 2.0)))
  alone, _ = stream(mixed(tmp_path, texts[:1], (1.0,)))
  np.testing.assert_array_equal(together[numbers == 0], alone[:40])
  # The other one is in an order of its own, a new one each epoch.
  kept = corpora.side(mixed(tmp_path, texts, (1.0, 2.0)).sources[1].train)
  n = len(kept)
  of_b = corpora.served(together[numbers == 1])
  epochs = [of_b[i * n : (i + 1) * n] for i in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(kept)
  assert epochs[0] != epochs[1]


def test_pairs_are_planted_in_all_sources(tmp_path, set_block_tokens):
  texts = [["a" * 200] * 20, ["b" * 200] * 20]
  corpus = mixed(
    tmp_path,
    texts,
    (1.0, 1.0),
    retrieval=retrieval.RetrievalConfig(fraction=0.125),
  )
  set_block_tokens(8 * 64)  # 8 rows, one of them with pairs
  batches = corpus.batches(seq_len=64, batch_size=4, seed=0)
  planted = collections.Counter()
  for batch in corpora.take(batches, 120):
    for tokens, numbers in zip(batch["tokens"], batch["sources"]):
      if ord("[") in tokens:
        planted[int(numbers[0])] += 1
        # The filler is the source's.
        assert ord("ab"[numbers[0]]) in tokens
  assert planted.total() == 60
  assert 15 <= planted[0] <= 45


def test_exactly_once_across_stops_and_numbers_of_processes(
  tmp_path, set_block_tokens
):
  texts = [named("a", 18), named("b", 8)]
  set_block_tokens(1)

  def corpus():  # each process opens its own
    return mixed(tmp_path, texts, (2.0, 1.0), shards=4, heldout_fraction=0.2)

  def run(processes, state, n):
    """`n` batches of each shard, its shards dealt to so many processes."""
    read, after = {}, {}
    for process in range(processes):
      own = corpus()
      for shard in range(process, 4, processes):
        batches = own.batches(seq_len=32, batch_size=1, seed=0, shard=shard)
        if state:
          batches.set_state(json.loads(state)[str(shard)])
        read[shard] = corpora.take(batches, n)
        after[str(shard)] = batches.get_state()
    return read, json.dumps(after)

  unbroken, _ = run(1, None, 23)
  parts, state = [], None
  for processes, n in ((2, 5), (4, 8), (1, 10)):
    part, state = run(processes, state, n)
    parts.append(part)
  for number, source in enumerate(corpus().sources):
    kept = corpora.side(source.train)
    streams = []
    for shard in range(4):
      broken = [batch for part in parts for batch in part[shard]]
      chex.assert_trees_all_equal(broken, unbroken[shard])
      is_ours = corpora.rows(broken, "sources")[:, 0] == number
      streams.append(corpora.served(corpora.rows(broken)[is_ours])[:-1])
    # Document n of the source is the next one of shard n mod 4.
    whole = min(map(len, streams))
    in_order = [text for four in zip(*streams) for text in four]
    epochs = 4 * whole // len(kept)
    assert epochs >= 2
    for i in range(epochs):
      epoch = in_order[i * len(kept) : (i + 1) * len(kept)]
      assert sorted(epoch) == sorted(kept)


def test_other_weights_are_refused(tmp_path):
  texts = [named("a", 9), named("b", 9)]

  def batches(weights):
    return mixed(tmp_path, texts, weights).batches(
      seq_len=16, batch_size=4, seed=0
    )

  state = batches((1.0, 2.0)).get_state()
  batches((1.0, 2.0)).set_state(state)
  with pytest.raises(
    corpus_lib.DataError,
    match=r"here: weights is \[1.0, 3.0\], was \[1.0, 2.0\]\. Restore",
  ):
    batches((1.0, 3.0)).set_state(state)


def test_heldout_in_proportion_until_a_source_has_no_more(tmp_path):
  texts = [["a" * 160] * 200, ["b" * 160] * 30]
  corpus = mixed(tmp_path, texts, (3.0, 1.0), heldout_fraction=0.3)
  b_rows = sum(len(t) + 1 for t in corpora.side(corpus.sources[1].heldout)) / 16
  sizes = dict(seq_len=16, batch_size=4, max_batches=10**9)
  batches = list(corpus.heldout_batches(**sizes))
  numbers = corpora.rows(batches, "sources")[:, 0]
  tokens = corpora.rows(batches)
  for number, row in zip(numbers, tokens):
    letters = set(row.tolist()) - {0, corpora.EOS}
    assert letters <= {ord("ab"[number])}
  for batch in batches[: int(b_rows) - 1]:
    count = collections.Counter(batch["sources"][:, 0].tolist())
    assert count == {0: 3, 1: 1}
  assert not corpora.rows(batches[int(b_rows) + 2 :], "sources").any()
  for number, source in enumerate(corpus.sources):
    shown = tokens[numbers == number]
    shown = corpora.served(shown[shown > 0])
    assert shown == corpora.side(source.heldout), source.name
  again = list(corpus.heldout_batches(**sizes))
  chex.assert_trees_all_equal(again, batches)


def test_probes_are_of_all_sources(tmp_path):
  texts = [["a" * 300] * 20, ["b" * 300] * 20]
  corpus = mixed(
    tmp_path,
    texts,
    (1.0, 1.0),
    retrieval=retrieval.RetrievalConfig(eval_rows=8),
  )
  probes = corpus.retrieval_probes(seq_len=300, batch_size=4, length=300)
  tokens = np.concatenate([batch.tokens for batch in probes])
  letters = ["ab"[int(np.sum(row == 98) > 50)] for row in tokens]
  assert "".join(letters) == "abababab"


@pytest.mark.parametrize(
  "path, name",
  [
    ("stdlib", "stdlib"),
    ("my/*.txt", "my"),
    ("/data/web-1.5/**/x-*.jsonl,other/*", "web-1.5"),
    ("/data/web.jsonl", "web"),
    ("*.txt", "*.txt"),
    ("hf:allenai/c4?name=en&split=train", "allenai/c4"),
  ],
)
def test_a_source_is_named_after_its_path(path, name):
  assert corpus_lib.SourceConfig(path=path).label == name
  assert corpus_lib.SourceConfig(path=path, name="x").label == "x"


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_checked(weight):
  with pytest.raises(corpus_lib.DataError, match="weight=.* must be"):
    corpus_lib.SourceConfig(weight=weight)


def test_names_differ():
  a, b = (
    corpus_lib.SourceConfig(path="x/*"),
    corpus_lib.SourceConfig(path="x/*.txt"),
  )
  with pytest.raises(corpus_lib.DataError, match=r"\['x', 'x'\].*set the name"):
    corpus_lib.DataConfig(sources=(a, b))
  with pytest.raises(corpus_lib.DataError, match=r"sources=\(\) must be 1 to"):
    corpus_lib.DataConfig(sources=())
