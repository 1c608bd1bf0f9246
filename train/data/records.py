"""The text of a record: bytes of UTF-8, a JSON object's field."""

import codecs
from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import functools
import json
from typing import Any

from train.data import documents as documents_lib

BadRecord = documents_lib.BadRecord

_SHOWN, _WIDTH = 20, 40  # names in an error, and letters of each
# Objects become tuples of pairs, arrays lists: a key may be there twice.
_JSON = json.JSONDecoder(object_pairs_hook=tuple)
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclasses.dataclass(frozen=True)
class Field:
  """What holds the text of a record.

  Attributes:
    name: a key of JSON, or a column.
    option: sets it, as one types it.
  """

  name: str
  option: str


def shown(names: Iterable[str]) -> str:
  """Returns names as an error lists them; of many, the first."""
  names = [*names]
  cut = [n if len(n) <= _WIDTH else n[:_WIDTH] + "..." for n in names[:_SHOWN]]
  more = len(names) - len(cut)
  return f"{cut} and {more} more" if more else f"{cut}"


def decode(data: bytes, where: str, place: tuple[str, int], offset: int) -> str:
  """Returns the text of a record, without a byte order mark.

  Args:
    data: the record.
    where: what errors call it.
    place: file and place, as a `BadRecord` names them.
    offset: its first byte in the file.

  Raises:
    BadRecord: it is not UTF-8, or binary.
  """
  file, at = place
  bad = functools.partial(BadRecord, file=file, at=at, head=data)
  if offset == 0 and data.startswith(_UTF16):
    raise bad(
      f"{where} is UTF-16 or UTF-32; convert it (iconv -f UTF-16 -t UTF-8), or"
      " narrow the glob."
    )
  if (zero := data.find(0)) >= 0:
    raise bad(
      f"{where} is no text: byte {offset + zero} is a NUL; narrow the glob, or"
      " convert it to UTF-8."
    )
  if offset == 0:
    data = data.removeprefix(codecs.BOM_UTF8)
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise bad(
      f"{where} is not UTF-8: byte {data[e.start]:#04x} at offset"
      f" {offset + e.start}; convert it (iconv -t UTF-8), or narrow the glob."
    ) from e


def parse(text: str) -> Any:
  """Returns what a line of JSON holds; objects as tuples of pairs.

  Raises:
    ValueError: it is not JSON, or holds a number of too many digits.
    RecursionError: it is nested too deeply.
  """
  return _JSON.decode(text)


def parse_first(text: str) -> Any:
  """Like `parse`, of a text that goes on after it."""
  return _JSON.raw_decode(text)[0]


def spans(text: str) -> list[tuple[int, int]]:
  """Returns where the elements of a JSON array begin and end, in characters.

  Raises:
    ValueError: it is none, see `parse`.
    RecursionError: see `parse`.
  """
  found, at = [], _skip(text, 0)
  if text[at : at + 1] != "[":
    raise json.JSONDecodeError("Expecting '['", text, at)
  at = _skip(text, at + 1)
  more = text[at : at + 1] != "]"
  while more:
    _, end = _JSON.raw_decode(text, at)
    found.append((at, end))
    at = _skip(text, end)
    more = text[at : at + 1] == ","
    at = _skip(text, at + 1) if more else at
  if text[at : at + 1] != "]":
    raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
  if (end := _skip(text, at + 1)) < len(text):
    raise json.JSONDecodeError("Extra data", text, end)
  return found


def _skip(text: str, at: int) -> int:
  while text[at : at + 1] in (" ", "\t", "\n", "\r"):
    at += 1
  return at


def text_of(
  line: str,
  field: Field,
  where: str,
  place: tuple[str, int],
  read: Callable[[str], Any] = parse,
) -> str:
  """Returns the text of a JSON object.

  Args:
    line: the object.
    field: holds the text.
    where: what errors call the record.
    place: file and place, as a `BadRecord` names them.
    read: makes the object of the line.

  Raises:
    BadRecord: it is none, or has no such text.
  """
  file, at = place
  head = line[:64].encode(errors="surrogatepass")
  bad = functools.partial(BadRecord, file=file, at=at, head=head)
  try:
    record = read(line)
  except (ValueError, RecursionError) as e:
    raise bad(
      f"{where} is not JSON ({e}); each line must be one object."
    ) from e
  if not isinstance(record, tuple):
    raise bad(
      f"{where} holds a {type(record).__name__}, not an object; each line must"
      f' be like {{"{field.name}": "..."}}.'
    )
  found = [value for key, value in record if key == field.name]
  if not found:
    raise bad(
      f"{where} has no field {field.name!r}; give {field.option} one of"
      f" {shown(key for key, _ in record)}."
    )
  if len(found) > 1:
    raise bad(
      f"{where} has the field {field.name!r} {len(found)} times; leave it one."
    )
  (text,) = found
  if not isinstance(text, str):
    kind = "dict" if isinstance(text, tuple) else type(text).__name__
    raise bad(
      f"{where}: field {field.name!r} holds a {kind}, not a string; give"
      f" {field.option} a field of strings, or remove the record."
    )
  try:
    text.encode()
  except UnicodeEncodeError as e:  # JSON can spell half a surrogate pair
    raise bad(
      f"{where}: field {field.name!r} is not valid Unicode ({e.reason});"
      " remove the record."
    ) from e
  return text
