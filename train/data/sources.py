"""Sources of documents: what is asked for, and what was found there."""

import dataclasses
import glob
import os
import pathlib
import time
from typing import Annotated

from dsa_jax import ranges
from train.data import content as content_lib
from train.data import documents as documents_lib
from train.data import formats
from train.data import hub
from train.data import manifest
from train.data import paths as paths_lib
from train.data import quarantine as quarantine_lib
from train.data import records

DataError = documents_lib.DataError

# Before a read is tried again, and again: a file system behind a network may be
# away for a moment.
_PAUSES = (0.1, 0.5, 2.0)  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """Where documents come from, and how much of the training they are."""

  path: Annotated[str, ranges.Length(1, 2**16)] = "stdlib"
  """"stdlib" (the source code of Python's standard library); globs with commas
  between them, of text files, *.jsonl, *.ndjson, *.json (an array of objects,
  or JSON lines), *.parquet, and *.array_record (whose records are JSON objects,
  like the lines of *.jsonl), compressed or not (*.gz, *.zst, *.bz2, *.xz); or a
  Hugging Face dataset, hf:NAME?OPTION=VALUE&..., such as
  hf:allenai/c4?name=en&split=train (options: name, split, revision, data_dir,
  data_files)."""
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
    marks: what its files are known by, see `manifest.py`.
  """

  name: str
  weight: float
  num_bytes: int
  train: documents_lib.Subset
  heldout: documents_lib.Subset
  quarantine: quarantine_lib.Quarantine
  marks: list[manifest.Mark]

  def __init__(
    self,
    config: SourceConfig,
    number: int,
    heldout_fraction: float,
    max_bad_share: float,
    folder: pathlib.Path | None,
  ):
    """Opens and checks what `config` names.

    Args:
      config: the source.
      number: its place in the config.
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
    documents = open_documents(config, self.quarantine.add, number)
    self.quarantine.opened(len(documents))
    self.num_bytes = documents.num_bytes
    self.marks = manifest.condense(documents.marks)
    reader = _Reader(documents, self.quarantine)
    self.train, self.heldout = documents_lib.split(
      reader, heldout_fraction, self.name
    )

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
      except documents_lib.BadRecord as e:
        error = e  # it is read, and will be as bad
        break
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
  config: SourceConfig, reject: formats.Reject, number: int = 0
) -> documents_lib.Documents:
  """Opens and checks the files, or the dataset, of a source.

  Args:
    config: the source.
    reject: is given every bad record. It returns to have it an empty document.
    number: the source's place in the config.

  Returns:
    The documents that are not empty, in the order of their files' paths.
    (Of Parquet, ArrayRecord and Hugging Face also empty ones.)

  Raises:
    DataError: nothing matches, a package is missing, all files are empty, or
      what `reject` raises.
  """
  options = f"--data.sources.{number}"
  field = records.Field(config.text_field, f"{options}.text-field")
  if config.path.startswith("hf:"):
    dataset = hub.HubDataset(config.path, field)
    return documents_lib.Documents([dataset], dataset.num_bytes, [dataset.mark])
  is_stdlib = config.path == "stdlib"
  if is_stdlib:
    paths, root = _stdlib_paths(), os.path.dirname(os.__file__)
  else:
    paths, root = paths_lib.find(config.path, f"{options}.path")
  files: list[documents_lib.File] = []
  marks: list[manifest.Mark] = []
  num_bytes, spool = 0, content_lib.Spool()
  for path in paths:
    try:
      opened = formats.open_file(
        pathlib.Path(path), field, _raise if is_stdlib else reject, spool
      )
    except documents_lib.BadRecord:
      if not is_stdlib:
        raise
      continue  # of Python's own files, a few are Latin-1
    files += [file for file in opened.files if len(file)]
    if opened.mark.documents:  # a file without any moves no other's
      name = os.path.relpath(path, root)
      marks.append(dataclasses.replace(opened.mark, name=name))
    num_bytes += _size(path)
  if not files:
    raise DataError(
      f"{config.path!r} matches {len(paths)} files, all of them empty; point it"
      " at files that hold text."
    )
  return documents_lib.Documents(files, num_bytes, marks)


def _size(path: str) -> int:
  try:
    return os.path.getsize(path)
  except OSError:  # gone, which its reader has told
    return 0


def _raise(bad: documents_lib.BadRecord) -> None:
  raise bad


def _stdlib_paths() -> list[str]:
  # The tests are left out: they are as long as the library, and odd on purpose.
  # So are the encodings, which are tables of characters.
  skipped = {"site-packages", "dist-packages", "encodings"}
  skipped |= {"test", "tests", "idle_test"}
  paths: list[pathlib.Path] = []
  for folder, folders, names in os.walk(os.path.dirname(os.__file__)):
    folders[:] = [name for name in folders if name not in skipped]
    paths += [pathlib.Path(folder, name) for name in names]
  return [str(path) for path in sorted(paths) if path.suffix == ".py"]
