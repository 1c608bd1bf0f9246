"""A device of NumPy, on which all that the engine does on the host runs alone.

It computes no model. What it caches for a token is a number that stands for
all tokens up to it and for the weights; what a model would give (samples,
log-probs, experts, keys) is made of that number, and so is what tests expect.
Each program looks at every row that a model would read: one that was never
written, or is another sequence's or older weights', has not the number that
follows from those before it.

`install` puts it in the place of the compiled programs, whose names and
arguments it has. It runs each call at once, but numbers cost next to nothing:
a thousand sequences take a few seconds.

Letters: those of `programs`, and G groups, A pages of a group, S tokens.
"""

import dataclasses
from typing import Any
import zlib

from flax import nnx
from jaxtyping import Int, Int64
import numpy as np
import pytest

from dsa_jax.engine import programs
from dsa_jax.engine import state
from dsa_jax.engine import weights
from tests.model import models

CONFIG = dataclasses.replace(
  models.CONFIG,
  vocab_size=16,  # drafts are right and texts come to their stops by chance
  num_layers=2,
  num_dense_layers=1,
  top_k=1,
)
_PRIME = 2**31 - 1


def mix(*parts) -> Any:
  """A number from 0 to 2**31 that stands for these, each maybe an array."""
  total = np.int64(1)
  for part in parts:
    total = (total * 1_103_515_245 + np.asarray(part, np.int64) + 1) % _PRIME
  return total


def rows(tokens, version: int) -> Int64[np.ndarray, " S"]:
  """What is cached for a sequence."""
  row, found = 0, []
  for token in tokens:
    row = mix(row, token, version)
    found.append(row)
  return np.array(found, np.int64)


def sampled(row, seed, position) -> Any:
  """The token at a position, after the one of this row."""
  return mix(row, seed, position) % CONFIG.vocab_size


def log_probs(row, token) -> Any:
  """Of a token after the one of this row; float32 has all of them."""
  return np.float32(-(mix(row, token) % 2**20) / 2**16)


def untruncated(row, token) -> Any:
  """The same with all of the vocabulary kept."""
  return log_probs(row, token) - 1


def experts(row) -> np.ndarray:
  """[*row, Lmoe, J]."""
  shape = CONFIG.num_moe_layers, CONFIG.experts_per_token
  return _numbers(row, *shape).astype(np.uint16)


def selected(row) -> np.ndarray:
  """[*row, L, K]."""
  return _numbers(row, CONFIG.num_layers, CONFIG.top_k).astype(np.int32)


def _numbers(row, layers: int, each: int) -> np.ndarray:
  numbers = np.arange(layers * each).reshape(layers, each)
  return mix(np.asarray(row)[..., None, None], numbers) % 2**16


@dataclasses.dataclass
class Pool:
  """The cache, [G, A * page]."""

  page: int
  token: Int64[np.ndarray, "G S"]
  row: Int64[np.ndarray, "G S"]
  mtp_row: Int64[np.ndarray, "G S"]
  digest: int = 0
  """Of all calls so far: which pages they were given."""

  def note(self, *arrays: np.ndarray) -> None:
    """Adds to the digest."""
    for array in arrays:
      self.digest = zlib.crc32(array.tobytes(), self.digest)


@dataclasses.dataclass
class Cached:
  """A sequence's rows of the pool, as the weights of this version see them."""

  pool: Pool
  group: int
  pages: Int[np.ndarray, " P"]
  version: int

  def place(self, position) -> tuple[int, Any]:
    """Where the rows of these positions are."""
    size = self.pool.page
    return self.group, self.pages[position // size] * size + position % size

  def read(self, length: int, following: int, *, mtp: bool) -> int:
    """The last of so many rows, all of which are read; a token follows it."""
    at = self.place(np.arange(length))
    tokens_S, rows_S = self.pool.token[at], self.pool.row[at]
    before_S = np.append(0, rows_S)
    np.testing.assert_array_equal(
      *(rows_S, mix(before_S[:-1], tokens_S, self.version)),
      err_msg="rows of another sequence, or of older weights",
    )
    if mtp:
      next_S = np.append(tokens_S, following)[1:]
      np.testing.assert_array_equal(
        *(self.pool.mtp_row[at], mix(rows_S, next_S)),
        err_msg="MTP's rows of another sequence, or of older weights",
      )
    return int(before_S[-1])

  def write(self, position: int, token: int, before: int) -> int:
    """Caches a token, and returns its row."""
    row = mix(before, token, self.version)
    at = self.place(position)
    self.pool.token[at], self.pool.row[at] = token, row
    return int(row)

  def write_mtp(self, position: int, row: int, following: int) -> None:
    """Caches MTP's row of a token, which reads the token after it, too."""
    self.pool.mtp_row[self.place(position)] = mix(row, following)


class Given(np.ndarray):
  """An array as a device gives it; this one is on the host already."""

  def copy_to_host_async(self) -> None:
    """Does nothing."""


def params(version: int) -> nnx.State:
  """Weights: no more than a number."""
  return nnx.State({"version": version})


def make_pool(cfg, pages: int, page: int, *dtypes: None) -> Pool:
  """As `cache.make_pool`."""
  del dtypes
  shape = cfg.rules.shards("batch"), pages * page
  return Pool(page, *np.zeros((3, *shape), np.int64))


def make_slots(cfg, slots: int) -> state.Slots:
  """As `state.empty`."""
  del cfg
  return state.blank(slots)


def admit(cfg, slots, fresh, is_fresh) -> state.Slots:
  """As `programs.admit`."""
  del cfg
  for name in ("length", "pending", "draft", "left", "live", "stop_ids"):
    getattr(slots, name)[is_fresh] = getattr(fresh, name)[is_fresh]
  slots.how.seed[is_fresh] = fresh.how.seed[is_fresh]
  return slots


def copy_pages(cfg, pool: Pool, source, target) -> Pool:
  """As `programs.copy_pages`: all pages are read before any is written."""
  del cfg
  pool.note(source, target)
  for group in range(len(source)):
    is_copy = target[group] >= 0
    for stored in (pool.token, pool.row, pool.mtp_row):
      of_page = stored[group].reshape(-1, pool.page)
      of_page[target[group][is_copy]] = of_page[source[group][is_copy]]
  return pool


def prefill(graphdef, params, pool, chunk, *, kind, with_log_probs):
  """As `programs.prefill`."""
  del graphdef
  pool.note(chunk.pages, chunk.offset, chunk.count)
  R, T = chunk.tokens.shape
  rows_RT = np.zeros((R, T), np.int64)
  for r in range(R):
    group = r * len(pool.row) // R
    cached = Cached(pool, group, chunk.pages[r], params["version"])
    first = int(chunk.offset[r])
    row = cached.read(first, chunk.tokens[r, 0], mtp=kind.speculates)
    for t in range(chunk.count[r]):
      row = cached.write(first + t, int(chunk.tokens[r, t]), row)
      if kind.speculates:
        cached.write_mtp(first + t, row, int(chunk.next_tokens[r, t]))
      rows_RT[r, t] = row
  found = log_probs(rows_RT, chunk.next_tokens)
  given = lambda x: x.view(Given)
  layers_first = lambda x: given(np.moveaxis(x, 2, 0))
  return pool, programs.Prefilled(
    given(found) if with_log_probs else None,
    layers_first(experts(rows_RT)) if kind.experts else None,
    layers_first(selected(rows_RT)) if kind.selected else None,
  )


def decode(graphdef, params, pool, slots, pages, stays, hurries, *, kind):
  """As `programs.decode`."""
  del graphdef
  pool.note(pages, stays)
  n, B, T = kind.steps, len(stays), 1 + kind.speculates
  tokens, rows = np.full((n, B, T), -1), np.zeros((n, B, T), np.int64)
  drafted = np.zeros((n, B), bool)
  slots.live[:] &= stays
  lives = slots.live.copy()
  for i in range(n):
    if not slots.live.any() or hurries and (lives & ~slots.live).any():
      break
    for b in np.flatnonzero(slots.live).tolist():
      group = b * len(pool.row) // B
      cached = Cached(pool, group, pages[b], params["version"])
      found = _step(slots, b, cached, kind.speculates)
      drafted[i, b] = found.drafted
      count = len(found.tokens)
      tokens[i, b, :count], rows[i, b, :count] = found.tokens, found.rows
  given = lambda x: x.view(Given)
  layers_second = lambda x: given(np.moveaxis(x, 3, 1))
  result = programs.Decoded(
    given(tokens.astype(np.int32)),
    given(drafted),
    given(log_probs(rows, tokens)),
    given(untruncated(rows, tokens)),
    None,
    layers_second(experts(rows)) if kind.experts else None,
    layers_second(selected(rows)) if kind.selected else None,
  )
  return pool, slots, result


@dataclasses.dataclass(frozen=True)
class Step:
  """What a slot was given: a token, or two."""

  drafted: bool
  tokens: list[int]
  rows: list[int]


def _step(slots: state.Slots, b: int, cached: Cached, speculates) -> Step:
  """Feeds a slot's pending token, and its draft, if it has one."""
  length, pending = int(slots.length[b]), int(slots.pending[b])
  seed, draft = int(slots.how.seed[b]), int(slots.draft[b])
  stop_ids = np.asarray(slots.stop_ids[b])
  before = cached.read(length, pending, mtp=speculates)
  rows = [cached.write(length, pending, before)]
  tokens = [int(sampled(rows[0], seed, length + 1))]
  drafted = bool(draft >= 0 and slots.left[b] > 1)
  if drafted:
    row = cached.write(length + 1, draft, rows[0])
    if tokens[0] == draft and draft not in stop_ids:
      rows.append(row)
      tokens.append(int(sampled(row, seed, length + 2)))
  count, last = len(tokens), tokens[-1]
  slots.length[b] += count
  slots.pending[b] = last
  slots.left[b] -= count
  slots.live[b] = slots.left[b] > 0 and last not in stop_ids
  if speculates:
    for t in range(count):
      cached.write_mtp(length + t, rows[t], tokens[t])
    after = mix(rows[-1], last, cached.version)
    right = sampled(after, seed, length + count + 1)
    slots.draft[b] = right if after % 3 else (right + 1) % CONFIG.vocab_size
  return Step(drafted, tokens, rows)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
  """Lets engines that are made from now on run on it."""
  for program in (make_pool, make_slots, admit, copy_pages, prefill, decode):
    monkeypatch.setattr(programs, program.__name__, program)
  monkeypatch.setattr(weights, "prepare", lambda *_: (None, params(0), None))
  monkeypatch.setattr(weights, "place", lambda params, shapes, cfg: params)
