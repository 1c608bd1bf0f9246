"""Datasets of the Hugging Face hub."""

import importlib
from typing import Any

from train.data import documents as documents_lib
from train.data import manifest
from train.data import records

DataError = documents_lib.DataError

# What `hf:NAME?...` may say: arguments of datasets.load_dataset.
_OPTIONS = ("name", "split", "revision", "data_dir", "data_files")
_SAMPLES = 256  # rows


class HubDataset:
  """A Hugging Face dataset: one document a row; a null is an empty text.

  Attributes:
    num_bytes: size of the texts.
    mark: what it is known by.
  """

  def __init__(self, path: str, field: records.Field):
    """Downloads what is not in the cache yet, see `datasets.load_dataset`.

    Args:
      path: hf:NAME?OPTION=VALUE&..., such as hf:allenai/c4?name=en&split=train.
        Options are name (the configuration), split (train if not given),
        revision, data_dir and data_files, as `datasets.load_dataset` has them.
      field: the column that holds the text.

    Raises:
      DataError: the package is missing, there is no such dataset, or it has no
        such column.
    """
    self._path, self._column = path, field.name
    name, _, query = path.removeprefix("hf:").partition("?")
    options = {"split": "train"}
    for part in query.split("&") if query else []:
      option, _, value = part.partition("=")
      if option not in _OPTIONS or not value:
        raise DataError(
          f"{path!r}: {part!r} is not OPTION=VALUE with an option of"
          f" {[*_OPTIONS]}; give, for instance,"
          " hf:allenai/c4?name=en&split=train."
        )
      options[option] = value
    try:
      datasets: Any = importlib.import_module("datasets")
    except ImportError as e:
      raise DataError(
        f"{path!r} needs the package `datasets`:"
        ' pip install "dsa-jax[datasets]".'
      ) from e
    try:
      dataset = datasets.load_dataset(name, **options)
    except Exception as e:  # of the hub, of a file system, of who wrote it
      raise DataError(
        f"{path!r} cannot be loaded ({type(e).__name__}: {e}); give the name,"
        " configuration and split of a dataset, as its page on the hub has"
        " them."
      ) from e
    strings = [
      name
      for name, feature in dataset.features.items()
      if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if field.name not in strings:
      raise DataError(
        f"{path!r} has no column {field.name!r} of strings; give"
        f" {field.option} one of {records.shown(strings)}, of all columns"
        f" {records.shown(dataset.features)}."
      )
    self._rows = dataset.select_columns([field.name])
    self.num_bytes = int(self._rows.data.nbytes)
    self.mark = self._mark()

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> str:
    return self._rows[index][self._column] or ""

  def place(self, index: int) -> tuple[str, int]:
    return self._path, index

  def _mark(self) -> manifest.Mark:
    """Reads rows from all over it."""
    count, tally = len(self), manifest.Tally()
    for index in range(0, count, -(-count // _SAMPLES) or 1):
      tally.add(self[index])
    return manifest.Mark(documents=count, digest=tally.mark().digest)
