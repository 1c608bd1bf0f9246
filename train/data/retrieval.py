"""Text with key-value pairs planted in it, and questions for them.

A pair reads `[abcd1234]`. At the end of its document the same text comes again
as a question: after `[abcd` only `1234` can follow, and to know it the model
must find the pair, however far back. One pair in a long document is a
needle in a haystack, many pairs are multi-query associative recall.

Shapes: B batch, T sequence length, L tokens of a document, P pairs of a
document, D depths, A tokens of the longest possible answer.
"""

from collections.abc import Sequence
import dataclasses
import math
import string
from typing import Annotated

from jaxtyping import Float, Float32, Int32
import numpy as np

from dsa_jax import ranges
from dsa_jax.chat import tokenizer as tokenizer_lib
from train.data import documents as documents_lib

# Where probes hold their pairs, as fractions of the text before the questions:
# the middles of ten equal parts.
DEPTHS = (np.arange(10) + 0.5) / 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
  """Key-value pairs in text: how many rows to train on, and what they hold."""

  fraction: ranges.Fraction = 0.0
  """Fraction of the training rows that hold pairs and questions for them."""
  key_letters: Annotated[int, ranges.Interval(1, 12)] = 4  # 26^12 fits 64 bits
  """Letters of a key, random; the keys of a document are distinct."""
  value_digits: Annotated[int, ranges.Interval(1, 1000)] = 4
  """Digits of a value, random."""
  min_tokens: Annotated[int, ranges.Interval(1, 2**24)] = 64
  """Length of the shortest document; the longest fills a row."""
  eval_rows: Annotated[int, ranges.Interval(1, 2**20)] = 32
  """Rows to evaluate on at each length; full batches, so maybe a few more."""

  def __post_init__(self):
    ranges.check(self, documents_lib.DataError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probes:
  """A batch of documents, one a row, that ask for a pair at each depth."""

  tokens: Int32[np.ndarray, "B T"]
  """Ids; 0 where padded."""
  segment_ids: Int32[np.ndarray, "B T"]
  """1; 0 where padded."""
  positions: Int32[np.ndarray, "B T"]
  """Place in the document, from 0; 0 where padded."""
  at: Int32[np.ndarray, "B D A"]
  """Place in T whose prediction must be the answer's token: the one before it.
  -1 past the answer's end. D is in the order of `DEPTHS`."""
  answers: Int32[np.ndarray, "B D A"]
  """The answer's tokens; -1 past its end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Document:
  tokens: Int32[np.ndarray, " L"]
  filler: int  # tokens of filler in it
  questions: list[int]  # place of the first token of each pair's answer
  values: list[Int32[np.ndarray, " _"]]  # each pair's answer


class Planter:
  """Plants pairs in rows of packed text, and asks for them.

  Any tokenizer will do: key, value and closing bracket are encoded apart, so a
  pair has the same ids wherever it stands, and those of its value are known.

  Attributes:
    config: what it was made with.
  """

  config: RetrievalConfig

  def __init__(
    self, config: RetrievalConfig, tokenizer: tokenizer_lib.Tokenizer
  ):
    self.config, self._tokenizer = config, tokenizer
    self._close = tokenizer.encode("]")
    # A text takes no more tokens than its characters do one by one.
    size = lambda characters: max(len(tokenizer.encode(c)) for c in characters)
    self._value_size = config.value_digits * size(string.digits)
    self._pair_size = (
      size("[")
      + config.key_letters * size(string.ascii_lowercase)
      + self._value_size
      + len(self._close)
    )

  def least_tokens(self, pairs: int) -> int:
    """Returns a length that `pairs` pairs, their questions and eos fit in."""
    return 2 * pairs * self._pair_size + 1

  def plant(
    self,
    tokens: Int32[np.ndarray, " T"],
    text_bytes: Float32[np.ndarray, " T"],
    rng: np.random.Generator,
  ) -> dict[str, np.ndarray]:
    """Turns a row of packed text into whole documents with pairs.

    Their lengths are log-uniform: as many are short as long. Pairs, from one to
    what fills half a document with their questions, are uniform, so that there
    is much to learn from. A rest in which no pair fits is text alone. Each
    document is a segment and ends with eos.

    Args:
      tokens: the filler; its own eos are left out. If it runs short of the few
        tokens that they were, it begins again.
      text_bytes: UTF-8 bytes that each of them stands for.
      rng: draws everything.

    Returns:
      The row's arrays [T], those of a batch: see `train/data/corpus.py`.
    """
    seq_len = len(tokens)
    is_text = tokens != self._tokenizer.eos_id
    filler = np.resize(tokens[is_text], seq_len)
    filler_bytes = np.resize(text_bytes[is_text], seq_len)
    pair_bytes = len("[]") + self.config.key_letters
    pair_bytes += self.config.value_digits
    shortest = self.config.min_tokens
    documents, rates = [], []
    left, used = seq_len, 0
    while left:
      length = _log_uniform(rng, shortest, max(shortest, seq_len))
      length = min(length, left)
      pairs = self._draw_pairs(length, rng)
      depths = np.sort(rng.random(pairs))
      document = self._document(length, depths, filler[used:], rng)
      end = used + document.filler
      size = filler_bytes[used:end].sum() + 2 * pairs * pair_bytes
      documents.append(document.tokens)
      rates.append(size / length)
      left, used = left - length, end
    lengths = np.array([len(document) for document in documents])
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    numbers = np.arange(1, 1 + len(documents), dtype=np.int32)
    return {
      "tokens": np.concatenate(documents),
      "segment_ids": np.repeat(numbers, lengths),
      "positions": (np.arange(seq_len) - starts).astype(np.int32),
      "bytes": np.repeat(np.array(rates, np.float32), lengths),
    }

  def probes(
    self,
    tokens_BL: Int32[np.ndarray, "B L"],
    seq_len: int,
    rng: np.random.Generator,
  ) -> Probes:
    """Turns rows of packed text into one document each, padded to T.

    Args:
      tokens_BL: the filler, see `plant`; L is the length of the documents.
      seq_len: T.
      rng: draws everything.
    """
    batch, length = tokens_BL.shape
    tokens_BT = np.zeros((batch, seq_len), np.int32)
    at = np.full((batch, len(DEPTHS), self._value_size), -1, np.int32)
    answers = at.copy()
    for b, row in enumerate(tokens_BL):
      filler = np.resize(row[row != self._tokenizer.eos_id], length)
      document = self._document(length, DEPTHS, filler, rng)
      tokens_BT[b, :length] = document.tokens
      for d, (place, value) in enumerate(
        zip(document.questions, document.values)
      ):
        at[b, d, : len(value)] = place - 1 + np.arange(len(value))
        answers[b, d, : len(value)] = value
    columns = np.arange(seq_len, dtype=np.int32)
    inside = np.tile(columns < length, (batch, 1))
    return Probes(
      tokens=tokens_BT,
      segment_ids=inside.astype(np.int32),
      positions=np.where(inside, columns, 0).astype(np.int32),
      at=at,
      answers=answers,
    )

  def _draw_pairs(self, length: int, rng: np.random.Generator) -> int:
    """Returns a number of pairs for a document of `length` tokens."""
    if length < self.least_tokens(1):
      return 0
    half = length // 2 // (2 * self._pair_size)
    keys = len(string.ascii_lowercase) ** self.config.key_letters
    return int(rng.integers(1, min(max(half, 1), keys), endpoint=True))

  def _document(
    self,
    length: int,
    depths: Float[np.ndarray, " P"],
    filler: Int32[np.ndarray, " _"],
    rng: np.random.Generator,
  ) -> _Document:
    """Returns `length` tokens: filler and a pair at each depth, questions, eos.

    Args:
      length: at least `least_tokens(P)`.
      depths: ascending in [0, 1], how much of the filler goes before each pair.
        A pair that ends up in the middle of P equal parts of the filler is in
        the middle of P equal parts of filler and pairs together, too.
      filler: as much as is needed is taken from its beginning.
      rng: draws the pairs and the order of the questions.
    """
    keys, values = self._encode_pairs(len(depths), rng)
    pairs = [np.concatenate([k, v, self._close]) for k, v in zip(keys, values)]
    num_filler = length - 1 - 2 * sum(map(len, pairs))
    cuts = np.rint(depths * num_filler).astype(np.int64)
    texts = np.split(filler[:num_filler], cuts)
    pieces = [texts[0]]
    for pair, text in zip(pairs, texts[1:]):
      pieces += [pair, text]
    place = length - 1 - sum(map(len, pairs))
    questions = [0] * len(pairs)
    for i in rng.permutation(len(pairs)):
      pieces.append(pairs[i])
      questions[i] = place + len(keys[i])
      place += len(pairs[i])
    pieces.append(np.array([self._tokenizer.eos_id], np.int32))
    return _Document(
      tokens=np.concatenate(pieces),
      filler=num_filler,
      questions=questions,
      values=values,
    )

  def _encode_pairs(
    self, pairs: int, rng: np.random.Generator
  ) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the ids of `[key` and of the value, for each of some pairs."""
    letters, digits = self.config.key_letters, self.config.value_digits
    base = len(string.ascii_lowercase)
    numbers = rng.choice(base**letters, pairs, replace=False)
    keys = numbers[:, None] // base ** np.arange(letters) % base
    values = rng.integers(0, 10, (pairs, digits))
    encode = self._tokenizer.encode
    return (
      [encode(f"[{key}") for key in _spell(keys, "a")],
      [encode(value) for value in _spell(values, "0")],
    )


def _spell(codes: np.ndarray, first: str) -> Sequence[str]:
  """Returns a string for each row of `codes`, which count from `first`."""
  return [row.tobytes().decode() for row in (codes + ord(first)).astype("u1")]


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
  """Returns an integer of [low, high], small ones more often: ~ 1 / value."""
  value = math.exp(rng.uniform(math.log(low), math.log(high + 1)))
  return min(max(int(value), low), high)
