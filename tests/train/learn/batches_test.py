"""Batches on devices: what they hold, and where the data stand."""

import json

import jax
import numpy as np
import pytest

from dsa_jax import sharding
from tests.train import runs
from train.data import corpus as corpus_lib
from train.learn import batches as batches_lib
from train.learn import step


@pytest.fixture
def make_feed(tmp_path):
  runs.write_text(tmp_path)
  cfg = runs.config(tmp_path)
  sources = (
    corpus_lib.SourceConfig(path=f"{tmp_path}/*.txt", weight=0.5),
    corpus_lib.SourceConfig(path=f"{tmp_path}/1*.txt", weight=0.5, name="few"),
  )
  corpus = corpus_lib.Corpus(corpus_lib.DataConfig(sources=sources, shards=2))
  with jax.set_mesh(sharding.make_mesh()):
    yield lambda: batches_lib.Batches(
      corpus, cfg.stages[0], cfg.model.rules, 0, 2
    )


def test_a_batch_says_where_its_rows_come_from(make_feed):
  batches = make_feed()
  count = np.zeros(2, int)
  for _ in range(8):
    batch = next(batches)
    assert batch.keys() == step.BATCH_DTYPES.keys()
    for name, dtype in step.BATCH_DTYPES.items():
      assert batch[name].shape == (2, 2, 32)
      assert batch[name].dtype == dtype
    count += np.bincount(np.asarray(batch["sources"])[..., 0].ravel())
  batches.close()
  np.testing.assert_array_less(abs(count - 16), 16)
  assert count.sum() == 32


def test_the_state_is_that_of_the_last_whole_batch(make_feed, monkeypatch):
  batches = make_feed()
  next(batches)
  state = json.dumps(batches.get_state())

  class Gone:
    def __next__(self):
      raise corpus_lib.DataError("gone")

  with monkeypatch.context() as patch:
    patch.setitem(batches._shards, 1, Gone())
    with pytest.raises(corpus_lib.DataError, match="gone"):
      next(batches)  # shard 0 has moved on
    assert json.dumps(batches.get_state()) == state
  resumed, unbroken = make_feed(), make_feed()
  resumed.set_state(json.loads(state))
  assert json.dumps(resumed.get_state()) == state
  next(unbroken)
  for _ in range(3):
    actual, expected = next(resumed), next(unbroken)
    for name in expected:
      np.testing.assert_array_equal(actual[name], expected[name], name)
  for each in (batches, resumed, unbroken):
    each.close()
