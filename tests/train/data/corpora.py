"""Corpora small enough for tests, and what their batches hold."""

import json
import pathlib

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from train.data import corpus as corpus_lib
from train.data import documents as documents_lib
from train.data import sources as sources_lib

EOS = 256


def write(path: pathlib.Path, content: str | bytes) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def write_json_lines(path: pathlib.Path, texts: list[str]) -> str:
  return write(path, "\n".join(json.dumps({"text": text}) for text in texts))


def write_parquet(path, columns, **options) -> str:
  parquet.write_table(pa.table(columns), path, **options)
  return str(path)


def open_documents(path, text_field="text") -> documents_lib.Documents:
  def reject(bad):
    raise bad

  config = corpus_lib.SourceConfig(path=str(path), text_field=text_field)
  return sources_lib.open_documents(config, reject)


def open_in(folder, *names, text_field="text") -> documents_lib.Documents:
  paths = ",".join(f"{folder}/{name}" for name in names)
  return open_documents(paths, text_field)


def sources(*paths: str) -> tuple[corpus_lib.SourceConfig, ...]:
  return tuple(corpus_lib.SourceConfig(path=path) for path in paths)


def make(folder: pathlib.Path, texts, **config) -> corpus_lib.Corpus:
  path = write_json_lines(folder / "texts.jsonl", texts)
  return corpus_lib.Corpus(
    corpus_lib.DataConfig(sources=sources(path), **config)
  )


def words(n: int) -> list[str]:
  """`n` texts of up to 35 bytes that name themselves all along."""
  rng = np.random.default_rng(0)
  # 5 bytes a word: rows of 16 tokens all differ.
  return [f"{i:03d}, " * int(rng.integers(1, 8)) for i in range(n)]


def side(subset) -> list[str]:
  return [subset[i] for i in range(len(subset))]


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def rows(batches, name="tokens"):
  return np.concatenate([batch[name] for batch in batches])


def take_rows(iterator, n):
  """The tokens of the next `n` batches."""
  return rows(take(iterator, n))


def served(tokens) -> list[str]:
  """The documents that a stream of byte tokens holds; the last may be cut."""
  stream = np.ravel(tokens)
  cuts = np.flatnonzero(stream == EOS)
  pieces = np.split(stream, cuts + 1)
  return [bytes(p[p != EOS].tolist()).decode() for p in pieces if len(p)]
