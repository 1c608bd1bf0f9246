"""Converts checkpoints: python -m train.convert SOURCE TARGET [--OPTION=...].

SOURCE decides the direction. A Hugging Face folder (DeepSeek-V3, V3.1, V3.2, or
GLM with DSA) becomes a checkpoint to train from, by --init-from=TARGET; a run's
folder or a checkpoint becomes a Hugging Face folder.

A tensor at a time is in memory. What is written is read again and compared. If
it stops, the same command goes on where it was; TARGET appears when all is
done.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from typing import Final, Literal

from train.host import program

if __name__ == "__main__":
  program.begin()  # before the imports that take seconds

import numpy as np
import tqdm
import tyro

from dsa_jax import ranges
from dsa_jax.hf import companions
from dsa_jax.hf import config_json
from dsa_jax.hf import files
from dsa_jax.hf import header
from dsa_jax.hf import load
from dsa_jax.hf import prefetch
from dsa_jax.hf import save
from dsa_jax.hf import tensors as tensors_lib
from train import options
from train.host import atomic_files
from train.host import json_files
from train.host import ownership
from train.run import arrays as arrays_lib
from train.run import origin as origin_lib
from train.run import record as record_lib
from train.run import run_folder

# Of the folder that a checkpoint was made of: all but the parameters.
_ORIGIN: Final = "hf"
# Options that say what a source becomes, by what that is.
_ONLY: Final = {
  "checkpoint": ("dtype", "stage"),
  "Hugging Face folder": ("format", "max_shard_size", "like"),
}


@dataclasses.dataclass(frozen=True)
class Conversion:
  """Source, target and options of a conversion."""

  source: tyro.conf.Positional[ranges.Text]
  """A Hugging Face folder, or a run's folder or one checkpoint of it."""
  target: tyro.conf.Positional[ranges.Text]
  """The folder to write; must not exist."""
  dtype: Literal["bfloat16", "float32"] | None = None
  """Type of the checkpoint's parameters; by default config.json's. A run
  reads them in its own."""
  stage: load.Stage | None = None
  """Stage to prepare for: "warmup" gives a model without an indexer (V3,
  V3.1) a new one."""
  format: config_json.Format = "bf16"
  """Type of the Hugging Face folder's weights."""
  max_shard_size: ranges.Text = "5GB"
  """Largest size of a file of it."""
  like: ranges.Text | None = None
  """A folder of the model it began as, for the tokenizer, the chat template,
  the rest of config.json, and the FP8 scales of weights that did not change."""

  def __post_init__(self):
    ranges.check(self)


class Journal:
  """Which parts of a conversion are done, in TARGET.partial."""

  def __init__(self, conversion: Conversion, source: pathlib.Path):
    """Reads what is done; changes nothing.

    Raises:
      ValueError: The target exists, another conversion has begun there, or
        what is done cannot be read.
    """
    self.target = pathlib.Path(conversion.target).resolve()
    self.folder = self.target.with_name(self.target.name + ".partial")
    self._file = self.folder / "conversion.jsonl"
    self._options = dataclasses.asdict(conversion) | {
      "source": str(source),
      "target": str(self.target),
    }
    self._done = self._read()

  def begin(self, held: contextlib.ExitStack) -> None:
    """Makes the folder, owns it while held, and writes down what is known.

    Raises:
      Owned: Another process converts to there; says which.
      ValueError: One has done so meanwhile.
    """
    self._claim = ownership.Claim(self.folder)
    held.callback(self._claim.close)
    try:  # again: it may have been another's a moment ago
      self._done = self._read()
    except ValueError:
      if self.target.exists():  # so that the folder is made for nothing
        self._claim.dissolve()
        self.folder.rmdir()
      raise
    lines = [self._options, *sorted(self._done)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    atomic_files.write(self._file, text)

  def _read(self) -> set[str]:
    if self.target.exists():
      raise ValueError(f"{self.target} exists; give another target.")
    if not self._file.exists():
      return set()
    lines = [line for _, line in json_files.read_lines(self._file)]
    begun, *done = lines or [None]
    if begun != self._options:
      raise ValueError(
        f"{self.folder} holds a conversion that was begun with other options:"
        f" {begun}. Give the same, or delete it."
      )
    if not all(isinstance(part, str) for part in done):
      raise ValueError(
        f"{self._file} is damaged; delete {self.folder}, and convert anew."
      )
    return set(done)

  def __contains__(self, part: str) -> bool:
    return part in self._done

  def add(self, part: str) -> None:
    """Notes that a part is written and compared."""
    self._done.add(part)
    with self._file.open("a", encoding="utf-8") as out:
      out.write(json.dumps(part) + "\n")
    atomic_files.sync(self._file)

  def finish(self) -> None:
    """Moves the result into its place."""
    self._file.unlink()
    atomic_files.sync_all(self.folder)
    self._claim.move(self.target)
    atomic_files.sync(self.target.parent)


def convert(conversion: Conversion) -> None:
  """Converts one way or the other.

  Raises:
    ValueError: Something does not fit; see `load_hf` and `save_hf`.
    OSError: Something cannot be read or written; names the file.
  """
  for option in ("source", "target", "like"):
    if (path := vars(conversion)[option]) is not None:
      run_folder.check_path(option, path)
  source = pathlib.Path(conversion.source).resolve()
  if (source / "config.json").exists() and (
    "model_type" in config_json.read_json(source)
  ):
    _refuse_others(conversion, "checkpoint")
    with contextlib.ExitStack() as held:
      _to_orbax(conversion, source, held)
    return
  found = origin_lib.find(source)
  if found is None:
    raise ValueError(
      f"{source} is neither a Hugging Face folder (config.json with model_type)"
      " nor a run's folder or a checkpoint."
    )
  _refuse_others(conversion, "Hugging Face folder")
  with contextlib.ExitStack() as held:
    _to_hf(conversion, found, held)


def _refuse_others(conversion: Conversion, target: str) -> None:
  """An option of the other way would be read past."""
  (other,) = _ONLY.keys() - {target}
  for name in _ONLY[other]:
    value = vars(conversion)[name]
    if value != vars(Conversion)[name]:
      raise ValueError(
        f"--{name.replace('_', '-')}={value} is for what becomes a {other}, but"
        f" {conversion.source} becomes a {target}: leave it out."
      )


def _to_orbax(
  conversion: Conversion, source: pathlib.Path, held: contextlib.ExitStack
) -> None:
  stored = files.Folder(source)
  cfg = config_json.read(stored, conversion.dtype)
  beside = companions.find(source)
  wanted = load.wanted(stored, cfg, conversion.stage)
  journal = Journal(conversion, source)
  path = journal.folder / "checkpoints" / "0"
  journal.begin(held)
  out = arrays_lib.NewArrays(path, tensors_lib.leaf_shapes(cfg))

  def write(tensor):
    for place, part in load.read(stored, tensor):
      out.write(place, part)
    return stored.entries[tensor.name].size

  size = lambda tensors: sum(stored.entries[t.name].size for t in tensors)
  left = [t for t in wanted if stored.entries[t.name].file.name not in journal]
  with _progress(size(wanted), size(wanted) - size(left)) as bar:
    for file, tensors in itertools.groupby(
      left, lambda t: stored.entries[t.name].file
    ):
      for done in prefetch.prefetch(write, tensors):
        bar.update(done)
      out.sync()
      journal.add(file.name)
  if not path.exists():
    _write_unread(out, cfg, load.has_indexer(stored))
    out.finish(cfg, _keep(stored, wanted, beside, journal.folder / _ORIGIN))
  journal.finish()


def _write_unread(out, cfg, has_indexer) -> None:
  """Indexers that the folder does not have: new, or of layers that use none."""
  if not has_indexer:
    for leaf, array in load.fresh_indexer(cfg).items():
      for place in tensors_lib.places(leaf, array.shape):
        out.write(place, np.asarray(array[place.index]))
  filled = {
    place for tensor in tensors_lib.tensors(cfg) for place in tensor.places
  }
  for leaf, like in tensors_lib.leaf_shapes(cfg).items():
    for place in tensors_lib.places(leaf, like.shape):
      if place not in filled:
        out.write(place, np.zeros(place.shape, like.dtype))


def _keep(stored, wanted, beside, folder) -> dict[str, int]:
  """Ingredients of a Hugging Face folder besides the parameters' values.

  Returns the CRC-32 of each file.
  """
  folder.mkdir(exist_ok=True)
  companions.copy(beside, folder)
  raw = json.dumps(config_json.read_json(stored.path), indent=2)
  (folder / "config.json").write_text(raw, encoding="utf-8")
  names = [t.name for t in wanted if t.kind == "float32"]
  scales = [t.name + load.SCALE for t in wanted]
  names += [name for name in scales if name in stored.entries]
  specs = [
    files.Spec(name, header.DTYPES[entry.dtype], entry.shape)
    for name, entry in ((name, stored.entries[name]) for name in names)
  ]
  files.write(folder / "model.safetensors", specs, map(stored.read, names))
  return _checksums(folder)


def _checksums(folder: pathlib.Path) -> dict[str, int]:
  """CRC-32 of each file in a folder, by its path there."""
  return {
    str(file.relative_to(folder)): files.checksum(file)
    for file in sorted(folder.rglob("*"))
    if file.is_file()
  }


def _kept(stored: arrays_lib.Arrays, folder: pathlib.Path) -> pathlib.Path:
  """The folder of what was kept beside a checkpoint, as it was kept.

  Raises:
    Broken: A file there is not what was kept.
  """
  found = _checksums(folder)
  for name, checksum in stored.record.files.items():
    if found.get(name) != checksum:
      raise record_lib.Broken(
        f"{folder / name} is not what was written with the checkpoint: bring it"
        " back, or give --like=FOLDER of the model."
      )
  return folder


def _to_hf(
  conversion: Conversion, source: pathlib.Path, held: contextlib.ExitStack
) -> None:
  stored = arrays_lib.Arrays(source)
  like = conversion.like
  origin = source.parent.parent / _ORIGIN
  if like is None and stored.record.files:
    like = _kept(stored, origin)
  journal = Journal(conversion, source)
  out = save.Export(
    stored.config,
    journal.folder,
    conversion.format,
    save.parse_size(conversion.max_shard_size),
    like,
  )
  names = out.plan(stored.read)
  journal.begin(held)
  sizes = [sum(spec.size for spec in out.specs(i)) for i in range(len(names))]
  left = [
    i
    for i, name in enumerate(names)
    if name not in journal or not (journal.folder / name).exists()
  ]

  def written():
    for i in left:
      yield i, out.write(i, stored.read)

  def compared(file):
    i, checksum = file
    if files.checksum(journal.folder / names[i]) != checksum:
      raise OSError(f"{journal.folder / names[i]} is not what was written.")
    return i

  done = sum(sizes) - sum(sizes[i] for i in left)
  with _progress(sum(sizes), done) as bar:
    # A file is compared while the next one is written.
    for i in prefetch.prefetch(compared, written()):
      journal.add(names[i])
      bar.update(sizes[i])
  out.finish()
  journal.finish()


def _progress(size: int, done: int) -> tqdm.tqdm:
  return tqdm.tqdm(total=size, initial=done, unit="B", unit_scale=True)


def main() -> None:
  try:
    options.check_once(sys.argv[1:])
    convert(
      tyro.cli(Conversion, prog="python -m train.convert", description=__doc__)
    )
  except (ValueError, OSError, ownership.Owned) as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  program.run(main)
