"""Text to token ids and back.

A tokenizer turns a string into ids in [0, vocab_size) and knows one id,
`eos_id`, that no text can produce: the pipeline ends each document with it.
"""

from collections.abc import Iterable
import json
import pathlib
from typing import Any, Protocol, runtime_checkable, SupportsIndex

from jaxtyping import Int32
import numpy as np

# What known models call the token that ends a document, for want of a
# tokenizer_config.json.
_EOS_NAMES = (
  "<｜end▁of▁sentence｜>",
  "<|end_of_text|>",
  "<|endoftext|>",
  "</s>",
  "<eos>",
)


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
    if not pathlib.Path(path).is_file():
      raise TokenizerError(
        f"tokenizer={path!r} is not a file; give 'bytes' or the path of a"
        " tokenizer.json."
      )
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as e:  # the package raises bare Exceptions
      raise TokenizerError(
        f"tokenizer={path!r} is not a tokenizer.json: {e}."
      ) from e
    # The file may ask for either; both would silently change the text.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    vocab = self._tokenizer.get_vocab()
    eos = self._find_eos(pathlib.Path(path))
    self.eos_id = vocab[eos]
    self.vocab_size = 1 + max(vocab.values())
    # A text that spells "</s>" must not end its own document. In some files
    # eos is an ordinary token: adding it again keeps its id.
    self._tokenizer.add_special_tokens([eos])
    self._tokenizer.encode_special_tokens = True

  def encode(self, text: str) -> Int32[np.ndarray, " N"]:
    """Returns the ids of `text`, without bos, eos or any special token."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.array(encoding.ids, np.int32)

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Returns the text of `ids`; special tokens are left out."""
    return self._tokenizer.decode([int(i) for i in ids])

  def _find_eos(self, path: pathlib.Path) -> str:
    config_path = path.with_name("tokenizer_config.json")
    if config_path.is_file():
      config: dict[str, Any] = json.loads(config_path.read_text("utf-8"))
      token = config.get("eos_token")
      # Either "</s>" or {"content": "</s>", "lstrip": false, ...}.
      name = token["content"] if isinstance(token, dict) else token
      if name is not None:
        if self._tokenizer.token_to_id(name) is None:
          raise TokenizerError(
            f"eos_token={name!r} of {config_path} is not in {path}; the two"
            " files must be of one model."
          )
        return name
    added = self._tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    for name in _EOS_NAMES:
      if name in special:
        return name
    raise TokenizerError(
      f"{path} does not say which token ends a document (special tokens:"
      f" {special}); put a tokenizer_config.json with"
      ' {"eos_token": "..."} beside it.'
    )


def load_tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer called "bytes", or that of a tokenizer.json's path.

  Raises:
    TokenizerError: see `HfTokenizer`.
  """
  return ByteTokenizer() if name == "bytes" else HfTokenizer(name)
