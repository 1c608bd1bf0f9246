"""Documents of each kind of file, good and bad, and their split."""

import json
import os
import pickle
import re
import sys
import types
from unittest import mock
import zlib

from array_record.python import array_record_module
import grain
import numpy as np
import pyarrow as pa
import pytest
import tyro

from tests.train.data import corpora
from train.data import corpus as corpus_lib
from train.data import documents as documents_lib


def write_array_records(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def test_split(tmp_path):
  texts = corpora.words(3000)
  corpus = corpora.make(tmp_path, texts, heldout_fraction=0.1)
  (source,) = corpus.sources
  train, heldout = corpora.side(source.train), corpora.side(source.heldout)
  assert sorted(train + heldout) == sorted(texts)
  assert 250 <= len(heldout) <= 350
  # Documents added at the end change no side.
  (fewer,) = corpora.make(tmp_path, texts[:2000], heldout_fraction=0.1).sources
  assert corpora.side(fewer.heldout) == heldout[: len(fewer.heldout)]
  assert corpora.side(fewer.train) == train[: len(fewer.train)]


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 99, 101, 1000, 12345])
def test_the_split_hangs_on_the_number_alone(count):
  expected = [zlib.crc32(str(i).encode()) for i in range(count)]
  assert documents_lib._hashes(count).tolist() == expected


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 1 - 1e-6])
def test_both_sides_have_a_document(tmp_path, fraction):
  for n in range(2, 8):
    corpus = corpora.make(tmp_path, corpora.words(n), heldout_fraction=fraction)
    (source,) = corpus.sources
    train, heldout = corpora.side(source.train), corpora.side(source.heldout)
    assert train
    assert heldout
    assert len(train + heldout) == n


def test_one_document_is_too_few(tmp_path):
  with pytest.raises(corpus_lib.DataError, match="1 document is too few.*Cut"):
    corpora.make(tmp_path, ["text"])


def test_stdlib():
  documents = corpora.open_documents("stdlib")
  texts = corpora.side(documents)
  assert len(texts) > 300
  assert all(texts)
  root = os.path.dirname(os.__file__)
  for name in ("json/decoder.py", "abc.py"):
    with open(os.path.join(root, name), newline="") as file:
      assert file.read() in texts
  corpus = corpus_lib.Corpus(corpus_lib.DataConfig())
  (source,) = corpus.sources
  assert f"{len(source.train):,} documents to train on" in str(corpus)
  assert 0.005 <= len(source.heldout) / len(texts) <= 0.05
  batch = next(corpus.batches(seq_len=64, batch_size=2, seed=0))
  assert batch["tokens"].shape == (2, 64)


def test_globs(tmp_path):
  corpora.write(tmp_path / "b/deep/1.txt", "one\r\n")
  corpora.write(tmp_path / "a.txt", "zwei €")
  corpora.write(tmp_path / "b/empty.md", "")
  corpora.write(tmp_path / "b/3.MD", "three")
  corpora.write(tmp_path / "b/no.py", "pass")
  expected = ["zwei €", "three", "one\r\n"]
  documents = corpora.open_in(tmp_path, "**/*.txt", "b/*.[mM][dD]")
  assert corpora.side(documents) == expected
  # Neither the order of the patterns nor overlaps matter.
  documents = corpora.open_in(tmp_path, "b/**/*.[mM][dD]", "**/*.txt", "a.*")
  assert corpora.side(documents) == expected


def test_json_lines(tmp_path):
  texts = ["one", "zwei €\n", "🙂\u2028x", "", "five"]
  lines = [json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)]
  lines[2] = json.dumps({"text": texts[2]}, ensure_ascii=False)
  lines.insert(1, "")
  corpora.write(tmp_path / "x.jsonl", "\r\n".join(lines) + "\n\n")
  corpora.write(tmp_path / "y.jsonl", '{"text": "last"}')
  corpora.write(tmp_path / "z.jsonl", "")
  expected = [text for text in texts if text] + ["last"]
  assert corpora.side(corpora.open_in(tmp_path, "*.jsonl")) == expected


def test_parquet(tmp_path):
  texts = [f"text {i} é" if i % 7 else None for i in range(25)]
  columns = {"body": texts, "id": list(range(25))}
  corpora.write_parquet(tmp_path / "x.parquet", columns, row_group_size=4)
  documents = corpora.open_in(tmp_path, "x.parquet", text_field="body")
  assert len(documents) == 25
  for i in np.random.default_rng(0).permutation(25):
    assert documents[int(i)] == (texts[i] or "")


def test_empty_parquet_rows_are_skipped(tmp_path, set_block_tokens):
  texts = [""] * 40
  texts[::2] = [f"text {i}" for i in range(20)]
  source = corpora.write_parquet(tmp_path / "x.parquet", {"text": texts})
  corpus = corpus_lib.Corpus(
    corpus_lib.DataConfig(sources=corpora.sources(source), heldout_fraction=0.3)
  )
  set_block_tokens(1)  # the stream itself, unshuffled
  batches = corpus.batches(seq_len=16, batch_size=1, seed=0)
  assert "" not in corpora.served(corpora.take_rows(batches, 64))
  batches = corpus.heldout_batches(seq_len=16, batch_size=2, max_batches=99)
  tokens = corpora.rows(list(batches))
  heldout = [text for text in corpora.side(corpus.sources[0].heldout) if text]
  assert sorted(corpora.served(tokens[tokens > 0])) == sorted(heldout)


@pytest.mark.parametrize("name", ["x.array_record", "x.ArrayRecord"])
def test_array_record(tmp_path, name):
  texts = ["one", "zwei €\n", "", "vier"]
  records = [json.dumps({"body": text}).encode() for text in texts]
  write_array_records(tmp_path / name, records)
  documents = corpora.open_in(tmp_path, name, text_field="body")
  assert corpora.side(documents) == texts
  assert documents.place(3) == (f"{tmp_path}/{name}", 3)


def test_bad_array_records(tmp_path):
  write_array_records(tmp_path / "x.array_record", [b'{"text": "a"}', b"[1]"])
  with pytest.raises(
    corpus_lib.DataError, match="x.array_record, record 1, holds a list"
  ):
    corpora.open_in(tmp_path, "x.array_record")
  corpora.write(tmp_path / "x.array_record", b"no record")
  with pytest.raises(corpus_lib.DataError, match="is not ArrayRecord.*narrow"):
    corpora.open_in(tmp_path, "x.array_record")


def test_kinds_mix(tmp_path):
  corpora.write(tmp_path / "b.txt", "text")
  corpora.write(tmp_path / "c.jsonl", '{"text": "line"}\n{"text": "line 2"}')
  corpora.write_parquet(tmp_path / "a.parquet", {"text": ["row", "row 2"]})
  documents = corpora.open_in(tmp_path, "*")
  assert corpora.side(documents) == ["row", "row 2", "text", "line", "line 2"]
  copy = pickle.loads(pickle.dumps(documents))
  assert corpora.side(copy) == corpora.side(documents)
  with pytest.raises(IndexError):
    _ = documents[5]
  with pytest.raises(IndexError):
    _ = documents[-1]


def test_threads_may_read_together(tmp_path):
  texts = corpora.words(300)
  corpora.write_parquet(
    tmp_path / "x.parquet", {"text": texts}, row_group_size=7
  )
  corpora.write_json_lines(tmp_path / "y.jsonl", texts)
  documents = corpora.open_in(tmp_path, "*")
  read = grain.ReadOptions(num_threads=16, prefetch_buffer_size=64)
  dataset = grain.MapDataset.source(documents).to_iter_dataset(read)
  assert list(dataset) == texts * 2


@pytest.mark.parametrize(
  "name, content, message",
  [
    (
      "x.txt",
      b"ok \xc3\xa9 \xff",
      r"x.txt is not UTF-8: byte 0xff at offset 6",
    ),
    ("x.gz", b"\x1f\x8b\x08", "x.gz cannot be unpacked.*Write it anew"),
    ("x.txt", b"", "1 files, all of them empty; point it at"),
    ("x.jsonl", b'\n\n{"text": ""}\n', "all of them empty"),
    ("x.jsonl", b'{"text": "a"}\n{"text"', "x.jsonl:2 is not JSON"),
    ("x.jsonl", b'{"text": "a"}\n\n[1]', "x.jsonl:3 holds a list, not an obj"),
    ("x.jsonl", b'{"body": "a"}', r"x.jsonl:1 has no field 'text'.*\['body'\]"),
    ("x.jsonl", b'{"text": null}', "x.jsonl:1: field 'text' holds a NoneType"),
    ("x.jsonl", b'{"text": "\\ud800"}', "x.jsonl:1: .*not valid Unicode"),
    ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "0xff at offset 24"),
    ("x.parquet", b"PAR", "x.parquet is not Parquet.*narrow the glob"),
    ("x.parquet", b"", "x.parquet is not Parquet"),
  ],
)
def test_bad_files(tmp_path, name, content, message):
  corpora.write(tmp_path / name, content)
  with pytest.raises(corpus_lib.DataError, match=message):
    corpora.open_in(tmp_path, "x.*")


def test_bad_parquet_columns(tmp_path):
  columns = {"id": [1, 2], "body": ["a", "b"]}
  corpora.write_parquet(tmp_path / "x.parquet", columns)
  for field in ("text", "id"):
    with pytest.raises(
      corpus_lib.DataError, match=rf"no column '{field}' of strings.*\['body'\]"
    ):
      corpora.open_in(tmp_path, "x.parquet", text_field=field)


def test_empty_parquet(tmp_path):
  source = corpora.write_parquet(
    tmp_path / "x.parquet", {"text": ["", None, ""]}
  )
  with pytest.raises(corpus_lib.DataError, match="all empty; remove"):
    corpus_lib.Corpus(corpus_lib.DataConfig(sources=corpora.sources(source)))
  corpora.write_parquet(
    tmp_path / "y.parquet", {"text": pa.array([], pa.string())}
  )
  with pytest.raises(corpus_lib.DataError, match="all of them empty"):
    corpora.open_in(tmp_path, "y.parquet")


def test_no_match(tmp_path):
  corpora.write(tmp_path / "x.txt", "text")
  with pytest.raises(corpus_lib.DataError, match="nope.*matches no file in /"):
    corpora.open_in(tmp_path, "x.txt", "nope/*.txt")
  with pytest.raises(corpus_lib.DataError, match="matches no file"):
    corpora.open_documents(" ")


def test_missing_pyarrow(tmp_path, monkeypatch):
  corpora.write(tmp_path / "x.parquet", "")
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(
    corpus_lib.DataError, match=r"pip install .dsa-jax\[parquet"
  ):
    corpora.open_in(tmp_path, "x.parquet")


class Rows:
  """As much of a `datasets.Dataset` as is used."""

  def __init__(self, columns):
    self._columns = columns
    names = {str: "string", int: "int64"}
    self.features = {
      name: types.SimpleNamespace(dtype=names[type(values[0])])
      for name, values in columns.items()
    }
    self.data = types.SimpleNamespace(nbytes=1000)

  def select_columns(self, names):
    return Rows({name: self._columns[name] for name in names})

  def __len__(self):
    return len(next(iter(self._columns.values())))

  def __getitem__(self, i):
    return {name: values[i] for name, values in self._columns.items()}


@pytest.fixture
def load_dataset(monkeypatch):
  """Takes the place of `datasets.load_dataset`."""
  rows = Rows({"id": [0, 1, 2], "body": ["one", None, "three"]})
  load_dataset = mock.Mock(return_value=rows)
  datasets = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, "datasets", datasets)
  return load_dataset


@pytest.mark.parametrize(
  "path, name, options",
  [
    ("hf:squad", "squad", dict(split="train")),
    (
      "hf:allenai/c4?name=en&split=train[:1%]+test",
      "allenai/c4",
      dict(name="en", split="train[:1%]+test"),
    ),
  ],
)
def test_opens_a_dataset_of_the_hub(load_dataset, path, name, options):
  documents = corpora.open_documents(path, "body")
  load_dataset.assert_called_once_with(name, **options)
  assert corpora.side(documents) == ["one", "", "three"]
  assert documents.num_bytes == 1000
  assert documents.place(2) == (path, 2)


def test_refuses_a_dataset_of_the_hub(load_dataset):
  with pytest.raises(
    corpus_lib.DataError,
    match=r"no column 'id' of strings.*\['body'\].*\['id', 'body'\]",
  ):
    corpora.open_documents("hf:x", "id")
  for path in ("hf:x?config=en", "hf:x?split", "hf:x?name=", "hf:x?&"):
    with pytest.raises(corpus_lib.DataError, match="is not OPTION=VALUE"):
      corpora.open_documents(path, "body")
  load_dataset.side_effect = FileNotFoundError("no such dataset")
  with pytest.raises(
    corpus_lib.DataError, match="'hf:x' cannot be loaded .*no such dataset"
  ):
    corpora.open_documents("hf:x", "body")


def test_missing_datasets(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(
    corpus_lib.DataError, match=r"pip install .dsa-jax\[datasets"
  ):
    corpora.open_documents("hf:x")


@pytest.mark.parametrize(
  "config",
  [
    dict(heldout_fraction=0.0),
    dict(heldout_fraction=1.0),
    dict(heldout_fraction=float("nan")),
    dict(shuffle_seed=-1),
  ],
)
def test_config_validates(config):
  (name,) = config
  with pytest.raises(corpus_lib.DataError, match=name):
    corpus_lib.DataConfig(**config)


def test_help(capsys):
  with pytest.raises(SystemExit):
    tyro.cli(corpus_lib.DataConfig, args=["--help"])
  help_text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
  for words in (
    "Python's standard library",
    "Field (JSON) or column",
    "path of a tokenizer.json",
    "kept out of training",
    "order of the training documents",
  ):
    assert words in help_text
