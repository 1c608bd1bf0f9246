"""Text of a sample as it grows, up to a stop text."""

from collections.abc import Iterable
from typing import Final, SupportsIndex

from dsa_jax.chat import tokenizer as tokenizer_lib

_UNKNOWN: Final = "\ufffd"  # what bytes become that are no UTF-8
# Ids that stay as context of those that follow: a token's text may depend on
# what is before it (most decoders drop the space that a text begins with).
_CONTEXT: Final = 8
_MOST: Final = 32  # ids that are decoded at a time, whatever they are


class TextStream:
  """Turns the ids of a sample into text, piece by piece.

  The pieces make the text of all ids at once, however the ids are cut. Held
  back is what more ids may change: the bytes of a character that is not whole,
  and what a stop text may begin with. Only the last ids are decoded, so that
  an id costs the same wherever it is.

  One kind of tokenizer (`ByteFallback`) makes whole characters unknown where
  bytes follow them that are no UTF-8; here, what was shown stays as it is.

  Attributes:
    stopped: Whether a stop text is complete: what was returned is all there is.
    used: Ids that were read, up to the one that completed the stop text.
  """

  stopped: bool
  used: int

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, stop: tuple[str, ...] = ()
  ):
    """Begins a text.

    Args:
      tokenizer: Decodes the ids.
      stop: The text ends where one of these begins: the one that is complete
        first, of several the longest.
    """
    self.stopped = False
    self.used = 0
    self._decode = tokenizer.decode
    self._stops = [_Stop(text) for text in stop]
    self._tail = ""  # what a stop text may begin with
    self._begin()

  def push(self, ids: Iterable[SupportsIndex]) -> str:
    """Reads more ids, and returns the text that may be shown now."""
    pieces = []
    for i in ids:
      if self.stopped:
        break
      self.used += 1
      pieces.append(self._until_stop(self._read(int(i))))
    return "".join(pieces)

  def finish(self) -> str:
    """Returns what was held back: no more ids will come."""
    if self.stopped:
      return ""
    piece = self._until_stop(self._flush())
    tail, self._tail = self._tail, ""
    return piece if self.stopped else piece + tail

  def _read(self, i: int) -> str:
    """Adds an id, and returns the text that no later id changes."""
    text = self._decode([*self._ids, i])
    # A special token. The space that is dropped from a text, too, changes
    # nothing where it is the first, but has a text where it is not.
    if text == self._text and not self._decode([i, i]):
      return ""
    self._ids.append(i)
    self._text = text
    # A character has four bytes at most: three may wait for the fourth.
    waiting = min(3, len(text) - len(text.rstrip(_UNKNOWN)))
    if not text.startswith(self._shown):
      # What was taken back comes back once the last character is whole.
      if len(self._ids) - self._agreed < 4:
        return ""
      ids = self._ids[self._agreed :]
      self._begin()
      return "".join(map(self._read, ids))
    piece = text[len(self._shown) : len(text) - waiting]
    self._shown += piece
    if len(self._ids) >= 2 * _CONTEXT:
      self._shorten()
    self._agreed = len(self._ids)
    return piece if len(self._ids) < _MOST else piece + self._flush()

  def _shorten(self) -> None:
    """Leaves out the first ids, unless that would cut a character."""
    rest = len(self._text) - len(self._shown)
    for k in range(_CONTEXT, _CONTEXT + 4):
      head, text = self._decode(self._ids[:k]), self._decode(self._ids[k:])
      # A character that is cut becomes unknown twice.
      unknown = head.count(_UNKNOWN) + text.count(_UNKNOWN)
      if unknown == self._text.count(_UNKNOWN) and len(text) > rest:
        self._ids = self._ids[k:]
        self._text, self._shown = text, text[: len(text) - rest]
        return

  def _flush(self) -> str:
    """The rest of the text, whatever would follow; begins another one."""
    piece = self._text[len(self._shown) :]
    self._begin()
    return piece

  def _begin(self) -> None:
    self._ids: list[int] = []  # the last ones
    self._text = ""  # theirs
    self._shown = ""  # its beginning, which `_read` has returned
    self._agreed = 0  # how many of the ids had a text that begins so

  def _until_stop(self, piece: str) -> str:
    """Adds to the text; returns what is no part of a stop text."""
    text, before = self._tail + piece, len(self._tail)
    for end, character in enumerate(piece, before + 1):
      for stop in self._stops:
        stop.read(character)
      lengths = [stop.seen for stop in self._stops if stop.complete]
      if lengths:
        self.stopped = True
        return text[: end - max(lengths)]
    held = max((stop.seen for stop in self._stops), default=0)
    self._tail = text[len(text) - held :]
    return text[: len(text) - held]


class _Stop:
  """A stop text, and how much of it the text read so far ends with.

  The search is Knuth, Morris and Pratt's: no character is looked at again.
  """

  def __init__(self, text: str):
    self._text = text
    self.seen = 0
    # The longest beginning of the text that its first 1, 2, … end with, too.
    self._borders: list[int] = [0]
    for character in text[1:]:
      self._borders.append(self._next(self._borders[-1], character))

  @property
  def complete(self) -> bool:
    return self.seen == len(self._text)

  def read(self, character: str) -> None:
    self.seen = self._next(self.seen, character)

  def _next(self, seen: int, character: str) -> int:
    """What is seen after one more character, if `seen` were before it."""
    while seen and self._text[seen] != character:
      seen = self._borders[seen - 1]
    return seen + (self._text[seen] == character)
