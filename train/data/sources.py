"""Sources of documents: what is asked for, and what was found there."""

import dataclasses
import glob
import os
import pathlib
import time
from typing import Annotated

from dsa_jax import ranges
from train.data import documents as documents_lib
from train.data import formats
from train.data import quarantine as quarantine_lib

DataError = documents_lib.DataError

# Before a read is tried again, and again: a file system behind a network may be
# away for a moment.
_PAUSES = (0.1, 0.5, 2.0)  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """Where documents come from, and how much of the training they are."""

  path: Annotated[str, ranges.Length(1, 2**16)] = "stdlib"
  """"stdlib" (the source code of Python's standard library); globs with commas
  between them, of text files, *.jsonl, *.parquet, and *.array_record (whose
  records are JSON objects, like the lines of *.jsonl); or a Hugging Face
  dataset, hf:NAME?OPTION=VALUE&..., such as hf:allenai/c4?name=en&split=train
  (options: name, split, revision, data_dir, data_files)."""
  weight: ranges.Positive = 1.0
  """Its share of the training tokens, beside the other sources' weights; to
  leave a source out, remove it."""
  text_field: ranges.Text = "text"
  """Field (JSON) or column (Parquet, Hugging Face) that holds the text."""
  name: ranges.Text | None = None
  """The name in logs; None derives it from the path."""

  def __post_init__(self):
    ranges.check(self, DataError)

  @property
  def label(self) -> str:
    """`name`, or else the last part of the path that is no pattern."""
    if self.name is not None:
      return self.name
    if self.path.startswith("hf:"):
      return self.path.removeprefix("hf:").partition("?")[0]
    first = pathlib.PurePath(self.path.split(",")[0].strip())
    fixed = [part for part in first.parts if not glob.has_magic(part)]
    if len(fixed) == len(first.parts):
      return first.stem
    return fixed[-1] if fixed else self.path


class Source:
  """A source, opened: its documents, some of them held out.

  Attributes:
    name: see `SourceConfig.label`.
    weight: see `SourceConfig`.
    num_bytes: size of the files, as they are on disk.
    train: the documents to train on. One that cannot be read any more is empty.
    heldout: the others, see `documents.split`.
    quarantine: its bad records.
  """

  name: str
  weight: float
  num_bytes: int
  train: documents_lib.Subset
  heldout: documents_lib.Subset
  quarantine: quarantine_lib.Quarantine

  def __init__(
    self,
    config: SourceConfig,
    heldout_fraction: float,
    max_bad_share: float,
    folder: pathlib.Path | None,
  ):
    """Opens and checks what `config` names.

    Args:
      config: the source.
      heldout_fraction: see `documents.split`.
      max_bad_share: share of its records that may be bad.
      folder: see `Quarantine`.

    Raises:
      DataError: see `open_documents`, `Quarantine` and `documents.split`.
    """
    self._config = config
    self.name, self.weight = config.label, config.weight
    self.quarantine = quarantine_lib.Quarantine(
      self.name, max_bad_share, folder
    )
    documents = open_documents(config, self.quarantine.add)
    self.quarantine.opened(len(documents))
    self.num_bytes = documents.num_bytes
    reader = _Reader(documents, self.quarantine)
    self.train, self.heldout = documents_lib.split(reader, heldout_fraction)

  def __str__(self) -> str:
    """Describes the documents found, for a log."""
    path, bad = self._config.path, self.quarantine.count
    return (
      (path if path == self.name else f"{self.name} ({path})")
      + f": {len(self.train):,} documents to train on,"
      + f" {len(self.heldout):,} held out ({self.num_bytes / 1e6:,.1f} MB"
      + " on disk)"
      + (f", {bad:,} bad records" if bad else "")
    )


class _Reader:
  """A source's documents, whatever becomes of its files.

  A read that fails is tried again after pauses; then it is a bad record, and an
  empty document. Once one has failed for good, no other is waited for until
  a read succeeds: a source that is gone would take days to say so.
  """

  def __init__(
    self,
    documents: documents_lib.Documents,
    quarantine: quarantine_lib.Quarantine,
  ):
    self._documents, self._quarantine = documents, quarantine
    self._gone = False

  def __len__(self) -> int:
    return len(self._documents)

  def __getitem__(self, index: int) -> str:
    pauses = iter(() if self._gone else _PAUSES)
    while True:
      try:
        text = self._documents[index]
      except Exception as e:  # who knows what all the readers raise
        error = e
      else:
        self._gone = self._gone and not text
        return text
      pause = next(pauses, None)
      if pause is None:
        break
      time.sleep(pause)
    self._gone = True
    if not isinstance(error, documents_lib.BadRecord):
      file, at = self._documents.place(index)
      error = documents_lib.BadRecord(
        f"{file}, at {at}, cannot be read any more"
        f" ({type(error).__name__}: {error}).",
        file=file,
        at=at,
      )
    self._quarantine.add(error)
    return ""


def open_documents(
  config: SourceConfig, reject: formats.Reject
) -> documents_lib.Documents:
  """Opens and checks the files, or the dataset, of a source.

  Args:
    config: the source.
    reject: is given every bad record. It returns to have it an empty document.

  Returns:
    The documents that are not empty, in the order of their files' paths.
    (Of Parquet, ArrayRecord and Hugging Face also empty ones.)

  Raises:
    DataError: nothing matches, a package is missing, all files are empty, or
      what `reject` raises.
  """
  if config.path.startswith("hf:"):
    dataset = formats.HubDataset(config.path, config.text_field)
    return documents_lib.Documents([dataset], dataset.num_bytes)
  is_stdlib = config.path == "stdlib"
  paths = _stdlib_paths() if is_stdlib else _glob(config.path)
  files: list[documents_lib.File] = []
  num_bytes = 0
  for path in paths:
    try:
      files += formats.open_file(
        path, config.text_field, _raise if is_stdlib else reject
      )
      num_bytes += path.stat().st_size
    except documents_lib.BadRecord:
      if not is_stdlib:
        raise  # of Python's own files, a few are Latin-1
  files = [file for file in files if len(file)]
  if not files:
    raise DataError(
      f"{config.path!r} matches {len(paths)} files, all of them empty; point it"
      " at files that hold text."
    )
  return documents_lib.Documents(files, num_bytes)


def _raise(bad: documents_lib.BadRecord) -> None:
  raise bad


def _glob(source: str) -> list[pathlib.Path]:
  paths = set()
  for pattern in source.split(","):
    pattern = os.path.expanduser(pattern.strip())
    found = {p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)}
    if not found:
      raise DataError(
        f"{pattern!r} of {source=} matches no file in {os.getcwd()}; give"
        " 'stdlib', globs such as 'books/**/*.txt,web/*.jsonl', or 'hf:NAME'."
      )
    paths |= found
  return [pathlib.Path(path) for path in sorted(paths)]


def _stdlib_paths() -> list[pathlib.Path]:
  # The tests are left out: they are as long as the library, and odd on purpose.
  # So are the encodings, which are tables of characters.
  skipped = {"site-packages", "dist-packages", "encodings"}
  skipped |= {"test", "tests", "idle_test"}
  paths: list[pathlib.Path] = []
  for folder, folders, names in os.walk(os.path.dirname(os.__file__)):
    folders[:] = [name for name in folders if name not in skipped]
    paths += [pathlib.Path(folder, name) for name in names]
  return sorted(path for path in paths if path.suffix == ".py")
