"""Parquet that is odd: each file is documents, or one line."""

import threading
import time

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from tests.train.data import corpora
from train.data import corpus as corpus_lib
from train.data import tables

TEXTS = ["one", "zwei €", None, "", "one", "five"]
EXPECTED = [text or "" for text in TEXTS]
STRINGS = pa.array(TEXTS)


@pytest.mark.parametrize(
  "column",
  [
    STRINGS,
    STRINGS.cast(pa.large_string()),
    STRINGS.dictionary_encode(),
    STRINGS.cast(pa.large_string()).dictionary_encode(),
    pa.chunked_array([STRINGS[:2], STRINGS[2:]]),
  ],
  ids=str,
)
@pytest.mark.parametrize("name", ["x.parquet", "x.PARQ", "x.pq"])
def test_strings_of_all_kinds(tmp_path, column, name):
  corpora.write_parquet(
    tmp_path / name, {"id": range(6), "text": column}, row_group_size=4
  )
  assert corpora.side(corpora.open_in(tmp_path, name)) == EXPECTED


@pytest.mark.parametrize(
  "column",
  [
    pa.array([{"text": "a"}] * 3),
    pa.array([["a"]] * 3),
    pa.array([[("a", "b")]] * 3, pa.map_(pa.string(), pa.string())),
    pa.nulls(3),
    pa.array([b"a"] * 3),
    pa.array([1] * 3).dictionary_encode(),
  ],
  ids=str,
)
def test_what_is_no_string(tmp_path, column):
  columns = {"text": column, "other": ["a"] * 3, "n": range(3)}
  corpora.write_parquet(tmp_path / "x.parquet", columns)
  with pytest.raises(
    corpus_lib.DataError,
    match=r"no column 'text' of strings; give --data.sources.0.text-field one"
    r" of \['other'\], of all columns \['text', 'other', 'n'\]",
  ):
    corpora.open_in(tmp_path, "x.parquet")


def test_names_with_dots_and_names_twice(tmp_path):
  columns = [pa.array([{"b": "in"}] * 3), pa.array(["a.b", "c", "d"])]
  table = pa.table(columns, names=["a", "a.b"])
  parquet.write_table(table, tmp_path / "x.parquet")
  with pytest.raises(corpus_lib.DataError, match="x.parquet"):
    corpora.open_in(tmp_path, "x.parquet", text_field="a.b")
  table = pa.table([pa.array(["a"])] * 2, names=["text", "text"])
  parquet.write_table(table, tmp_path / "y.parquet")
  with pytest.raises(corpus_lib.DataError, match=r"of \[\], of all columns"):
    corpora.open_in(tmp_path, "y.parquet")


def test_twenty_million_nulls(tmp_path):
  nulls = pa.nulls(20_000_000, pa.string())
  text = pa.array(["a text", "and another"])
  start = time.monotonic()
  corpora.write_parquet(tmp_path / "x.parquet", {"text": nulls})
  with pytest.raises(corpus_lib.DataError, match="all of them empty"):
    corpora.open_in(tmp_path, "x.parquet")
  mixed = pa.chunked_array([nulls, text])
  size = len(mixed)
  path = corpora.write_parquet(
    tmp_path / "y.parquet", {"text": mixed}, row_group_size=size
  )
  with pytest.raises(corpus_lib.DataError, match="all empty; remove the empt"):
    corpus_lib.Corpus(corpus_lib.DataConfig(sources=corpora.sources(path)))
  # Nobody waits for all of them to be looked at, one by one.
  assert time.monotonic() - start < 60
  corpora.write_parquet(
    tmp_path / "z.parquet", {"text": mixed}, row_group_size=10_000_000
  )
  documents = corpora.open_in(tmp_path, "z.parquet")
  assert corpora.side(documents) == ["a text", "and another"]
  assert documents.place(1) == (f"{tmp_path}/z.parquet", 20_000_001)


def test_row_groups_that_are_too_large(tmp_path, monkeypatch):
  monkeypatch.setattr(tables, "_GROUP_BYTES", 100_000)
  columns = {"text": [f"{i:0100d}" for i in range(1000)]}
  options = dict(use_dictionary=False)
  small = corpora.write_parquet(
    tmp_path / "small.parquet", columns, row_group_size=500, **options
  )
  assert len(corpora.open_documents(small)) == 1000
  corpora.write_parquet(tmp_path / "large.parquet", columns, **options)
  with pytest.raises(
    corpus_lib.DataError, match="large.parquet has a row group.*row_group_size="
  ):
    corpora.open_in(tmp_path, "large.parquet")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize(
  "options",
  [{}, dict(use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY")],
  ids=["dictionary", "prefixes"],
)
def test_row_groups_that_grow_too_large(tmp_path, monkeypatch, kind, options):
  """A text that comes again takes next to nothing in a file."""
  text = np.random.default_rng(0).bytes(5000).hex()
  column = pa.array(["one"] * 1000 + [text] * 1000, kind)
  path = corpora.write_parquet(
    tmp_path / "x.parquet", {"text": column}, row_group_size=1000, **options
  )
  monkeypatch.setattr(tables, "_GROUP_BYTES", 1_000_000)
  documents = corpora.open_documents(path)
  before = pa.total_allocated_bytes()
  assert documents[999] == "one"
  decoded, decode = [], tables._decode

  def count(file, column, group):
    decoded.append(group)
    return decode(file, column, group)

  monkeypatch.setattr(tables, "_decode", count)
  for i in (1000, 1500, 1999):
    with pytest.raises(
      corpus_lib.DataError,
      match=f"row {i}, is in a row group with more than 1,000,000 bytes of text"
      ".*row_group_size=1000",
    ):
      _ = documents[i]
  assert decoded == [1]
  assert pa.total_allocated_bytes() - before < 3_000_000
  # As categories they are small.
  path = corpora.write_parquet(
    tmp_path / "y.parquet", {"text": column.dictionary_encode()}
  )
  assert corpora.open_documents(path)[1999] == text


def test_a_group_is_decoded_once_and_little_is_kept(tmp_path, monkeypatch):
  columns = {"text": [f"{i:01000d}" for i in range(800)]}
  path = corpora.write_parquet(
    tmp_path / "x.parquet", columns, row_group_size=100
  )
  documents = corpora.open_documents(path)
  decode, decoded = tables._decode, []

  def count(file, column, group):
    decoded.append(group)
    return decode(file, column, group)

  monkeypatch.setattr(tables, "_decode", count)
  threads = [
    threading.Thread(target=documents.__getitem__, args=(i,)) for i in range(8)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert decoded == [0]
  # Two groups of 100 kB are kept, not all eight.
  monkeypatch.setattr(tables, "_CACHED_BYTES", 250_000)
  for i in np.arange(0, 800, 100):
    assert int(documents[int(i)]) == i
  kept = sum(each.nbytes for each in tables._cache.values())
  assert len(tables._cache) == 2 and kept < 250_000


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
  for texts in (["a", "b"], ["c", "d"], ["longer"] * 100):
    path = corpora.write_parquet(tmp_path / "x.parquet", {"text": texts})
    assert corpora.side(corpora.open_documents(path)) == texts


def test_no_valid_text(tmp_path):
  bytes_ = pa.array([b"good", b"\xff\xfe", b"also good"])
  text = pa.Array.from_buffers(pa.string(), 3, bytes_.buffers())
  path = corpora.write_parquet(tmp_path / "x.parquet", {"text": text})
  documents = corpora.open_documents(path)
  assert documents[2] == "also good"
  with pytest.raises(corpus_lib.DataError, match="row 1, is not UTF-8"):
    _ = documents[1]
