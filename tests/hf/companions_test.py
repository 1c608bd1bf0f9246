"""What lies beside the weights is copied; what lies elsewhere is not."""

import os

import pytest

from dsa_jax.hf import companions
from tests import damage


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "in"
  (folder / "encoding").mkdir(parents=True)
  (folder / "LICENSE").write_text("mine")
  (folder / "encoding" / "chat.py").write_text("chat")
  return folder


def test_files_and_links_within_the_folder(folder, tmp_path):
  (folder / "tokenizer.json").symlink_to("encoding/chat.py")
  (folder / "notes.txt").write_text("not named")
  (folder / "chat_template.jinja").touch()  # an empty one is a file, too
  linked = tmp_path / "linked"
  linked.symlink_to(folder)
  companions.copy(companions.find(linked), tmp_path / "out")
  out = tmp_path / "out"
  there = {str(x.relative_to(out)) for x in out.rglob("*") if x.is_file()}
  assert there == {
    *("LICENSE", "tokenizer.json", "encoding/chat.py", "chat_template.jinja")
  }
  assert (out / "tokenizer.json").read_text() == "chat"
  assert not (out / "tokenizer.json").is_symlink()


@pytest.mark.parametrize(
  "target", ["/etc/passwd", "../secret", "link", "encoding/../../secret"]
)
def test_a_link_that_leads_out(folder, tmp_path, target):
  (tmp_path / "secret").write_text("secret")
  (folder / "link").symlink_to("../secret")
  (folder / "LICENSE").unlink()
  (folder / "LICENSE").symlink_to(target)
  got = damage.read(lambda: companions.find(folder))
  assert got.refused and "LICENSE is a link to /" in got.said


def test_a_folder_that_leads_out(folder, tmp_path):
  (tmp_path / "encoding").mkdir()
  (tmp_path / "encoding" / "secret.py").write_text("secret")
  os.rename(folder / "encoding", folder / "kept")
  (folder / "encoding").symlink_to("../encoding")
  got = damage.read(lambda: companions.find(folder))
  assert got.refused and "secret.py is a link to" in got.said


def test_blobs_that_are_not_beside_a_snapshot(folder, tmp_path):
  (tmp_path / "blobs").mkdir()
  (tmp_path / "blobs" / "0f").write_text("of another model")
  (folder / "tokenizer.json").symlink_to("../blobs/0f")
  assert damage.read(lambda: companions.find(folder)).refused


def test_a_file_that_is_far_too_large(folder):
  with open(folder / "LICENSE", "wb") as file:
    file.truncate(2**40)  # a hole
  got = damage.read(lambda: companions.find(folder))
  assert got.refused and "LICENSE has 1,099,511,627,776 bytes" in got.said


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read(folder):
  (folder / "LICENSE").chmod(0)
  assert "LICENSE" in damage.read(lambda: companions.find(folder)).said
