"""An object in a JSON file, of which every key is asked for, or told of."""

from typing import Any, Final, NoReturn

from dsa_jax import ranges

REQUIRED: Final = object()


class Section:
  """The object, and which of its keys were read."""

  def __init__(self, values: dict[str, Any], file: str, path: str = ""):
    """A section of `file`; `path` is in front of its keys: "rope_scaling."."""
    self._values, self._file, self._path = values, file, path
    self._read: set[str] = set()
    self._inner: dict[str, Section] = {}

  def get(
    self,
    key: str,
    kinds: type[Any],
    name: str | None = None,
    default: Any = REQUIRED,
  ) -> Any:
    """The value of a key; a list as a tuple, and for null its default.

    Args:
      key: What it is called.
      kinds: A dataclass, of which a field says what the value may be.
      name: That field, if it is called otherwise.
      default: What a key that is absent or null stands for.

    Raises:
      ValueError: The key is absent or null and has no default, or its value is
        not what the field may be; names file and key.
    """
    self._read.add(key)
    value = self._values.get(key)
    if value is None and default is not REQUIRED:
      return default
    if key not in self._values:
      raise ValueError(f"{self._file} lacks the key {self._path}{key}.")
    if isinstance(value, list):
      value = tuple(value)
    if wrong := ranges.violation(kinds, name or key, value):
      self.refuse(key, wrong.replace("a tuple", "a list"))
    return value

  def expect(self, key: str, *allowed: Any, by: str = "") -> None:
    """Refuses other values than these; the key may be absent.

    Args:
      key: What it is called.
      *allowed: The values.
      by: The keys that they follow from.
    """
    self._read.add(key)
    value = self._values.get(key)
    # True == 1, but a file that says the one does not mean the other.
    if key in self._values and not any(
      value == x and isinstance(value, bool) == isinstance(x, bool)
      for x in allowed
    ):
      said = " or ".join(ranges.shown(x) for x in allowed if x is not None)
      self.refuse(key, f"must be {said}{by and f', by {by}'}")

  def section(self, key: str) -> "Section | None":
    """The object under a key; None if it is absent, null or empty.

    Raises:
      ValueError: It is something else.
    """
    self._read.add(key)
    values = self._values.get(key)
    if values is None or values == {}:
      return None
    if not isinstance(values, dict):
      self.refuse(key, "must be an object or null")
    path = f"{self._path}{key}."
    self._inner[key] = Section(values, self._file, path)
    return self._inner[key]

  def is_null(self, key: str) -> bool:
    """Whether the key is there, and null."""
    return key in self._values and self._values[key] is None

  def skip(self, *keys: str) -> None:
    """Takes keys for read that have no bearing, whatever their values are."""
    self._read.update(keys)

  def refuse(self, key: str, wrong: str) -> NoReturn:
    """Raises a ValueError for what a key asks for: it "must be above 0"."""
    value = ranges.shown(self._values.get(key))
    raise self.error(f"{key}={value} is not supported; it {wrong}.")

  def error(self, text: str) -> ValueError:
    """An error that begins with a key of the section."""
    return ValueError(f"{self._file}: {self._path}{text}")

  def objects(self) -> list[str]:
    """The keys whose values are objects."""
    return [key for key, x in self._values.items() if isinstance(x, dict)]

  def unread(self) -> list[str]:
    """The keys that nothing asked for, at any depth: rope_scaling.foo."""
    own = [self._path + key for key in self._values.keys() - self._read]
    inner = [x for section in self._inner.values() for x in section.unread()]
    return sorted(own + inner)

  def kept(self) -> dict[str, Any]:
    """The object without the keys that nothing asked for."""
    return {
      key: self._inner[key].kept() if key in self._inner else value
      for key, value in self._values.items()
      if key in self._read
    }
