"""Text to packed batches: documents -> tokens -> blocks -> shuffled rows.

Some rows of a block may have their text turned into the filler of retrieval
documents, see `train/retrieval.py`.

Shapes: B batch, T sequence length, R rows of a block, N tokens of a document.

A batch is a dict of four arrays [B, T]:
  tokens       int32, ids; 0 where padded
  segment_ids  int32, number of the document in its row, from 1; 0 = padding
  positions    int32, place in that segment, from 0
  bytes        float32, UTF-8 bytes that the token stands for. A document's
               tokens, eos included, share its bytes evenly, so
               sum(nats) / log(2) / sum(bytes) is bits per byte.
"""

from collections.abc import Iterator
from concurrent import futures
import dataclasses
import functools
import itertools
import sys
from typing import Any

import grain
from jaxtyping import Int32
import numpy as np

from train import documents as documents_lib
from train import retrieval as retrieval_lib
from train import tokenizer as tokenizer_lib

DataError = documents_lib.DataError

type Batch = dict[str, np.ndarray]
type State = dict[str, Any]

_START = {"document": 0, "used": 0}  # a place, see `_pack`

# Rows are shuffled in blocks of about this many tokens: some hundred source
# files, or thousands of web pages. Two blocks live, 16 bytes of memory a token.
_BLOCK_TOKENS = 1 << 21

# Threads that read and tokenise, and how many documents they take at a time.
_THREADS, _GROUP = 4, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Which text to train on, and how."""

  source: str = "stdlib"
  """"stdlib" (the source code of Python's standard library), or globs with
  commas between them: text files, *.jsonl, *.parquet."""
  text_field: str = "text"
  """Field (JSON lines) or column (Parquet) that holds the text."""
  tokenizer: str = "bytes"
  """"bytes", or the path of a tokenizer.json."""
  heldout_fraction: float = 0.02
  """Fraction of the documents kept out of training, to evaluate on."""
  shuffle_seed: int = 0
  """Another seed, another order of the training documents."""
  shards: int = 1
  """Independent streams that the training documents are dealt to; a process
  reads those of its own rows only. The data hang on this number, not on that of
  processes or devices. It must divide the rows of a microbatch."""
  retrieval: retrieval_lib.RetrievalConfig = retrieval_lib.RetrievalConfig()
  """Synthetic key-value retrieval, mixed into the training rows."""

  def __post_init__(self):
    if not 0 < self.heldout_fraction < 1:
      raise DataError(f"{self.heldout_fraction=} must lie between 0 and 1.")
    if self.shards < 1:
      raise DataError(f"{self.shards=} must be at least 1.")
    if self.shuffle_seed < 0:
      raise DataError(f"{self.shuffle_seed=} must be 0 or more.")


class Corpus:
  """A collection of documents, some of them held out, and its tokenizer.

  Attributes:
    tokenizer: see `train/tokenizer.py`.
    train: the documents to train on.
    heldout: the others, see `documents.split`.
  """

  tokenizer: tokenizer_lib.Tokenizer
  train: documents_lib.Subset
  heldout: documents_lib.Subset

  def __init__(self, config: DataConfig):
    """Opens and checks everything that `config` names.

    Raises:
      DataError: see `HfTokenizer`, `open_documents` and `split`.
    """
    self._config = config
    self.tokenizer = tokenizer_lib.load_tokenizer(config.tokenizer)
    documents = documents_lib.open_documents(config.source, config.text_field)
    self._num_bytes = documents.num_bytes
    self.train, self.heldout = documents_lib.split(
      documents, config.heldout_fraction
    )
    self._planter = retrieval_lib.Planter(config.retrieval, self.tokenizer)

  def __str__(self) -> str:
    """One line for a log."""
    return (
      f"{self._config.source}: {len(self.train):,} documents to train on,"
      f" {len(self.heldout):,} held out ({self._num_bytes / 1e6:,.1f} MB on"
      f" disk); tokenizer {self._config.tokenizer}"
      f" ({self.tokenizer.vocab_size:,} ids)"
    )

  def batches(
    self, *, seq_len: int, batch_size: int, seed: int, shard: int = 0
  ) -> grain.DatasetIterator[Batch]:
    """Returns endless training batches [B, T], packed without padding.

    Of one of `shards` streams; each has every so many-th document of all.

    Each epoch lays all training documents end to end in a new order; rows cut
    this stream every T tokens and are shuffled in blocks. `shuffle_seed` and
    `seed` (not negative) choose the order. After Orbax or `set_state` restored
    the iterator, the next batch is exactly the one that would have come.
    `retrieval.fraction` of the rows have pairs planted in their text.

    Raises:
      DataError: a size is below 1, or too small for retrieval; or a state of
        other settings is restored.
    """
    seeds = np.random.SeedSequence([self._config.shuffle_seed, seed])
    seed = int(seeds.generate_state(1)[0])
    stream = _Stream(
      texts=self.train,
      tokenizer=self.tokenizer,
      seed=seed,
      shard=shard,
      shards=self._config.shards,
    )
    rows = self.check_sizes(seq_len, batch_size)
    return _ShuffledBatches(stream, self._planter, rows, seq_len, batch_size)

  def check_sizes(self, seq_len: int, batch_size: int) -> int:
    """Returns the rows of a block of `batches` of this size.

    Raises:
      DataError: a size is below 1, or too small for retrieval.
    """
    retrieval = self._config.retrieval
    if retrieval.fraction:
      least = self._planter.least_tokens(1)
      if min(seq_len, retrieval.min_tokens) < least:
        raise DataError(
          f"{seq_len=} and {retrieval.min_tokens=} must be at least {least}, a"
          " pair and its question; raise them, or set retrieval.fraction=0."
        )
    return self._block_rows(seq_len, batch_size)

  def heldout_batches(
    self, *, seq_len: int, batch_size: int, max_batches: int
  ) -> Iterator[Batch]:
    """Returns the same batches [B, T] of held-out text at each call.

    Documents come from all over the collection, each cut to its middle, an
    equal share of `max_batches` (but not below T), lest a huge one be the whole
    evaluation: fewer batches may come though text is left. The last is padded.

    Raises:
      DataError: a size is below 1.
    """
    rows = min(self._block_rows(seq_len, batch_size), max_batches * batch_size)
    stream = self._heldout_stream(max_batches * batch_size, seq_len)
    stream = dataclasses.replace(stream, stop=len(self.heldout))
    batches = _batches_in_order(stream, rows, seq_len, batch_size)
    return itertools.islice(batches, max_batches)

  @property
  def least_probe_tokens(self) -> int:
    """The shortest length of `retrieval_probes`."""
    return self._planter.least_tokens(len(retrieval_lib.DEPTHS))

  def retrieval_probes(
    self, *, seq_len: int, batch_size: int, length: int
  ) -> Iterator[retrieval_lib.Probes]:
    """Returns the same probes [B, T] of held-out text at each call.

    `retrieval.eval_rows` rows, rounded up to full batches. Each holds one
    document of `length` tokens, padded to T, whatever `retrieval.fraction` is.

    Raises:
      DataError: a size is below 1, or the pairs or T do not fit `length`.
    """
    self._block_rows(seq_len, batch_size)
    least = self.least_probe_tokens
    if not least <= length <= seq_len:
      raise DataError(
        f"{length=} must be in [{least}, {seq_len=}]: probes ask for"
        f" {len(retrieval_lib.DEPTHS)} pairs and are padded to the sequence."
      )
    batches = -(-self._config.retrieval.eval_rows // batch_size)
    stream = self._heldout_stream(batches * batch_size, length)
    batch_shape = (batch_size, length)
    return _probes(stream, self._planter, batches, batch_shape, seq_len)

  def _heldout_stream(self, rows: int, seq_len: int) -> "_Stream":
    """Returns the held-out documents, an equal share of the rows from each."""
    return _Stream(
      texts=self.heldout,
      tokenizer=self.tokenizer,
      seed=0,  # always: any prefix of this order is a fair sample
      max_tokens=max(rows * seq_len // len(self.heldout), seq_len),
    )

  def _block_rows(self, seq_len: int, batch_size: int) -> int:
    if min(seq_len, batch_size) < 1:
      raise DataError(f"{seq_len=} and {batch_size=} must be at least 1.")
    # Longer than an epoch, a block would be no better mixed.
    tokens = min(_BLOCK_TOKENS, self._num_bytes)
    return batch_size * max(1, tokens // (batch_size * seq_len))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stream:
  """The documents of one side in random order, epoch after epoch."""

  texts: documents_lib.Source
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


class _ShuffledBatches(grain.DatasetIterator):
  """Deals the rows of each block out in random order, as batches [B, T].

  A source file may fill hundreds of rows: dealt in order, a batch would be one
  file, however well the documents are shuffled. Shuffled rows keep their
  context whole and need two blocks of memory for a corpus of any size. (To cut
  the documents before their shuffle would take the length of each, in tokens.)

  The state is the place in the stream where the block begins, and how many of
  its rows are dealt. A block is always made from its place and number alone, so
  a restored iterator cannot differ.
  """

  _block: Batch | None

  def __init__(
    self,
    stream: _Stream,
    planter: retrieval_lib.Planter,
    rows: int,
    seq_len: int,
    batch_size: int,
  ):
    super().__init__()
    self._rows, self._batch_size = rows, batch_size
    self._seed = _seeds(stream)
    self._make = functools.partial(_make_block, stream, planter, rows, seq_len)
    # Makes the next block while this one is dealt. (grain's own prefetching
    # thread prints a traceback if it lives until Python exits.)
    self._thread = futures.ThreadPoolExecutor(1, "data-block")
    self._settings: State = dict(
      seed=stream.seed,
      documents=len(stream.texts),
      shard=f"{stream.shard} of {stream.shards}",
      seq_len=seq_len,
      batch_size=batch_size,
      block_rows=rows,
    )
    if planter.config.fraction:
      retrieval: State = dataclasses.asdict(planter.config)
      del retrieval["eval_rows"]  # may change: no training row hangs on it
      self._settings["retrieval"] = retrieval
    start = dict(place=_START, block=0, dealt=0, settings=self._settings)
    self.set_state(start)

  def __next__(self) -> Batch:
    state = self._state
    if self._block is None:
      self._block, self._end = self._ahead.result()
      self._ahead = self._thread.submit(
        self._make, self._end, state["block"] + 1
      )
      rng = np.random.default_rng([*self._seed, state["block"]])
      self._order = rng.permutation(self._rows)
    rows = self._order[state["dealt"] :][: self._batch_size]
    batch = {name: array[rows] for name, array in self._block.items()}
    state["dealt"] += self._batch_size
    if state["dealt"] == self._rows:
      state.update(place=self._end, block=state["block"] + 1, dealt=0)
      self._block = None
    return batch

  def get_state(self) -> State:
    return dict(self._state)

  def set_state(self, state: State) -> None:
    if state["settings"] != self._settings:
      raise DataError(
        f"The saved data iterator is of {state['settings']}, this one of"
        f" {self._settings}: it cannot go on. Restore with the same settings"
        " and data, or begin anew by not restoring the data iterator."
      )
    self._state = dict(state)
    self._block = None
    self._ahead = self._thread.submit(
      self._make, state["place"], state["block"]
    )

  def close(self) -> None:
    self._thread.shutdown()
    super().close()


def _seeds(stream: _Stream) -> list[int]:
  """Of what is drawn for a shard; those of the only one are of old."""
  return [stream.seed] + [stream.shard] * (stream.shards > 1)


def _make_block(
  stream: _Stream,
  planter: retrieval_lib.Planter,
  rows: int,
  seq_len: int,
  place: State,
  number: int,
) -> tuple[Batch, State]:
  """Packs block `number`, see `_pack`, and plants pairs in its first rows."""
  block, end = _pack(stream, rows, seq_len, place)
  # Of all rows so far, the fraction: right even if a block has but one row.
  share = planter.config.fraction * rows
  planted = int(share * (number + 1)) - int(share * number)
  # The 1 sets it apart from the rng that shuffles the block.
  rng = np.random.default_rng([*_seeds(stream), number, 1])
  for row in range(planted):
    arrays = planter.plant(block["tokens"][row], block["bytes"][row], rng)
    for name, array in arrays.items():
      block[name][row] = array
  return block, end


def _probes(
  stream: _Stream,
  planter: retrieval_lib.Planter,
  batches: int,
  batch_shape: tuple[int, int],  # [B, length of a document]
  seq_len: int,
) -> Iterator[retrieval_lib.Probes]:
  rng, place = np.random.default_rng(batch_shape[1]), _START
  for _ in range(batches):
    block, place = _pack(stream, *batch_shape, place)
    yield planter.probes(block["tokens"], seq_len, rng)


def _batches_in_order(
  stream: _Stream, rows: int, seq_len: int, batch_size: int
) -> Iterator[Batch]:
  place = _START
  while True:
    block, place = _pack(stream, rows, seq_len, place)
    for row in range(0, rows, batch_size):
      batch = {k: v[row : row + batch_size] for k, v in block.items()}
      if not batch["segment_ids"].any():
        return
      yield batch


def _pack(
  stream: _Stream, rows: int, seq_len: int, place: State
) -> tuple[Batch, State]:
  """Lays documents end to end in a block [R, T], padded where they end.

  Begins at `place`: the next document's number, and how many of its ids are
  "used", that is, in the block before. Returns also the place where it ends.

  (grain 0.2.18's ConcatThenSplitIterDataset may skip a document once its state
  went through JSON, hence through Orbax: tuples in it come back as lists.)
  """
  size = rows * seq_len
  tokens = np.zeros(size, np.int32)
  text_bytes = np.zeros(size, np.float32)
  starts = np.zeros(size, bool)
  n, used = place["document"], place["used"]
  filled = 0
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
  starts = starts.reshape(rows, seq_len)
  starts[:, 0] = True  # a document goes on in the next row as a new segment
  columns = np.arange(seq_len, dtype=np.int32)[None]
  segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
  positions = columns - np.maximum.accumulate(starts * columns, axis=1)
  segment_ids.reshape(-1)[filled:] = 0
  positions.reshape(-1)[filled:] = 0
  block = {
    "tokens": tokens.reshape(rows, seq_len),
    "segment_ids": segment_ids,
    "positions": positions,
    "bytes": text_bytes.reshape(rows, seq_len),
  }
  return block, {"document": n, "used": used}
