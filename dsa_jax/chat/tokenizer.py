"""Text to token ids and back.

A tokenizer turns a string into ids in [0, vocab_size) and knows one id,
`eos_id`, that no text can produce: the pipeline ends each document with it.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import os
import pathlib
from typing import Any, Final, Protocol, runtime_checkable, SupportsIndex

from jaxtyping import Int32
import numpy as np

from dsa_jax import json_file
from dsa_jax import ranges
from dsa_jax import regular_file

# What known models call the token that ends a document, for want of a
# tokenizer_config.json.
_EOS_NAMES: Final = (
  "<｜end▁of▁sentence｜>",
  "<|end_of_text|>",
  "<|endoftext|>",
  "</s>",
  "<eos>",
)
_MAX_BYTES: Final = 2**26  # twice what the largest tokenizer.json has


class TokenizerError(ValueError):
  """No tokenizer can be loaded from the name given."""


@runtime_checkable
class Tokenizer(Protocol):
  """Interface of a tokenizer for the data pipeline and the sampler."""

  eos_id: int
  vocab_size: int

  def encode(self, text: str) -> Int32[np.ndarray, " N"]:
    """Returns the ids of `text`, without eos."""
    ...

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Returns the text of `ids`, without special tokens."""
    ...


class ByteTokenizer:
  """The 256 values of a UTF-8 byte are the ids; 256 ends a document."""

  eos_id: int = 256
  vocab_size: int = 257

  def encode(self, text: str) -> Int32[np.ndarray, " N"]:
    """Returns one id a UTF-8 byte of `text`, without eos."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Returns the text of `ids`; ids that are no byte are left out.

    A model may sample bytes that are not UTF-8: they become U+FFFD.
    """
    return bytes(i for i in map(int, ids) if 0 <= i < 256).decode(
      errors="replace"
    )


class HfTokenizer:
  """A `tokenizer.json`, as published beside most models' weights.

  Attributes:
    eos_id: the `eos_token` of the `tokenizer_config.json` beside the file, or
      else the special token that bears a well-known name.
    vocab_size: the largest id plus one, added tokens included: the least
      number of rows of an embedding table.
  """

  eos_id: int
  vocab_size: int

  def __init__(self, path: str):
    """Loads the file at `path`.

    Raises:
      TokenizerError: `tokenizers` is not installed, the file is absent or is no
        tokenizer.json, or nothing tells which token is eos.
    """
    try:
      import tokenizers
    except ImportError as e:
      raise TokenizerError(
        f"tokenizer={path!r} needs the package `tokenizers`:"
        ' pip install "dsa-jax[hf]", or use "bytes".'
      ) from e
    if not os.path.lexists(path):
      raise TokenizerError(
        f"tokenizer={path!r} is not a file; give 'bytes' or the path of a"
        " tokenizer.json."
      )
    self._path = path
    text, raw = _read(path)
    with self._told("is not a tokenizer.json"):
      self._tokenizer = tokenizers.Tokenizer.from_str(text)
      # The file may ask for either; both would silently change the text.
      self._tokenizer.no_truncation()
      self._tokenizer.no_padding()
      vocab = self._tokenizer.get_vocab()
    _check_ids(path, raw, vocab)
    special = self._special()
    eos = self._find_eos(pathlib.Path(path), special)
    self.eos_id = vocab[eos]
    self.vocab_size = 1 + max(vocab.values())
    # A text that spells "</s>" must not end its own document. In some files
    # eos is an ordinary token: adding it again keeps its id.
    self._tokenizer.add_special_tokens([eos])
    self._tokenizer.encode_special_tokens = True
    self._check_eos(eos, eos in special)

  def encode(self, text: str) -> Int32[np.ndarray, " N"]:
    """Returns the ids of `text`, without bos, eos or any special token.

    Raises:
      TokenizerError: The file's rules fail at this text.
    """
    with self._told("cannot encode a text"):
      encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.array(encoding.ids, np.int32)

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Returns the text of `ids`; special tokens are left out.

    Raises:
      TokenizerError: The file's rules fail at these ids.
    """
    with self._told("cannot decode ids"):
      return self._tokenizer.decode([int(i) for i in ids])

  @contextlib.contextmanager
  def _told(self, what: str) -> Iterator[None]:
    """Says of any error of the package which file it is about."""
    try:
      yield
    except BaseException as e:
      # It raises bare Exceptions, and where it panics, no Exception at all.
      panics = type(e).__name__ == "PanicException"
      if not (panics or isinstance(e, Exception)):
        raise
      text = " ".join(str(e).split())
      raise TokenizerError(
        f"tokenizer={self._path!r} {what}: {type(e).__name__}: {text[:200]}."
      ) from e

  def _special(self) -> list[str]:
    """The tokens that the file calls special."""
    added = self._tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special]

  def _check_eos(self, eos: str, special: bool) -> None:
    """Refuses a word, or what unknown characters become, as eos."""
    text = "\U0010ffff"  # no character, and in no vocabulary
    if not special:  # a word may be written otherwise than it is called
      text += eos + self._tokenizer.decode([self.eos_id], False)
    if self.eos_id in self.encode(text):
      raise TokenizerError(
        f"tokenizer={self._path!r}: texts have {ranges.shown(eos)} within them,"
        " so that it cannot be what ends a document; give another eos_token in"
        " tokenizer_config.json."
      )

  def _find_eos(self, path: pathlib.Path, special: list[str]) -> str:
    config_path = path.with_name("tokenizer_config.json")
    if os.path.lexists(config_path):
      try:
        token = json_file.read(config_path).get("eos_token")
      except (ValueError, OSError) as e:
        raise TokenizerError(str(e)) from e
      # Either "</s>" or {"content": "</s>", "lstrip": false, ...}.
      name = token.get("content") if isinstance(token, dict) else token
      if token is not None and not isinstance(name, str):
        raise TokenizerError(
          f"{config_path}: eos_token={ranges.shown(token)} must be a token, or"
          " an object with its content."
        )
      if name is not None:
        if self._tokenizer.token_to_id(name) is None:
          raise TokenizerError(
            f"eos_token={ranges.shown(name)} of {config_path} is not in"
            f" {path}; the two files must be of one model."
          )
        return name
    for name in _EOS_NAMES:
      if name in special:
        return name
    raise TokenizerError(
      f"{path} does not say which token ends a document (special tokens:"
      f" {special}); put a tokenizer_config.json with"
      ' {"eos_token": "..."} beside it.'
    )


def _read(path: str) -> tuple[str, dict[str, Any]]:
  """The text of a tokenizer.json, and what it says."""
  try:
    text = regular_file.read(pathlib.Path(path), _MAX_BYTES)
    return text.decode("utf-8-sig"), json_file.parse(text, path)
  except (ValueError, OSError) as e:
    raise TokenizerError(
      f"tokenizer={path!r} is not a tokenizer.json: {e}"
    ) from e


def _check_ids(path: str, raw: dict[str, Any], vocab: dict[str, int]) -> None:
  """Each token has the id that the file says, and no two have the same.

  An added token whose id does not continue the vocabulary gets another one by
  the package, which says so in its log alone.
  """
  for token in raw.get("added_tokens") or []:
    name, given = token["content"], vocab.get(token["content"])
    if given != token["id"]:
      raise TokenizerError(
        f"tokenizer={path!r}: added_tokens gives {ranges.shown(name)} the id"
        f" {token['id']}, but it is {given}."
      )
  by_id = {i: name for name, i in vocab.items()}
  for name, i in vocab.items():
    if by_id[i] != name or i >= 2**31:
      raise TokenizerError(
        f"tokenizer={path!r}: the id {i} of {ranges.shown(name)} must be below"
        " 2^31, and no other token's."
      )


def load_tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer called "bytes", or that of a tokenizer.json's path.

  Raises:
    TokenizerError: see `HfTokenizer`.
  """
  return ByteTokenizer() if name == "bytes" else HfTokenizer(name)
