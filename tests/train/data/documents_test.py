import contextlib
import io
import json
import os
import pickle
import re
import sys
import types
import unittest.mock

from absl.testing import absltest
from absl.testing import parameterized
from array_record.python import array_record_module
import grain
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import tyro

from tests.train.data import corpus_test
from train.data import corpus as corpus_lib
from train.data import documents as documents_lib
from train.data import sources as sources_lib

rows, served = corpus_test.rows, corpus_test.served
side, take = corpus_test.side, corpus_test.take


def open_documents(path, text_field="text") -> documents_lib.Documents:
  def reject(bad):
    raise bad

  config = corpus_lib.SourceConfig(path=path, text_field=text_field)
  return sources_lib.open_documents(config, reject)


class SplitTest(corpus_test.DataTestCase):
  def test_split(self):
    texts = self.words(3000)
    corpus = self.corpus(texts, heldout_fraction=0.1)
    train, heldout = (
      side(corpus.sources[0].train),
      side(corpus.sources[0].heldout),
    )
    self.assertCountEqual(train + heldout, texts)
    self.assertBetween(len(heldout), 250, 350)
    # Documents added at the end change no side.
    fewer = self.corpus(texts[:2000], heldout_fraction=0.1)
    self.assertEqual(
      side(fewer.sources[0].heldout), heldout[: len(fewer.sources[0].heldout)]
    )
    self.assertEqual(
      side(fewer.sources[0].train), train[: len(fewer.sources[0].train)]
    )

  @parameterized.parameters(1e-9, 0.02, 1 - 1e-9)
  def test_both_sides_have_a_document(self, fraction):
    for n in range(2, 8):
      corpus = self.corpus(self.words(n), heldout_fraction=fraction)
      self.assertNotEmpty(corpus.sources[0].train)
      self.assertNotEmpty(corpus.sources[0].heldout)
      self.assertLen(
        side(corpus.sources[0].train) + side(corpus.sources[0].heldout), n
      )

  def test_one_document_is_too_few(self):
    with self.assertRaisesRegex(
      corpus_lib.DataError, "1 document is too few.*Cut"
    ):
      self.corpus(["text"])


class DocumentsTest(corpus_test.DataTestCase):
  def open(self, *sources, text_field="text") -> documents_lib.Documents:
    paths = ",".join(f"{self.folder}/{source}" for source in sources)
    return open_documents(paths, text_field)

  def write_parquet(self, name, columns, **kwargs):
    path = self.folder / name
    parquet.write_table(pa.table(columns), path, **kwargs)
    return str(path)

  def test_stdlib(self):
    documents = open_documents("stdlib")
    texts = side(documents)
    self.assertGreater(len(texts), 300)
    self.assertTrue(all(texts))
    root = os.path.dirname(os.__file__)
    for name in ("json/decoder.py", "abc.py"):
      with open(os.path.join(root, name), newline="") as file:
        self.assertIn(file.read(), texts)
    corpus = corpus_lib.Corpus(corpus_lib.DataConfig())
    self.assertIn(
      f"{len(corpus.sources[0].train):,} documents to train on", str(corpus)
    )
    self.assertBetween(len(corpus.sources[0].heldout) / len(texts), 0.005, 0.05)
    batch = next(corpus.batches(seq_len=64, batch_size=2, seed=0))
    self.assertEqual(batch["tokens"].shape, (2, 64))

  def test_globs(self):
    self.write("b/deep/1.txt", "one\r\n")
    self.write("a.txt", "zwei €")
    self.write("b/empty.md", "")
    self.write("b/3.MD", "three")
    self.write("b/no.py", "pass")
    expected = ["zwei €", "three", "one\r\n"]
    self.assertEqual(side(self.open("**/*.txt", "b/*.[mM][dD]")), expected)
    # Neither the order of the patterns nor overlaps matter.
    self.assertEqual(
      side(self.open("b/**/*.[mM][dD]", "**/*.txt", "a.*")), expected
    )

  def test_json_lines(self):
    texts = ["one", "zwei €\n", "🙂\u2028x", "", "five"]
    lines = [json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)]
    lines[2] = json.dumps({"text": texts[2]}, ensure_ascii=False)
    lines.insert(1, "")
    self.write("x.jsonl", "\r\n".join(lines) + "\n\n")
    self.write("y.jsonl", '{"text": "last"}')
    self.write("z.jsonl", "")
    self.assertEqual(
      side(self.open("*.jsonl")), [t for t in texts if t] + ["last"]
    )

  def test_parquet(self):
    texts = [f"text {i} é" if i % 7 else None for i in range(25)]
    columns = {"body": texts, "id": list(range(25))}
    self.write_parquet("x.parquet", columns, row_group_size=4)
    documents = self.open("x.parquet", text_field="body")
    self.assertLen(documents, 25)
    for i in np.random.default_rng(0).permutation(25):
      self.assertEqual(documents[int(i)], texts[i] or "")

  def test_empty_parquet_rows_are_skipped(self):
    texts = [""] * 40
    texts[::2] = [f"text {i}" for i in range(20)]
    source = self.write_parquet("x.parquet", {"text": texts})
    corpus = corpus_lib.Corpus(
      corpus_lib.DataConfig(
        sources=corpus_test.sources(source), heldout_fraction=0.3
      )
    )
    self.set_block_tokens(1)  # the stream itself, unshuffled
    batches = corpus.batches(seq_len=16, batch_size=1, seed=0)
    self.assertNotIn("", served(rows(take(batches, 64))))
    batches = corpus.heldout_batches(seq_len=16, batch_size=2, max_batches=99)
    tokens = rows(list(batches))
    heldout = [text for text in side(corpus.sources[0].heldout) if text]
    self.assertCountEqual(served(tokens[tokens > 0]), heldout)

  def write_array_records(self, name, records):
    writer = array_record_module.ArrayRecordWriter(
      f"{self.folder}/{name}", "group_size:1"
    )
    for record in records:
      writer.write(record)
    writer.close()

  @parameterized.parameters("x.array_record", "x.ArrayRecord")
  def test_array_record(self, name):
    texts = ["one", "zwei €\n", "", "vier"]
    records = [json.dumps({"body": text}).encode() for text in texts]
    self.write_array_records(name, records)
    documents = self.open(name, text_field="body")
    self.assertEqual(side(documents), texts)
    self.assertEqual(documents.place(3), (f"{self.folder}/{name}", 3))

  def test_bad_array_records(self):
    self.write_array_records("x.array_record", [b'{"text": "a"}', b"[1]"])
    with self.assertRaisesRegex(
      corpus_lib.DataError, "x.array_record, record 1, holds a list"
    ):
      self.open("x.array_record")
    self.write("x.array_record", b"no record")
    with self.assertRaisesRegex(
      corpus_lib.DataError, "is not ArrayRecord.*narrow"
    ):
      self.open("x.array_record")

  def test_kinds_mix(self):
    self.write("b.txt", "text")
    self.write("c.jsonl", '{"text": "line"}\n{"text": "line 2"}')
    self.write_parquet("a.parquet", {"text": ["row", "row 2"]})
    documents = self.open("*")
    self.assertEqual(
      side(documents), ["row", "row 2", "text", "line", "line 2"]
    )
    copy = pickle.loads(pickle.dumps(documents))
    self.assertEqual(side(copy), side(documents))
    with self.assertRaises(IndexError):
      _ = documents[5]
    with self.assertRaises(IndexError):
      _ = documents[-1]

  def test_threads_may_read_together(self):
    texts = self.words(300)
    self.write_parquet("x.parquet", {"text": texts}, row_group_size=7)
    self.write(
      "y.jsonl", "\n".join(json.dumps({"text": text}) for text in texts)
    )
    documents = self.open("*")
    read = grain.ReadOptions(num_threads=16, prefetch_buffer_size=64)
    dataset = grain.MapDataset.source(documents).to_iter_dataset(read)
    self.assertEqual(list(dataset), texts * 2)

  @parameterized.parameters(
    (
      "x.txt",
      b"ok \xc3\xa9 \xff",
      r"x.txt is not UTF-8: byte 0xff at offset 6",
    ),
    ("x.gz", b"\x1f\x8b\x08", "not UTF-8.*convert it.* or narrow the glob"),
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
  )
  def test_bad_files(self, name, content, message):
    self.write(name, content)
    with self.assertRaisesRegex(corpus_lib.DataError, message):
      self.open("x.*")

  def test_bad_parquet_columns(self):
    columns = {"id": [1, 2], "body": ["a", "b"]}
    self.write_parquet("x.parquet", columns)
    for field in ("text", "id"):
      with self.assertRaisesRegex(
        corpus_lib.DataError, rf"no column '{field}' of strings.*\['body'\]"
      ):
        self.open("x.parquet", text_field=field)

  def test_empty_parquet(self):
    source = self.write_parquet("x.parquet", {"text": ["", None, ""]})
    with self.assertRaisesRegex(corpus_lib.DataError, "all empty; remove"):
      corpus_lib.Corpus(
        corpus_lib.DataConfig(sources=corpus_test.sources(source))
      )
    self.write_parquet("y.parquet", {"text": pa.array([], pa.string())})
    with self.assertRaisesRegex(corpus_lib.DataError, "all of them empty"):
      self.open("y.parquet")

  def test_no_match(self):
    self.write("x.txt", "text")
    with self.assertRaisesRegex(
      corpus_lib.DataError, "nope.*matches no file in /"
    ):
      self.open("x.txt", "nope/*.txt")
    with self.assertRaisesRegex(corpus_lib.DataError, "matches no file"):
      open_documents("")

  def test_missing_pyarrow(self):
    self.write("x.parquet", "")
    with (
      unittest.mock.patch.dict(sys.modules, {"pyarrow": None}),
      self.assertRaisesRegex(
        corpus_lib.DataError, r"pip install .dsa-jax\[parquet"
      ),
    ):
      self.open("x.parquet")


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


class HubDatasetTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.load = unittest.mock.Mock()
    self.load.return_value = Rows(
      {"id": [0, 1, 2], "body": ["one", None, "three"]}
    )
    datasets = types.ModuleType("datasets")
    setattr(datasets, "load_dataset", self.load)  # noqa: B010
    patch = unittest.mock.patch.dict(sys.modules, {"datasets": datasets})
    patch.start()
    self.addCleanup(patch.stop)

  @parameterized.parameters(
    ("hf:squad", "squad", dict(split="train")),
    (
      "hf:allenai/c4?name=en&split=train[:1%]+test",
      "allenai/c4",
      dict(name="en", split="train[:1%]+test"),
    ),
  )
  def test_opens(self, path, name, options):
    documents = open_documents(path, "body")
    self.load.assert_called_once_with(name, **options)
    self.assertEqual(side(documents), ["one", "", "three"])
    self.assertEqual(documents.num_bytes, 1000)
    self.assertEqual(documents.place(2), (path, 2))

  def test_refuses(self):
    with self.assertRaisesRegex(
      corpus_lib.DataError,
      r"no column 'id' of strings.*\['body'\].*\['id', 'body'\]",
    ):
      open_documents("hf:x", "id")
    for path in ("hf:x?config=en", "hf:x?split", "hf:x?name=", "hf:x?&"):
      with self.assertRaisesRegex(corpus_lib.DataError, "is not OPTION=VALUE"):
        open_documents(path, "body")
    self.load.side_effect = FileNotFoundError("no such dataset")
    with self.assertRaisesRegex(
      corpus_lib.DataError, "'hf:x' cannot be loaded .*no such dataset"
    ):
      open_documents("hf:x", "body")

  def test_missing_package(self):
    with (
      unittest.mock.patch.dict(sys.modules, {"datasets": None}),
      self.assertRaisesRegex(
        corpus_lib.DataError, r"pip install .dsa-jax\[datasets"
      ),
    ):
      open_documents("hf:x")


class DataConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(heldout_fraction=0.0),
    dict(heldout_fraction=1.0),
    dict(heldout_fraction=float("nan")),
    dict(shuffle_seed=-1),
  )
  def test_validates(self, **config):
    (name,) = config
    with self.assertRaisesRegex(corpus_lib.DataError, name):
      corpus_lib.DataConfig(**config)

  def test_help(self):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), self.assertRaises(SystemExit):
      tyro.cli(corpus_lib.DataConfig, args=["--help"])
    help_text = re.sub(r"[│\s]+", " ", printed.getvalue())
    for words in (
      "Python's standard library",
      "Field (JSON) or column",
      "path of a tokenizer.json",
      "kept out of training",
      "order of the training documents",
    ):
      self.assertIn(words, help_text)


if __name__ == "__main__":
  absltest.main()
