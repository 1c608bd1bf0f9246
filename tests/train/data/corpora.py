"""Corpora small enough for tests, and what their batches hold."""

import json
import pathlib

import numpy as np

from train.data import corpus as corpus_lib

EOS = 256


def write(path: pathlib.Path, content: str | bytes) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def write_json_lines(path: pathlib.Path, texts: list[str]) -> str:
  return write(path, "\n".join(json.dumps({"text": text}) for text in texts))


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
