"""Text to packed batches: documents -> tokens -> blocks -> shuffled rows.

Each row comes from one source, and each source has its share of the rows, see
`train/data/stream.py`. Some rows of a block may have their text turned into the
filler of retrieval documents, see `train/data/retrieval.py`.

Shapes: B batch, T sequence length, R rows of a block.

A batch is a dict of five arrays [B, T]:
  tokens       int32, ids; 0 where padded
  segment_ids  int32, number of the document in its row, from 1; 0 = padding
  positions    int32, place in that segment, from 0
  bytes        float32, UTF-8 bytes that the token stands for. A document's
               tokens, eos included, share its bytes evenly, so
               sum(nats) / log(2) / sum(bytes) is bits per byte.
  sources      int32, number of the source that the row comes from
"""

from collections.abc import Iterator
from concurrent import futures
import dataclasses
import functools
import itertools
import pathlib
import sys
from typing import Annotated

import grain
import numpy as np

from dsa_jax import ranges
from dsa_jax.chat import tokenizer as tokenizer_lib
from train.data import documents as documents_lib
from train.data import manifest as manifest_lib
from train.data import records
from train.data import retrieval as retrieval_lib
from train.data import sources as sources_lib
from train.data import stream as stream_lib
from train.host import processes

DataError = documents_lib.DataError
SourceConfig = sources_lib.SourceConfig

type Batch = stream_lib.Batch
type State = stream_lib.State

# Rows are shuffled in blocks of about this many tokens: some hundred source
# files, or thousands of web pages. Two blocks live, 16 bytes of memory a token.
_BLOCK_TOKENS = 1 << 21


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Which text to train on, and how."""

  sources: Annotated[
    tuple[SourceConfig, ...], ranges.Length(1, 1000, "entries")
  ] = (SourceConfig(),)
  """Where the text comes from, and in which proportion."""
  tokenizer: ranges.Text = "bytes"
  """"bytes", or the path of a tokenizer.json."""
  heldout_fraction: Annotated[float, ranges.Interval(0, 1, open="both")] = 0.02
  """Fraction of each source's documents kept out of training, to evaluate
  on."""
  allow_changed: bool = False
  """Go on with other data than those that a checkpoint was saved with. Other
  batches than before then come, and what was held out may be trained on."""
  max_bad_share: Annotated[float, ranges.Interval(0, 1, open="high")] = 0.0
  """Share of a source's records that may be bad: not of the kind they should
  be, or not to be read any more. They are left out, and written down in
  RUN_DIR/quarantine. With 0 the first one is an error."""
  shuffle_seed: ranges.Seed = 0
  """Another seed, another order of the training documents."""
  shards: ranges.Count = 1
  """Independent streams that the training documents are dealt to; a process
  reads those of its own rows only. The data hang on this number, not on that of
  processes or devices. It must divide the rows of a microbatch."""
  retrieval: retrieval_lib.RetrievalConfig = retrieval_lib.RetrievalConfig()
  """Synthetic key-value retrieval, mixed into the training rows."""

  def __post_init__(self):
    ranges.check(self, DataError)
    names = [source.label for source in self.sources]
    if len(set(names)) < len(names):
      raise DataError(
        f"data.sources have the names {names}, which must differ: set the name,"
        " --data.sources.N.name, of those that are alike."
      )


class Corpus:
  """Collections of documents, some of them held out, and their tokenizer.

  Attributes:
    tokenizer: see `dsa_jax/chat/tokenizer.py`.
    sources: the collections, in the order of the config.
  """

  tokenizer: tokenizer_lib.Tokenizer
  sources: tuple[sources_lib.Source, ...]

  def __init__(
    self, config: DataConfig, quarantine: pathlib.Path | None = None
  ):
    """Opens and checks everything that `config` names.

    Args:
      config: what to open.
      quarantine: the folder where bad records are written down, from the first
        call of `batches` on; None writes none. See `Quarantine`.

    Raises:
      DataError: see `HfTokenizer` and `Source`.
    """
    self._config = config
    try:
      self.tokenizer = tokenizer_lib.load_tokenizer(config.tokenizer)
    except tokenizer_lib.TokenizerError as e:
      raise DataError(f"data.{e}") from e  # its text begins with "tokenizer="
    self.sources = tuple(
      sources_lib.Source(
        source, i, config.heldout_fraction, config.max_bad_share, quarantine
      )
      for i, source in enumerate(config.sources)
    )
    self._tokenizer_mark = manifest_lib.of_tokenizer(
      config.tokenizer, self.tokenizer.eos_id
    )
    self._told = False  # that the data have changed
    self._num_bytes = sum(source.num_bytes for source in self.sources)
    self._planter = retrieval_lib.Planter(config.retrieval, self.tokenizer)

  def __str__(self) -> str:
    """One line for a log."""
    total = sum(source.weight for source in self.sources)
    parts = [
      f"{source.weight / total:.1%} {source}"
      if len(self.sources) > 1
      else str(source)
      for source in self.sources
    ]
    return (
      f"{'; '.join(parts)}; tokenizer {self._config.tokenizer}"
      f" ({self.tokenizer.vocab_size:,} ids)"
    )

  @property
  def source_names(self) -> tuple[str, ...]:
    """Names of the sources; a batch's "sources" are indices into them."""
    return tuple(source.name for source in self.sources)

  @property
  def bad_records(self) -> dict[str, int]:
    """How many records of each source this process has found to be bad."""
    return {source.name: source.quarantine.count for source in self.sources}

  @property
  def allows_changes(self) -> bool:
    """Whether other data than a checkpoint's may be gone on with."""
    return self._config.allow_changed

  def manifest(self) -> State:
    """What the data are known by, as JSON can hold it; see `manifest.py`."""
    return {
      "tokenizer": self._tokenizer_mark,
      "sources": [
        [source.name, manifest_lib.to_json(source.marks)]
        for source in self.sources
      ],
    }

  def compare(self, saved: State | None) -> None:
    """Compares the data with a saved manifest; None says that there is none.

    Raises:
      DataError: they differ, and `allow_changed` is off.
    """
    changed = self._changes(saved)
    if not changed or self._told:
      return
    if not self._config.allow_changed:
      raise DataError(
        f"The data are not those of the checkpoint: {'; '.join(changed)}."
        " Restore with the same settings and data; or go on with"
        " --data.allow-changed: other batches then come, and what was held out"
        " may be trained on."
      )
    self._told = True
    processes.say(
      f"CHANGED  the data are not those of the checkpoint: {'; '.join(changed)}"
    )

  def _changes(self, saved: State | None) -> list[str]:
    if saved is None or "tokenizer" not in saved:
      return ["it is of a version that does not say which data it has seen"]
    told, before = [], dict(saved["sources"])
    if saved["tokenizer"] != self._tokenizer_mark:
      told.append(f"tokenizer {self._config.tokenizer} is not as it was")
    if [*before] != [*self.source_names]:
      now = records.shown(self.source_names)
      told.append(f"the sources are {now}, were {records.shown(before)}")
    for source in self.sources:
      marks = manifest_lib.from_json(before.get(source.name, []))
      if found := manifest_lib.differences(marks, source.marks):
        told.append(f"source {source.name!r}: {', '.join(found)}")
    return told

  @property
  def trains_retrieval(self) -> bool:
    """Whether some rows hold key-value pairs and questions for them."""
    return self._config.retrieval.fraction > 0

  def batches(
    self, *, seq_len: int, batch_size: int, seed: int, shard: int = 0
  ) -> grain.DatasetIterator[Batch]:
    """Returns endless training batches [B, T], packed without padding.

    Of one of `shards` streams; each has every so many-th document of all.

    Each epoch lays all training documents of a source end to end in a new
    order; rows cut this stream every T tokens, each source gives its share of
    them, and they are shuffled in blocks. `shuffle_seed` and `seed` (not
    negative) choose the order. After Orbax or `set_state` restored the
    iterator, the next batch is exactly the one that would have come.
    `retrieval.fraction` of the rows have pairs planted in their text.

    A document that cannot be read any more is left out, up to `max_bad_share`;
    beyond, `next` raises. Blocks are the same again, after a restore, only if
    the same documents can be read then.

    Raises:
      DataError: a size is below 1, or too small for retrieval; or a state of
        other settings is restored; by `next`, too many documents cannot be read
        (`get_state` is that of the last batch still).
    """
    rows = self.check_sizes(seq_len, batch_size)
    streams = []
    for number, source in enumerate(self.sources):
      source.quarantine.begin()
      # That of the first is as if it were the only one.
      entropy = [self._config.shuffle_seed, seed] + [number] * (number > 0)
      drawn = np.random.SeedSequence(entropy).generate_state(1)
      stream = stream_lib.Stream(
        texts=source.train,
        tokenizer=self.tokenizer,
        seed=int(drawn[0]),
        shard=shard,
        shards=self._config.shards,
      )
      streams.append(stream)
    mixture = self._mixture(streams)
    return _ShuffledBatches(
      self, mixture, self._planter, rows, seq_len, batch_size
    )

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
          " pair and its question; raise them, or give"
          " --data.retrieval.fraction=0."
        )
    return self._block_rows(seq_len, batch_size)

  def heldout_batches(
    self, *, seq_len: int, batch_size: int, max_batches: int
  ) -> Iterator[Batch]:
    """Returns the same batches [B, T] of held-out text at each call.

    Each source gives its share of the rows, as long as it has text.
    Documents come from all over a source, each cut to its middle, an equal
    share of the source's rows (but not below T), lest a huge one be the whole
    evaluation: fewer batches may come though text is left. The last is padded.

    Raises:
      DataError: a size is below 1; when read, see `batches`.
    """
    rows = max_batches * batch_size
    block_rows = min(self._block_rows(seq_len, batch_size), rows)
    mixture = self._heldout(rows, seq_len, once=True)
    batches = mixture.batches(block_rows, seq_len, batch_size)
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
    mixture = self._heldout(batches * batch_size, length, once=False)
    texts = mixture.batches(batch_size, length, batch_size)
    rng = np.random.default_rng(length)
    return (
      self._planter.probes(batch["tokens"], seq_len, rng)
      for batch in itertools.islice(texts, batches)
    )

  def _heldout(
    self, rows: int, seq_len: int, *, once: bool
  ) -> stream_lib.Mixture:
    """Returns the held-out documents, an equal share of its rows from each."""
    total = sum(source.weight for source in self.sources)
    streams = []
    for source in self.sources:
      tokens = int(rows * source.weight / total) * seq_len
      stream = stream_lib.Stream(
        texts=source.heldout,
        tokenizer=self.tokenizer,
        seed=0,  # always: any prefix of this order is a fair sample
        stop=len(source.heldout) if once else sys.maxsize,
        max_tokens=max(tokens // len(source.heldout), seq_len),
      )
      streams.append(stream)
    return self._mixture(streams)

  def _mixture(self, streams: list[stream_lib.Stream]) -> stream_lib.Mixture:
    weights = [source.weight for source in self.sources]
    return stream_lib.Mixture(streams=streams, weights=weights)

  def _block_rows(self, seq_len: int, batch_size: int) -> int:
    if min(seq_len, batch_size) < 1:
      raise DataError(f"{seq_len=} and {batch_size=} must be at least 1.")
    # Longer than an epoch, a block would be no better mixed.
    tokens = min(_BLOCK_TOKENS, self._num_bytes)
    return batch_size * max(1, tokens // (batch_size * seq_len))


class _ShuffledBatches(grain.DatasetIterator):
  """Deals the rows of each block out in random order, as batches [B, T].

  A source file may fill hundreds of rows: dealt in order, a batch would be one
  file, however well the documents are shuffled. Shuffled rows keep their
  context whole and need two blocks of memory for a corpus of any size. (To cut
  the documents before their shuffle would take the length of each, in tokens.)

  The state is the place in each source's stream where the block begins, and how
  many of its rows are dealt. A block is always made from the places and its
  number alone, so a restored iterator cannot differ. That of the first shard
  has the manifest of the data, too.
  """

  _block: Batch | None

  def __init__(
    self,
    corpus: Corpus,
    mixture: stream_lib.Mixture,
    planter: retrieval_lib.Planter,
    rows: int,
    seq_len: int,
    batch_size: int,
  ):
    super().__init__()
    self._corpus = corpus
    self._batch_size = batch_size
    self._seeds = mixture.seeds
    self._make = functools.partial(_make_block, mixture, planter, seq_len)
    # Makes the next block while this one is dealt. (grain's own prefetching
    # thread prints a traceback if it lives until Python exits.)
    self._thread = futures.ThreadPoolExecutor(1, "data-block")
    first = mixture.streams[0]
    self._settings: State = dict(
      seed=first.seed,
      documents=[len(stream.texts) for stream in mixture.streams],
      weights=[*mixture.weights],
      shard=f"{first.shard} of {first.shards}",
      seq_len=seq_len,
      batch_size=batch_size,
      block_rows=rows,
    )
    if planter.config.fraction:
      retrieval: State = dataclasses.asdict(planter.config)
      del retrieval["eval_rows"]  # may change: no training row hangs on it
      self._settings["retrieval"] = retrieval
    self._manifest: State = (
      {} if first.shard else dict(manifest=corpus.manifest())
    )
    places = [stream_lib.START] * len(mixture.streams)
    start: State = dict(
      places=places, block=0, dealt=0, settings=self._settings
    )
    self.set_state(start | self._manifest)

  def __next__(self) -> Batch:
    state = self._state
    if self._block is None:
      self._block, self._ends = self._ahead.result()
      self._ahead = self._thread.submit(
        self._make, self._rows, self._ends, state["block"] + 1
      )
      rng = np.random.default_rng([*self._seeds, state["block"]])
      self._order = rng.permutation(self._rows)
    rows = self._order[state["dealt"] :][: self._batch_size]
    batch = {name: array[rows] for name, array in self._block.items()}
    state["dealt"] += self._batch_size
    if state["dealt"] == self._rows:
      state.update(places=self._ends, block=state["block"] + 1, dealt=0)
      self._block = None
    return batch

  def get_state(self) -> State:
    return dict(self._state)

  def set_state(self, state: State) -> None:
    if self._manifest:
      self._corpus.compare(state.get("manifest"))
    saved = state["settings"]
    # A block stays as large as it was, whatever its files' size has become:
    # the same text can be spelt otherwise, and a record may have turned bad.
    rows = saved["block_rows"]
    own = self._settings | {"block_rows": rows}
    may_differ = ("documents",) if self._corpus.allows_changes else ()
    changed = [
      f"{name} is {own.get(name)}, was {saved.get(name)}"
      for name in sorted(saved | own)
      if own.get(name) != saved.get(name) and name not in may_differ
    ]
    if changed:
      raise DataError(
        f"The saved data iterator cannot go on here: {'; '.join(changed)}."
        " Restore with the same settings and data, or begin anew by not"
        " restoring the data iterator."
      )
    self._state: State = state | dict(settings=own) | self._manifest
    self._rows, self._block = rows, None
    self._ahead = self._thread.submit(
      self._make, rows, state["places"], state["block"]
    )

  def close(self) -> None:
    self._thread.shutdown()
    super().close()


def _make_block(
  mixture: stream_lib.Mixture,
  planter: retrieval_lib.Planter,
  seq_len: int,
  rows: int,
  places: list[State],
  number: int,
) -> tuple[Batch, list[State]]:
  """Packs block `number`, see `Mixture.block`, and plants pairs in it."""
  block, order, ends = mixture.block(rows, seq_len, places, number)
  # Of all rows so far, the fraction: right even if a block has but one row.
  share = planter.config.fraction * rows
  planted = int(share * (number + 1)) - int(share * number)
  # The 1 sets it apart from the rng that shuffles the block.
  rng = np.random.default_rng([*mixture.seeds, number, 1])
  for row in order[:planted]:
    arrays = planter.plant(block["tokens"][row], block["bytes"][row], rng)
    for name, array in arrays.items():
      block[name][row] = array
  return block, ends
