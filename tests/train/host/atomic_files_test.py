"""Files that are whole, on the disk too."""

import errno
import os

import pytest

from train.host import atomic_files


@pytest.fixture
def events(monkeypatch):
  """The names of what is synced and put in its place, in order."""
  seen, fsync, replace = [], os.fsync, os.replace

  def synced(opened):
    seen.append(
      ("sync", os.path.basename(os.readlink(f"/proc/self/fd/{opened}")))
    )
    fsync(opened)

  def replaced(source, target):
    seen.append(("replace", os.path.basename(target)))
    replace(source, target)

  monkeypatch.setattr(os, "fsync", synced)
  monkeypatch.setattr(os, "replace", replaced)
  return seen


def test_content_comes_before_the_name(tmp_path, events):
  file = tmp_path / "config.json"
  atomic_files.write(file, "new")
  assert events == [
    ("sync", "config.json.partial"),
    ("replace", "config.json"),
    ("sync", tmp_path.name),
  ]
  assert file.read_text() == "new"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_what_fails_leaves_the_old_one(tmp_path, monkeypatch, failing):
  file = tmp_path / "config.json"
  atomic_files.write(file, "old")

  def fail(*args):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(os, failing, fail)
  with pytest.raises(OSError, match="Input/output"):
    atomic_files.write(file, "new")
  assert file.read_text() == "old"


def test_a_file_system_may_have_nothing_to_sync_of_a_folder(
  tmp_path, monkeypatch
):
  def refuse(opened):
    raise OSError(errno.EINVAL, "Invalid argument")

  monkeypatch.setattr(os, "fsync", refuse)
  atomic_files.sync(tmp_path)
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="Invalid"):
    atomic_files.sync(tmp_path / "file")


def test_a_tree_is_synced_from_its_files_on(tmp_path, events):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "file").touch()
  (tmp_path / "link").symlink_to("nowhere")
  atomic_files.sync_all(tmp_path)
  assert events[-1] == ("sync", tmp_path.name)
  assert [name for _, name in events[:-1]] == ["file", "b", "a"]
