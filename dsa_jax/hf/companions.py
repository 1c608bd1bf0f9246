"""What belongs to a model besides its weights and config.json."""

import dataclasses
import os
import pathlib
import shutil
from typing import Final

from dsa_jax import regular_file

_NAMES: Final = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "generation_config.json",
  "chat_template.jinja",
  "chat_template.json",
  "LICENSE",
  "encoding/*.py",
)
_MAX_BYTES: Final = 2**28  # the largest tokenizers have a tenth of it


@dataclasses.dataclass(frozen=True)
class Companion:
  """A file beside the weights."""

  file: pathlib.Path
  name: pathlib.Path
  """Its path in the folder."""


def find(folder: pathlib.Path) -> list[Companion]:
  """The companions in a folder of a model.

  A link is followed within the folder, and from a snapshot in the cache of
  Hugging Face's hub to the blobs beside it: what lies elsewhere is not part of
  the model, and is not to be copied with it.

  Raises:
    ValueError: One leads elsewhere, is no regular file, or is far too large;
      names it.
    OSError: One leads nowhere, or cannot be read.
  """
  inside = [folder.resolve()]
  if inside[0].parent.name == "snapshots":
    inside.append(inside[0].parent.parent / "blobs")
  found = []
  for pattern in _NAMES:
    for file in sorted(folder.glob(pattern)):
      real = pathlib.Path(os.path.realpath(file))
      if not any(real.is_relative_to(place) for place in inside):
        raise ValueError(
          f"{file} is a link to {real}, which is not in the folder: put the"
          " file itself there, or remove the link."
        )
      with regular_file.open_(file):  # and it can be read
        size = real.stat().st_size
      if size > _MAX_BYTES:
        raise ValueError(
          f"{file} has {size:,} bytes, which is no such file: remove it."
        )
      found.append(Companion(file, file.relative_to(folder)))
  return found


def copy(companions: list[Companion], target: pathlib.Path) -> None:
  """Copies what was found into another folder."""
  for companion in companions:
    to = target / companion.name
    to.parent.mkdir(parents=True, exist_ok=True)
    with regular_file.open_(companion.file) as source, open(to, "wb") as out:
      shutil.copyfileobj(source, out)
