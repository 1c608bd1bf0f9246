"""The files that a source's patterns stand for, each once."""

from collections.abc import Iterator
import functools
import glob
import os

from train.data import documents as documents_lib


def find(source: str, option: str) -> tuple[list[str], str]:
  """Finds what patterns match, with commas between them.

  A comma or a `[` that is part of a path that exists is no pattern. `**` enters
  links to folders, but no folder twice, and a file with several names has one.

  Args:
    source: the patterns.
    option: sets them, as one types it.

  Returns:
    The paths, sorted: of regular files, and of what else is no folder; and the
    folder that all of them lie below, whichever files there are.

  Raises:
    DataError: a pattern matches nothing, or a folder cannot be listed.
  """
  found: set[str] = set()
  roots = []
  parts, first = source.split(","), 0
  if os.path.lexists(os.path.expanduser(source.strip())):
    parts = [source]
  while first < len(parts):
    for last in range(first + 1, len(parts) + 1):
      pattern = os.path.expanduser(",".join(parts[first:last]).strip())
      if matches := _match(pattern):
        break
    else:
      what = f"{option}={source!r}"
      raise documents_lib.DataError(_nothing(parts[first].strip(), what))
    found |= matches
    roots.append(os.path.abspath(_root(pattern)))
    first = last
  return sorted(_once(found)), os.path.commonpath(roots)


def _nothing(pattern: str, what: str) -> str:
  if os.path.isdir(os.path.expanduser(pattern)):
    inside = os.path.join(pattern, "**", "*")
    return f"{pattern!r} of {what} is a folder; give {inside!r}."
  return (
    f"{pattern!r} of {what} matches no file in {os.getcwd()}; give 'stdlib',"
    " globs such as 'books/**/*.txt,web/*.jsonl', or 'hf:NAME'."
  )


def _match(pattern: str) -> set[str]:
  known = _known(pattern)
  spelt = _escape(known) + pattern[len(known) :]
  try:
    for each in (spelt, _escape(pattern)):
      found = {p for p in _expand(each) if not os.path.isdir(p)}
      if found:
        return found
  except OSError as e:
    raise documents_lib.DataError(
      f"{pattern!r}: {e.filename} cannot be listed ({e.strerror}); make it"
      " readable, or narrow the glob."
    ) from e
  return set()


def _escape(path: str) -> str:
  """Makes brackets stand for themselves."""
  return path.replace("[", "[[]")


def _known(pattern: str) -> str:
  """Returns the longest beginning of a pattern that is a path that exists."""
  known = pattern
  while known and not os.path.lexists(known):
    known = os.path.dirname(known) if known != os.path.dirname(known) else ""
  return known


def _root(pattern: str) -> str:
  """Returns the folder that a pattern's files lie below."""
  root = os.path.dirname(pattern)
  while glob.has_magic(root) and not os.path.lexists(root):
    root = os.path.dirname(root)
  return root


def _expand(pattern: str) -> Iterator[str]:
  """Yields what `glob.glob` with `recursive` would, without going in circles.

  Raises:
    OSError: a folder below `**` cannot be listed.
  """
  parts = pattern.split(os.sep)
  if "**" not in parts:
    yield from glob.iglob(pattern)
    return
  deep = parts.index("**")
  before, after = os.sep.join(parts[:deep]), os.sep.join(parts[deep + 1 :])
  tops = glob.iglob(before or os.sep) if deep else [""]
  for top in tops:
    for folder in _folders(top):
      below = os.path.join(glob.escape(folder), after or "*")
      yield from _expand(below)


def _folders(top: str) -> Iterator[str]:
  """Yields a folder and all below it, each once, the nearest first."""
  seen, queue = set(), [top]
  for folder in queue:
    real = os.path.realpath(folder)
    if real in seen or not os.path.isdir(real):
      continue
    seen.add(real)
    yield folder
    with os.scandir(folder or os.curdir) as entries:
      queue += sorted(
        os.path.join(folder, entry.name)
        for entry in entries
        if os.path.isdir(entry) and not entry.name.startswith(".")
      )


def _once(paths: set[str]) -> list[str]:
  """Leaves one name of each file: rather one without links in it."""

  folders = functools.cache(os.path.realpath)
  ranked = []
  for path in paths:
    folder, name = os.path.split(path)
    real = os.path.join(folders(folder), name)
    if os.path.islink(path):
      real = os.path.realpath(path)
    linked = real != os.path.abspath(path)
    ranked.append((linked, path.count(os.sep), path, real))
  kept = {}
  for _, _, path, real in sorted(ranked):
    kept.setdefault(_identity(real), path)
  return [*kept.values()]


def _identity(real: str) -> tuple[int, int] | str:
  """Returns what names of one file have in common, links or not."""
  try:
    stat = os.stat(real)
  except OSError:  # a link to nothing
    return real
  # Where there are no hard links, as in a bucket, numbers may mean nothing.
  return (stat.st_dev, stat.st_ino) if stat.st_nlink > 1 else real
