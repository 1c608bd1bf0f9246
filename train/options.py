"""Command lines: options become a config, and errors name options.

Each field of a config, and of the configs in it, is an option: the field
`stages[1].seq_len` is `--stages.1.seq-len`. tyro reads them; the configs are
made here, so that what they refuse is told by the name that was typed.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import re
import typing
from typing import Any

import tyro


def parse[Config](
  default: Config | type[Config],
  args: Sequence[str],
  *,
  program: str,
  description: str,
) -> Config:
  """The config that options make of `default`.

  Args:
    default: The config without any option, a dataclass; or its class, where
      there is none without some.
    args: The options.
    program: The command without them, for the help text.
    description: The beginning of the help text.

  Raises:
    ValueError: What an option says is refused, or two contradict each other.
    SystemExit: tyro does not know an option, or printed the help text.
  """
  check_once(args)
  is_class = isinstance(default, type)
  cls = default if is_class else type(default)
  _check_switches(args, cls)
  registry = tyro.constructors.ConstructorRegistry()
  registry.struct_rule(_Postponed())
  try:
    said = tyro.cli(
      cls,
      prog=program,
      description=description,
      default=tyro.MISSING_NONPROP if is_class else default,
      args=args,
      config=(tyro.conf.AvoidSubcommands, tyro.conf.ConsolidateSubcommandArgs),
      registry=registry,
    )
  except AssertionError as e:  # tyro's, of the shell to complete options for
    raise ValueError(str(e)) from e
  return make(said, "")


def check_once(args: Sequence[str]) -> None:
  """Raises a ValueError for an option that is given twice, and not alike."""
  said: dict[str, list[str]] = {}
  for name, values in _given(args):
    if said.setdefault(name, values) != values:
      raise ValueError(f"{name} is given twice, and not alike; give it once.")


def spelled(text: str, cls: type[Any], path: str = "") -> str:
  """An error's text with its fields as the options that are typed.

  A field is known by a dot in its name, or by a value: `mesh.data`, `seed=3`.

  Args:
    text: What a config's check, or what reads the config, says.
    cls: The dataclass whose fields it names.
    path: Where that is in the whole config: "stages.1".
  """
  prefix = f"--{path}." if path else "--"
  return _names(cls).sub(
    lambda found: prefix + found["name"].replace("_", "-"), text
  )


@dataclasses.dataclass(frozen=True)
class Unmade:
  """A config that is not made yet, and the values of its fields, see `make`."""

  cls: type[Any]
  values: dict[str, Any]


class _Postponed:
  """tyro's own rule for dataclasses, but for what it makes: `Unmade`."""

  def __init__(self):
    self._asks = False

  def __call__(
    self, info: tyro.constructors.StructTypeInfo
  ) -> tyro.constructors.StructConstructorSpec | None:
    if self._asks or not dataclasses.is_dataclass(info.type):
      return None
    self._asks = True
    try:
      spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
    finally:
      self._asks = False
    assert isinstance(spec, tyro.constructors.StructConstructorSpec)
    make = lambda **values: Unmade(info.type, values)
    return dataclasses.replace(spec, instantiate=make)


def make(said: Any, path: str) -> Any:
  """Makes the configs in what tyro gave, innermost first.

  Args:
    said: An `Unmade` config, a tuple of them, or any other value.
    path: Where it is in the whole config: "stages.1"; "" for the whole.

  Raises:
    ValueError: A config refuses what it is given; see `spelled`.
  """
  inside = f"{path}." if path else ""
  if isinstance(said, tuple):
    return tuple(make(x, f"{inside}{i}") for i, x in enumerate(said))
  if not isinstance(said, Unmade):
    return said
  values = {name: make(x, inside + name) for name, x in said.values.items()}
  try:
    return said.cls(**values)
  except ValueError as e:
    raise ValueError(spelled(str(e), said.cls, path)) from e


def _check_switches(args: Sequence[str], cls: type[Any]) -> None:
  """Refuses a value of what is on or off: tyro would name the value alone."""
  for name, values in _given(args):
    if values not in ([], ["off"]) and _switches(cls).fullmatch(name):
      off = re.sub(r"^(--(?:.*\.)?)", r"\1no-", name)
      raise ValueError(
        f"{name} takes no value, and is given {values[0][:80]!r}: give "
        f"{name} or {off} alone."
      )


def _given(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
  """The options in a command line, each as it is in --help, with its values."""
  starts = [i for i, arg in enumerate(args) if arg.startswith("--")]
  for start, end in zip(starts, [*starts[1:], len(args)]):
    name, equals, value = args[start].partition("=")
    name = "--" + name[2:].replace("_", "-")
    values = [value] * bool(equals) + list(args[start + 1 : end])
    turned_off = re.sub(r"^(--|.*\.)no-", r"\1", name)
    yield turned_off, values if turned_off == name else ["off"]


@functools.cache
def _names(cls: type[Any]) -> re.Pattern[str]:
  """What matches a field of a config, or of one in it, in a text."""
  fields = [name for name, _ in _fields(cls)]
  names = "|".join(sorted(fields, key=len, reverse=True))
  inner = "|".join(x for x in names.split("|") if r"\." in x) or "(?!)"
  return re.compile(
    rf"(?<![\w./-])(?:self\.)?(?P<name>(?:{names})(?==)|(?:{inner})(?!\.?\w))"
  )


@functools.cache
def _switches(cls: type[Any]) -> re.Pattern[str]:
  """What matches an option, as it is in --help, that is on or off."""
  fields = [name for name, kind in _fields(cls) if kind is bool]
  return re.compile(f"--({'|'.join(fields)})".replace("_", "-"))


def _fields(kind: Any) -> Iterator[tuple[str, Any]]:
  """Patterns of the names of all fields, and of those of their own; types."""
  for field in dataclasses.fields(kind):
    yield field.name, field.type
    for inner, index in _configs(field.type):
      for name, inner_type in _fields(inner):
        yield rf"{field.name}\.{index}{name}", inner_type


def _configs(kind: Any) -> Iterator[tuple[type[Any], str]]:
  """The configs in a field's type, and the pattern of the way there."""
  if dataclasses.is_dataclass(kind):
    yield typing.cast(type[Any], kind), ""
  index = r"(?:\d+|N)\." if typing.get_origin(kind) is tuple else ""
  for part in typing.get_args(kind):
    yield from ((inner, index + way) for inner, way in _configs(part))
