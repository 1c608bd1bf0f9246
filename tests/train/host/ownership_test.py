"""Of programs that would write in one folder, one does."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from train.host import ownership


@pytest.fixture
def clock(monkeypatch):
  """Time passes only as it is slept; what happens meanwhile."""
  now, happens = [0.0], []

  def sleep(seconds):
    now[0] += seconds
    if happens:
      happens.pop(0)()

  monkeypatch.setattr(ownership.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(ownership.time, "sleep", sleep)
  return now, happens


@pytest.fixture
def ended(monkeypatch):
  codes = []
  monkeypatch.setattr(ownership.os, "_exit", codes.append)
  return codes


def own(folder, number=4, **changes):
  """Has another program own a folder: as this process, but for `changes`."""
  owners = folder / "owners"
  owners.mkdir(parents=True, exist_ok=True)
  file = owners / f"{number}.json"
  ownership._write(file)
  owner = json.loads(file.read_text()) | {"token": "another's"} | changes
  file.write_text(json.dumps(owner))
  return file


def files(folder):
  return {
    path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_a_second_program_is_told_who_owns_the_folder(tmp_path):
  own(tmp_path, host="here", since="2026-01-02")
  before = files(tmp_path)
  with pytest.raises(
    ownership.Owned, match=f"process {os.getpid()} on here, since 2026-01-02"
  ):
    ownership.Claim(tmp_path)
  assert files(tmp_path) == before
  assert ownership.find(tmp_path) is not None


def dead():
  """The pid of a process that ended."""
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


@pytest.mark.parametrize(
  "changes",
  [
    lambda: {"pid": dead()},
    lambda: {"born": "1"},  # its number is another's now, as 1 in a container
    lambda: {"pid": 1, "born": "1"},
  ],
)
def test_an_owner_that_is_gone_is_followed_at_once(tmp_path, clock, changes):
  own(tmp_path, **changes())
  assert ownership.find(tmp_path) is None
  claim = ownership.Claim(tmp_path)
  assert clock[0] == [0.0]
  assert [x.name for x in (tmp_path / "owners").iterdir()] == ["5.json"]
  claim.close()
  assert [x.name for x in (tmp_path / "owners").iterdir()] == ["5.free"]
  ownership.Claim(tmp_path).close()
  assert [x.name for x in (tmp_path / "owners").iterdir()] == ["6.free"]


def test_a_process_is_known_by_when_it_began():
  with subprocess.Popen(["sleep", "60"]) as later:
    born = [int(ownership._born(pid)) for pid in (os.getpid(), later.pid)]
    later.kill()
  assert 0 < born[0] < born[1]


def test_what_cannot_be_seen_of_an_owner_may_live(tmp_path, monkeypatch):
  """It is another user's, or no /proc tells when it began."""
  own(tmp_path, born="7")
  monkeypatch.setattr(ownership, "_born", lambda pid: "")

  def refused(*_):
    raise PermissionError

  for kill in (os.kill, refused):
    monkeypatch.setattr(ownership.os, "kill", kill)
    with pytest.raises(ownership.Owned):
      ownership.Claim(tmp_path)


def test_the_tenth_owner_follows_the_ninth(tmp_path):
  own(tmp_path, 9, pid=dead())
  own(tmp_path, 10)
  with pytest.raises(ownership.Owned):
    ownership.Claim(tmp_path)


def test_of_several_processes_the_first_owns_it(tmp_path, monkeypatch):
  met = []
  monkeypatch.setattr(ownership.processes, "meet", met.append)
  monkeypatch.setattr(ownership.processes, "is_first", lambda: False)
  claim = ownership.Claim(tmp_path)
  assert met == ["owned"] and not any(tmp_path.iterdir())
  claim.confirm()
  claim.close()
  monkeypatch.setattr(ownership.processes, "all_agree", lambda here: False)
  with pytest.raises(ownership.Owned, match="first process does not own"):
    ownership.Claim(tmp_path)


def test_a_zombie_owns_nothing(tmp_path):
  with subprocess.Popen([sys.executable, "-c", ""]) as process:
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    own(tmp_path, pid=process.pid, born="7")
    file = tmp_path / "owners" / "4.json"
    born = ownership._born(process.pid)
    file.write_text(
      json.dumps(json.loads(file.read_text()) | {"born": born or "7"})
    )
    assert born == "dead"
  ownership.Claim(tmp_path).close()


ELSEWHERE = {"place": "another machine", "host": "far"}


def test_an_owner_elsewhere_is_followed_once_it_is_silent(tmp_path, clock):
  now, happens = clock
  own(tmp_path, **ELSEWHERE)
  ownership.Claim(tmp_path).close()
  assert 90 <= now[0] < 100


@pytest.mark.parametrize(
  "content", [b"", b"{", b"[1]", b'{"host": 1}', b"[" * 10**5]
)
def test_who_cannot_be_read_is_waited_for_too(tmp_path, clock, content):
  own(tmp_path).write_bytes(content)
  ownership.Claim(tmp_path).close()
  assert clock[0][0] >= 90


@pytest.mark.parametrize("pid", [0, -1, 2**80, "1", None, 1.5, True])
def test_no_process_is_asked_by_a_number_that_is_none(tmp_path, clock, pid):
  """To signal 0, or -1, is to signal many."""
  own(tmp_path, pid=pid)
  assert ownership.find(tmp_path) is None
  ownership.Claim(tmp_path).close()
  assert clock[0][0] >= 90


def test_an_owner_elsewhere_that_lives_is_told_of(tmp_path, clock):
  now, happens = clock
  file = own(tmp_path, **ELSEWHERE)
  happens += [lambda: None, lambda: None, lambda: os.utime(file)]
  with pytest.raises(ownership.Owned, match="on far, since"):
    ownership.Claim(tmp_path)
  assert now[0] < 10
  assert file.exists()


def test_an_owner_elsewhere_may_free_it_meanwhile(tmp_path, clock):
  file = own(tmp_path, **ELSEWHERE)
  clock[1].append(lambda: file.rename(file.with_suffix(".free")))
  ownership.Claim(tmp_path).close()
  assert clock[0][0] < 10


def test_one_of_two_that_come_at_once_owns_it(tmp_path, monkeypatch):
  """Both have seen that the one before is gone."""
  own(tmp_path, pid=dead())
  write = ownership._write

  def late(file):
    monkeypatch.setattr(ownership, "_write", write)
    own(tmp_path, 5)  # the other was faster
    write(file)

  monkeypatch.setattr(ownership, "_write", late)
  with pytest.raises(ownership.Owned):
    ownership.Claim(tmp_path)


def test_a_number_whose_time_is_over_owns_nothing(tmp_path, monkeypatch):
  own(tmp_path, pid=dead())
  write = ownership._write

  def later(file):
    monkeypatch.setattr(ownership, "_write", write)
    # Others came and went, and one is there now.
    own(tmp_path, 9)
    write(file)

  monkeypatch.setattr(ownership, "_write", later)
  with pytest.raises(ownership.Owned):
    ownership.Claim(tmp_path)


def test_a_number_that_was_set_free_is_not_made_again(tmp_path, monkeypatch):
  """Another came and went while this one was about to make its file."""
  own(tmp_path, pid=dead())
  write = ownership._write

  def later(file):
    monkeypatch.setattr(ownership, "_write", write)
    own(tmp_path, 5).rename(file.with_suffix(".free"))
    write(file)

  monkeypatch.setattr(ownership, "_write", later)
  claim = ownership.Claim(tmp_path)
  assert [x.name for x in (tmp_path / "owners").iterdir()] == ["6.json"]
  claim.close()


@pytest.mark.parametrize("order", [("5.free", "5.json"), ("5.json", "5.free")])
def test_of_two_files_of_a_number_the_free_one_counts(
  tmp_path, monkeypatch, order
):
  paths = [tmp_path / name for name in order]
  monkeypatch.setattr(ownership.pathlib.Path, "iterdir", lambda _: iter(paths))
  assert ownership._newest(tmp_path) == (5, tmp_path / "5.free")


def test_who_was_taken_for_dead_ends(tmp_path, clock, ended, capfd):
  claim = ownership.Claim(tmp_path)
  claim.confirm()
  own(tmp_path, 2, host="far")
  claim.confirm()  # a moment later: nobody could have taken it for dead yet
  assert ended == []
  clock[0][0] += 60
  claim.confirm()
  claim.close()
  assert ended == [1]
  assert "on far, since" in capfd.readouterr().err


def test_the_owner_shows_that_it_lives(tmp_path, clock, ended):
  claim = ownership.Claim(tmp_path)
  file = tmp_path / "owners" / "1.json"
  os.utime(file, (1, 1))
  clock[0][0] += 60
  claim.confirm()
  assert file.stat().st_mtime > 1 and ended == []
  claim.close()
  clock[0][0] += 60
  claim.confirm()  # it is nobody's now, as it should be
  assert ended == []


def test_it_is_shown_without_being_asked_for(tmp_path, monkeypatch):
  monkeypatch.setattr(ownership, "_BEAT_SECONDS", 0.01)
  claim = ownership.Claim(tmp_path)
  file, until = tmp_path / "owners" / "1.json", time.monotonic() + 60
  os.utime(file, (1, 1))
  while file.stat().st_mtime == 1 and time.monotonic() < until:
    time.sleep(0.01)
  claim.close()
  assert (tmp_path / "owners" / "1.free").stat().st_mtime > 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")
def test_a_place_is_a_boot_and_a_name_space():
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  assert ownership._place() == f"{boot} {os.readlink('/proc/self/ns/pid')}"


def test_who_finds_its_folder_deleted_ends(tmp_path, clock, ended, capfd):
  claim = ownership.Claim(tmp_path)
  shutil.rmtree(tmp_path / "owners")
  clock[0][0] += 60
  claim.confirm()
  claim.close()
  assert ended == [1] and "but nobody's" in capfd.readouterr().err


def test_a_disk_that_cannot_be_read_for_a_while_ends_nothing(
  tmp_path, clock, ended, monkeypatch
):
  claim = ownership.Claim(tmp_path)

  def unread(_):
    raise OSError(5, "Input/output error")

  clock[0][0] += 60
  with monkeypatch.context() as patch:
    patch.setattr(ownership, "_newest", unread)
    claim.confirm()
  claim.confirm()
  claim.close()
  assert ended == []


def test_a_process_may_claim_what_it_owns(tmp_path):
  claim = ownership.Claim(tmp_path)
  ownership.Claim(tmp_path).close()
  assert ownership.find(tmp_path) is not None
  claim.close()
  assert ownership.find(tmp_path) is None
  ownership.Claim(tmp_path).dissolve()
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_moved_is_owned_until_then(tmp_path, clock, ended):
  claim = ownership.Claim(tmp_path / "a")
  (tmp_path / "a" / "file").write_text("x")
  claim.move(tmp_path / "b")
  clock[0][0] += 60
  claim.close()
  assert [x.name for x in tmp_path.rglob("*")] == ["b", "file"]
  assert ended == []


def test_a_full_disk_leaves_no_half_claim(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(ownership.json, "dumps", full)
    with pytest.raises(OSError, match="No space"):
      ownership.Claim(tmp_path)
  assert not any((tmp_path / "owners").iterdir())
  ownership.Claim(tmp_path).close()
