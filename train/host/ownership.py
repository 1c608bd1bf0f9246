"""One owner a folder: of several programs that would write there, one does.

FOLDER/owners/N.json says who owns the folder. To own it is to have made the
file of the next number, which only one can. That is done where the owner
before is gone: it renamed its file to N.free, its process is not there any
more, or, if that cannot be seen from here, its file has not been touched for a
while. Nothing but making a file that must not exist is asked of the file
system, no lock; and no clock of another host is believed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import shutil
import socket
import threading
import time
from typing import Annotated, Final

from dsa_jax import ranges
from train.host import json_files
from train.host import processes
from train.host import program

FOLDER: Final = "owners"
_BEAT_SECONDS: Final = 10
# Longer than a mounted bucket or NFS shows what is not so any more.
_SILENCE_SECONDS: Final = 90
# This process, among all that ever were.
_TOKEN: Final = secrets.token_hex(8)


class Owned(Exception):
  """Another program owns the folder; nothing there was changed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
  """A process that owns a folder."""

  host: str
  pid: Annotated[int, ranges.Interval(1, 2**31 - 1)]
  since: str
  """UTC."""
  place: str
  """Where its pid means something: a boot of a machine, and a name space."""
  born: str
  """When the process began, as its kernel says it."""
  token: str

  def __post_init__(self):
    ranges.check(self)  # a file may say anything: 0 would be all of a group

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}, since {self.since}"


class Claim:
  """Owns a folder until it is closed.

  A process that owns it already may claim it again: the first claim counts. Of
  several processes of one run, the first owns it for all.
  """

  def __init__(self, folder: str | pathlib.Path):
    """Makes the folder, if there is none, and owns it.

    Raises:
      Owned: Another process does; says which. In all processes of this run.
      OSError: It cannot be written to.
    """
    self._owners = pathlib.Path(folder).resolve() / FOLDER
    self._closed = threading.Event()
    self._thread: threading.Thread | None = None
    self._own, why = None, None
    if processes.is_first():
      try:
        self._own = self._claim()
      except (Owned, OSError) as e:
        why = e
    processes.meet("owned")  # it may have been waited for
    if not processes.all_agree(why is None):
      raise why or Owned(f"The first process does not own {folder}, see there.")
    self._confirmed = time.monotonic()
    if self._own is not None:
      self._thread = threading.Thread(
        target=self._beat, name="owner", daemon=True
      )
      self._thread.start()

  def confirm(self) -> None:
    """Ends the process if it has slept so long that another took it for dead.

    Takes no time to speak of, where it has not.
    """
    if time.monotonic() - self._confirmed > 2 * _BEAT_SECONDS:
      self._look()

  def close(self) -> None:
    """Sets the folder free."""
    if self._own is None or self._closed.is_set():
      return
    self._stop()
    with contextlib.suppress(OSError):  # the process will be seen to be gone
      self._own.rename(self._own.with_suffix(".free"))

  def dissolve(self) -> None:
    """Sets the folder free, and leaves no trace there."""
    self.close()
    if self._own is not None:
      shutil.rmtree(self._owners)

  def move(self, target: pathlib.Path) -> None:
    """Gives the folder another name, and leaves no trace there.

    Until then it is owned: none can begin anew in what is done.
    """
    self._stop()
    self._owners.parent.rename(target)
    shutil.rmtree(target / FOLDER)

  def _stop(self) -> None:
    self._closed.set()
    if self._thread is not None:
      self._thread.join()

  def _claim(self) -> pathlib.Path | None:
    """Makes the file that says so; None if this process owns it already."""
    while True:
      self._owners.mkdir(parents=True, exist_ok=True)
      number, newest = _newest(self._owners)
      if newest is not None and newest.suffix == ".json":
        owner = _read(newest)
        if owner is not None and owner.token == _TOKEN:
          return None
        if not _gone(newest, owner):
          # Which may not have been written a moment ago.
          raise Owned(_refusal(self._owners, _read(newest) or owner))
      own = self._owners / f"{number + 1}.json"
      try:
        _write(own)
      except FileExistsError:
        continue  # another was faster: see whether it stays
      # A slow one may have taken a number whose time is over.
      _, newest = _newest(self._owners)
      if newest != own or _token(own) != _TOKEN:
        continue
      with contextlib.suppress(OSError):  # those of lower numbers do no harm
        for path in self._owners.iterdir():
          if 0 < _number(path) <= number:
            path.unlink(missing_ok=True)
      return own

  def _beat(self) -> None:
    while not self._closed.wait(_BEAT_SECONDS):
      self._look()

  def _look(self) -> None:
    """Shows that this process lives, if it is still the owner."""
    if self._own is None:
      return
    try:
      _, newest = _newest(self._owners)
      if newest == self._own:
        os.utime(self._own)
        self._confirmed = time.monotonic()
        return
      owner = _read(newest) if newest else None
    except FileNotFoundError:  # the folder was deleted
      owner = None
    except OSError:
      return  # what cannot be read now, may be in a while
    if not self._closed.is_set():
      program.say(
        f"error: {self._owners.parent} is not this process's any more, but "
        f"{owner or 'nobody'}'s; this process ends and writes nothing more.\n"
      )
      os._exit(1)


def find(folder: str | pathlib.Path) -> Owner | None:
  """Who owns the folder, as far as can be seen at once; changes nothing."""
  owners = pathlib.Path(folder) / FOLDER
  newest = _newest(owners)[1] if owners.is_dir() else None
  if newest is None or newest.suffix != ".json":
    return None
  owner = _read(newest)
  here = owner is not None and owner.place == _place()
  return None if owner is None or here and not _lives(owner) else owner


def _newest(owners: pathlib.Path) -> tuple[int, pathlib.Path | None]:
  files = [path for path in owners.iterdir() if _number(path)]
  # Free, where both say so: who came late makes a file that was made already.
  order = lambda path: (_number(path), path.suffix == ".free")
  newest = max(files, key=order, default=None)
  return (0, None) if newest is None else (_number(newest), newest)


def _number(path: pathlib.Path) -> int:
  known = path.suffix in (".json", ".free") and path.stem.isdecimal()
  return int(path.stem) if known else 0


def _write(file: pathlib.Path) -> None:
  owner = Owner(
    host=socket.gethostname(),
    pid=os.getpid(),
    since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    place=_place(),
    born=_born(os.getpid()),
    token=_TOKEN,
  )
  with file.open("x", encoding="utf-8") as out:
    try:
      out.write(json.dumps(dataclasses.asdict(owner)) + "\n")
      out.flush()
    except OSError:
      file.unlink(missing_ok=True)
      raise


def _read(file: pathlib.Path) -> Owner | None:
  """None where that is not written yet, or not any more."""
  try:
    return Owner(**json_files.read(file))
  except (ValueError, TypeError):  # Damaged is one
    return None


def _token(file: pathlib.Path) -> str:
  owner = _read(file)
  return owner.token if owner else ""


def _gone(file: pathlib.Path, owner: Owner | None) -> bool:
  """Whether an owner has ended; waits where only its file can tell."""
  if owner is not None and owner.place == _place():
    return not _lives(owner)
  before = _mark(file)
  processes.say(
    f"waiting  for up to {_SILENCE_SECONDS} s: {file.parent.parent} was owned "
    f"by {owner or 'another process'}, which may be gone"
  )
  until = time.monotonic() + _SILENCE_SECONDS
  while time.monotonic() < until:
    time.sleep(_BEAT_SECONDS / 5)
    now = _mark(file)
    if now != before:
      return now is None
  return True


def _mark(file: pathlib.Path) -> tuple[int, bytes] | None:
  """Changes when the file is touched; None once it is not there."""
  try:
    with file.open("rb") as content:  # opened: NFS asks its server then
      return os.fstat(content.fileno()).st_mtime_ns, content.read()
  except FileNotFoundError:
    return None


def _refusal(owners: pathlib.Path, owner: Owner | None) -> str:
  return (
    f"{owners.parent} is owned by {owner or 'another process'}: it writes "
    "there, and only one may. Wait until it has ended, or stop it; if it "
    f"surely has ended, delete {owners}."
  )


def _lives(owner: Owner) -> bool:
  """Whether an owner of this place still runs."""
  try:
    os.kill(owner.pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # another user's
    pass
  return _born(owner.pid) in ("", owner.born)  # or its number is another's


def _place() -> str:
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text("utf-8")
    return f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # no Linux
    return socket.gethostname()


def _born(pid: int) -> str:
  """When a process began: empty if not known; of a zombie, "dead"."""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
  except OSError:
    return ""
  state, *fields = text.rpartition(")")[2].split()
  return "dead" if state in "ZX" else fields[18]
