"""Documents, epoch after epoch, as rows of tokens; several sources, as one.

Shapes: R rows of a block, T sequence length, N tokens of a document.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import itertools
import sys
from typing import Any

import grain
from jaxtyping import Int, Int32
import numpy as np

from dsa_jax.chat import tokenizer as tokenizer_lib
from train.data import documents as documents_lib

type Batch = dict[str, np.ndarray]
type State = dict[str, Any]

START = {"document": 0, "used": 0, "rows": 0}  # a place, see `pack`

# Threads that read and tokenise, and how many documents they take at a time.
_THREADS, _GROUP = 4, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """The documents of one side of a source in random order, without end."""

  texts: documents_lib.Texts
  tokenizer: tokenizer_lib.Tokenizer
  seed: int
  shard: int = 0  # of every `shards` documents, this one
  shards: int = 1
  stop: int = sys.maxsize  # length of the stream
  max_tokens: int | None = None  # of a document; None: all of them

  def read(self, n: int) -> tuple[Int32[np.ndarray, " N"], float]:
    """Returns the ids of document `n`, eos last, and the bytes an id is."""
    epoch, i = divmod(n * self.shards + self.shard, len(self.texts))
    text = self.texts[
      grain.experimental.index_shuffle(  # a permutation that takes no memory
        i, len(self.texts) - 1, (self.seed + epoch) % 2**32, rounds=4
      )
    ]
    if not text:
      return np.zeros(0, np.int32), 0.0
    ids = self.tokenizer.encode(text)
    ids = np.append(ids, np.int32(self.tokenizer.eos_id))
    rate = len(text.encode()) / len(ids)
    # From the middle: a document's beginning is not like the rest of it.
    kept = min(len(ids), self.max_tokens or len(ids))
    first = (len(ids) - kept) // 2
    return ids[first : first + kept], rate


def blank(rows: int, seq_len: int) -> Batch:
  """Returns a block [R, T] of nothing but padding, of all but "sources"."""
  names = ("tokens", "segment_ids", "positions")
  block = {name: np.zeros((rows, seq_len), np.int32) for name in names}
  return block | {"bytes": np.zeros((rows, seq_len), np.float32)}


def pack(stream: Stream, block: Batch, place: State) -> State:
  """Lays documents end to end in a blank block [R, T], until they end.

  Begins at `place`: the next document's number, how many of its ids are "used",
  that is, in the block before, and the rows so far. Returns where it ends.

  (grain 0.2.18's ConcatThenSplitIterDataset may skip a document once its state
  went through JSON, hence through Orbax: tuples in it come back as lists.)

  Raises:
    DataError: a whole epoch holds no text, or a document cannot be read.
  """
  rows, seq_len = block["tokens"].shape
  tokens, text_bytes = block["tokens"].reshape(-1), block["bytes"].reshape(-1)
  size = rows * seq_len
  starts = np.zeros(size, bool)
  n, used = place["document"], place["used"]
  filled = empty = 0
  with futures.ThreadPoolExecutor(_THREADS, "data-read") as pool:
    while filled < size and n < stream.stop:
      group = range(n, min(n + _GROUP, stream.stop))
      for ids, rate in pool.map(stream.read, group):
        piece = ids[used : used + size - filled]
        span = slice(filled, filled + len(piece))
        tokens[span], text_bytes[span], starts[span][:1] = piece, rate, True
        filled += len(piece)
        used += len(piece)
        if used < len(ids):
          break
        n, used = n + 1, 0
        empty = 0 if len(ids) else empty + 1
      count = len(stream.texts)
      if empty >= count and not documents_lib.has_text(stream.texts):
        raise documents_lib.DataError(
          f"None of {count} documents can be read any more; see"
          " what became of their files."
        )
  starts = starts.reshape(rows, seq_len)
  starts[:, 0] = True  # a document goes on in the next row as a new segment
  columns = np.arange(seq_len, dtype=np.int32)[None]
  np.cumsum(starts, axis=1, dtype=np.int32, out=block["segment_ids"])
  np.subtract(
    columns,
    np.maximum.accumulate(starts * columns, axis=1),
    out=block["positions"],
  )
  block["segment_ids"].reshape(-1)[filled:] = 0
  block["positions"].reshape(-1)[filled:] = 0
  return {"document": n, "used": used, "rows": place["rows"] + rows}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """A stream of each source, mixed row by row in proportion to the weights."""

  streams: Sequence[Stream]
  weights: Sequence[float]

  @property
  def seeds(self) -> list[int]:
    """Seeds for a shard; an only shard keeps the seeds it would have alone."""
    first = self.streams[0]
    return [first.seed] + [first.shard] * (first.shards > 1)

  def block(
    self, rows: int, seq_len: int, places: list[State], number: int
  ) -> tuple[Batch, Int[np.ndarray, " R"], list[State]]:
    """Packs block `number`; the rows of a source lie together in it.

    Args:
      rows: R.
      seq_len: T.
      places: where each source stands.
      number: of the block; draws the order of its rows.

    Returns:
      The block [R, T]; its rows in an order of which each part is a fair sample
      of the sources (with one source, as they are); and the places at its end.

    Raises:
      DataError: see `pack`.
    """
    dealt = [place["rows"] for place in places]
    everyone = range(len(self.streams))
    owners = np.array([self._deal(dealt, everyone) for _ in range(rows)])
    # The 2 sets it apart from the other draws for a block.
    np.random.default_rng([*self.seeds, number, 2]).shuffle(owners)
    order = np.empty(rows, int)
    order[np.argsort(owners, kind="stable")] = np.arange(rows)
    block, ends = blank(rows, seq_len), []
    cuts = np.searchsorted(np.sort(owners), range(len(self.streams) + 1))
    for stream, place, (begin, end) in zip(
      self.streams, places, itertools.pairwise(cuts)
    ):
      part = {name: array[begin:end] for name, array in block.items()}
      ends.append(pack(stream, part, place) if begin < end else place)
    numbers = np.sort(owners).astype(np.int32)[:, None]
    block["sources"] = np.broadcast_to(numbers, (rows, seq_len))  # no memory
    return block, order, ends

  def batches(
    self, rows: int, seq_len: int, batch_size: int
  ) -> Iterator[Batch]:
    """Returns batches [B, T] in the streams' own order, the last one padded.

    A source that has no more text leaves its rows to the others.

    Args:
      rows: R, how many are packed at a time, of all sources together.
      seq_len: T.
      batch_size: B.
    """
    mixed = self._rows(rows, seq_len)
    while group := list(itertools.islice(mixed, batch_size)):
      batch = blank(batch_size, seq_len)
      batch["sources"] = np.zeros((batch_size, seq_len), np.int32)
      for i, (source, row) in enumerate(group):
        batch["sources"][i] = source
        for name, array in row.items():
          batch[name][i] = array
      yield batch

  def _rows(self, rows: int, seq_len: int) -> Iterator[tuple[int, Batch]]:
    total = sum(self.weights)
    sides = [
      _rows_in_order(stream, max(1, int(rows * weight / total)), seq_len)
      for stream, weight in zip(self.streams, self.weights)
    ]
    dealt, left = [0] * len(sides), set(range(len(sides)))
    while left:
      source = self._deal(dealt, sorted(left))
      row = next(sides[source], None)
      if row is None:
        left.remove(source)
      else:
        yield source, row

  def _deal(self, dealt: list[int], among: Sequence[int]) -> int:
    """Gives the next row to the source that is furthest behind its share.

    With half of that row counted, its rows are fewest for its weight. However
    many rows are dealt, each has its share of them but for a row or so.
    """
    source = min(among, key=lambda s: (dealt[s] + 0.5) / self.weights[s])
    dealt[source] += 1
    return source


def _rows_in_order(stream: Stream, rows: int, seq_len: int) -> Iterator[Batch]:
  place = START
  while True:
    block = blank(rows, seq_len)
    place = pack(stream, block, place)
    for i in range(rows):
      row = {name: array[i] for name, array in block.items()}
      if not row["segment_ids"].any():
        return
      yield row
