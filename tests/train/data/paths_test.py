"""Which files a source's patterns stand for, whatever their names."""

import os
import pathlib

import pytest

from tests.train.data import corpora
from train.data import corpus as corpus_lib
from train.data import paths


def write(folder: pathlib.Path, *names: str) -> None:
  for name in names:
    corpora.write(folder / name, f"text of {name}")


def find(source: str) -> tuple[list[str], str]:
  return paths.find(source, "--data.sources.0.path")


def names(folder: pathlib.Path, *patterns: str) -> list[str]:
  found, root = find(",".join(f"{folder}/{each}" for each in patterns))
  assert all(path.startswith(f"{root}/") for path in found)
  return [os.path.relpath(path, folder) for path in found]


@pytest.mark.parametrize(
  "patterns, expected",
  [
    (["run[1].txt"], ["run[1].txt"]),
    (["[a]/*.txt"], ["[a]/b.txt"]),
    (["[a]/**/*.txt"], ["[a]/b.txt", "[a]/c/[d].txt"]),
    (["**/[d].txt"], ["[a]/c/[d].txt"]),
    (["*/c/[d].txt"], ["[a]/c/[d].txt"]),
    (["run[0-2].txt"], ["run1.txt"]),
    (["[r]un?.txt"], ["run1.txt"]),
    (["x,y.txt"], ["x,y.txt"]),
    (["x,y.txt", "run1.txt"], ["run1.txt", "x,y.txt"]),
    (["run1.txt", "x,y.txt"], ["run1.txt", "x,y.txt"]),
    (["p, q/*.txt", "run1.txt"], ["p, q/1.txt", "run1.txt"]),
    (["p, q/**"], ["p, q/1.txt"]),
    (["*[[]*.txt"], ["run[1].txt"]),
    (["?,?.txt"], ["x,y.txt"]),
    (["**/1.txt", "*/1.txt", "p, q/1.txt"], ["p, q/1.txt"]),
  ],
)
def test_what_exists_is_no_pattern(tmp_path, patterns, expected):
  write(tmp_path, "run1.txt", "run[1].txt", "x,y.txt", "p, q/1.txt")
  write(tmp_path, "[a]/b.txt", "[a]/c/[d].txt")
  assert names(tmp_path, *patterns) == expected


@pytest.mark.parametrize("pattern", ["**/*.txt", "**", "*/**/*.txt", "*.txt"])
@pytest.mark.parametrize(
  "links",
  [
    {"loop": "."},
    {"a/loop": ".."},
    {"one": ".", "a/two": "..", "a/b/three": "../.."},  # 3^40 paths
    {"z.txt": "a/1.txt", "y": "a"},
    {"self": "self", "a/gone": "nowhere/at/all"},
  ],
)
def test_each_file_comes_once(tmp_path, pattern, links):
  write(tmp_path, "0.txt", "a/1.txt", "a/b/2.txt")
  before = set(names(tmp_path, pattern))
  for name, target in links.items():
    os.symlink(target, tmp_path / name)
  after = [x for x in names(tmp_path, pattern) if os.path.isfile(tmp_path / x)]
  files = [os.path.realpath(tmp_path / name) for name in after]
  assert len(set(files)) == len(files)
  assert {os.path.realpath(tmp_path / name) for name in before} <= set(files)
  # A name without a link in it stays, if there is one.
  assert before - set(after) == set()


def test_hard_links_are_one_file(tmp_path):
  write(tmp_path, "a.txt", "b.txt")
  os.link(tmp_path / "a.txt", tmp_path / "c.txt")
  assert names(tmp_path, "*") == ["a.txt", "b.txt"]


def test_folders_behind_links_are_entered(tmp_path):
  write(tmp_path, "elsewhere/deep/1.txt", "in/2.txt")
  os.symlink("../elsewhere", tmp_path / "in/link")
  assert names(tmp_path, "in/**/*.txt") == ["in/2.txt", "in/link/deep/1.txt"]
  # But no hidden ones, as in a shell.
  write(tmp_path, "in/.hidden/3.txt")
  assert len(names(tmp_path, "in/**/*.txt")) == 2


def test_paths_from_here(tmp_path, monkeypatch):
  write(tmp_path, "a/1.txt", "2.txt")
  monkeypatch.chdir(tmp_path)
  assert find("**/*.txt") == (["2.txt", "a/1.txt"], str(tmp_path))
  assert find("a/*") == (["a/1.txt"], str(tmp_path / "a"))
  assert find("2.txt,a/*.txt")[1] == str(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert find("~/a/*.txt") == (
    [f"{tmp_path}/a/1.txt"],
    str(tmp_path / "a"),
  )


def test_what_is_no_file_is_told(tmp_path):
  write(tmp_path, "a.txt", "folder/b.txt")
  os.mkfifo(tmp_path / "pipe.txt")
  os.mkfifo(tmp_path / "pipe.parquet")
  os.symlink("nowhere", tmp_path / "gone.jsonl")
  for name, message in (
    ("pipe.txt", "pipe.txt is no regular file"),
    ("pipe.parquet", "pipe.parquet is no regular file"),
    ("*.txt", "pipe.txt is no regular file"),
    ("gone.jsonl", "gone.jsonl cannot be read .*No such file"),
    ("folder", r"0.path='.*' is a folder; give '.*/folder/\*\*/\*'"),
    ("nothing", "of --data.sources.0.path='.*/nothing' matches no"),
    ("a.txt,nothing,b", "'nothing' of .* matches no file"),
  ):
    with pytest.raises(corpus_lib.DataError, match=message):
      corpora.open_in(tmp_path, name)
  with pytest.raises(corpus_lib.DataError, match="/dev/zero is no regular"):
    corpora.open_documents("/dev/zero")
