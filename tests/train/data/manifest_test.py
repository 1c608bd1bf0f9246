"""Data that changed under a saved place: told by name, refused or allowed."""

import gzip
import json
import os
import pathlib

import chex
import numpy as np
import pytest

from tests.chat import tokenizer_test
from tests.train.data import corpora
from train.data import corpus as corpus_lib
from train.data import manifest
from train.learn import batches as batches_lib

TEXTS = corpora.words(60)


@pytest.fixture
def folder(tmp_path):
  """20 books, and 40 lines of JSON in two files; all of one size."""
  for i in range(20):
    corpora.write(tmp_path / f"in/book{i:02d}.txt", f"<{i:02d}>" * 6)
  for name in ("u", "v"):
    texts = [f"{name}{i:02d}-" * 5 for i in range(20)]
    corpora.write_json_lines(tmp_path / f"in/{name}.jsonl", texts)
  corpora.write_parquet(
    tmp_path / "in/w.parquet", {"text": [f"row {i:02d}" * 4 for i in range(20)]}
  )
  return tmp_path / "in"


def open_corpus(folder, **config) -> corpus_lib.Corpus:
  source = corpus_lib.SourceConfig(path=f"{folder}/**/*", name="in")
  return corpus_lib.Corpus(corpus_lib.DataConfig(sources=(source,), **config))


def iterate(corpus, **sizes):
  return corpus.batches(**dict(seq_len=16, batch_size=2, seed=0) | sizes)


def saved_state(folder, steps=3, **config):
  iterator = iterate(open_corpus(folder, **config))
  corpora.take(iterator, steps)
  return json.loads(json.dumps(iterator.get_state()))


def resume(folder, state, **config):
  iterator = iterate(open_corpus(folder, **config))
  iterator.set_state(state)
  return iterator


def replace(file: pathlib.Path, old: str, new: str):
  content = file.read_bytes()
  assert content.count(old.encode()) == 1
  file.write_bytes(content.replace(old.encode(), new.encode()))


def swap(a: pathlib.Path, b: pathlib.Path):
  os.rename(a, a.with_name("aside"))
  os.rename(b, a)
  os.rename(a.with_name("aside"), b)


def other_rows(folder):
  rows = [f"row {i:02d}" * 4 for i in range(20)]
  rows[7], rows[8] = rows[8], rows[7]
  corpora.write_parquet(folder / "w.parquet", {"text": rows})


def in_another_order(folder):
  lines = (folder / "u.jsonl").read_text().split("\n")
  (folder / "u.jsonl").write_text("\n".join(lines[::-1]))


CHANGES = {
  "a text of the same size": (
    lambda at: (at / "book07.txt").write_text("<xx>" * 6),
    "book07.txt holds other text",
  ),
  "a line of the same size": (
    lambda at: replace(at / "u.jsonl", "u11-" * 5, "x" * 20),
    "u.jsonl holds other text",
  ),
  "one letter of a line": (
    lambda at: replace(at / "v.jsonl", "v19-" * 5, "v19-" * 4 + "v19_"),
    "v.jsonl holds other text",
  ),
  "two rows exchanged": (other_rows, "w.parquet holds other text"),
  "lines in another order": (in_another_order, "u.jsonl holds other text"),
  "two files exchanged": (
    lambda at: swap(at / "u.jsonl", at / "v.jsonl"),
    "u.jsonl holds other text, v.jsonl holds other text",
  ),
  "a file of another name": (
    lambda at: os.rename(at / "book03.txt", at / "z.txt"),
    "book03.txt is called z.txt now",
  ),
  "the same order, another name": (
    lambda at: os.rename(at / "book03.txt", at / "book03a.txt"),
    "book03.txt is called book03a.txt now",
  ),
  "into a folder": (
    lambda at: os.renames(at / "u.jsonl", at / "a/u.jsonl"),
    "u.jsonl is called a/u.jsonl now",
  ),
  "one more": (
    lambda at: (at / "book20.txt").write_text("<20>" * 6),
    "book20.txt is new",
  ),
  "one in the middle": (
    lambda at: (at / "book10a.txt").write_text("<20>" * 6),
    "book10a.txt is new",
  ),
  "one less": (lambda at: os.remove(at / "book10.txt"), "book10.txt is gone"),
  "one for another": (
    lambda at: (
      os.remove(at / "book10.txt"),
      (at / "book99.txt").write_text("<99>" * 6),
    ),
    "book10.txt is gone, book99.txt is new",
  ),
  "one more line": (
    lambda at: replace(at / "u.jsonl", "u19-" * 5, 'u"}\n{"text": "more'),
    "u.jsonl has 21 documents, had 20",
  ),
  "one less line": (
    lambda at: replace(at / "u.jsonl", json.dumps({"text": "u19-" * 5}), ""),
    "u.jsonl has 19 documents, had 20",
  ),
  "many": (
    lambda at: [
      (at / f"book{i:02d}.txt").write_text("<xx>" * 6) for i in range(20)
    ],
    ", ".join(f"book{i:02d}.txt holds other text" for i in range(5))
    + ", 15 more",
  ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_told_and_refused(folder, capsys, change):
  state = saved_state(folder)
  make, told = CHANGES[change]
  make(folder)
  with pytest.raises(corpus_lib.DataError) as e:
    resume(folder, state)
  assert f"source 'in': {told}" in str(e.value)
  assert "--data.allow-changed" in str(e.value)
  assert len(str(e.value).splitlines()) == 1
  # Unless it is allowed: then it is said, and the data go on.
  iterator = resume(folder, state, allow_changed=True)
  said = capsys.readouterr().out
  assert said.startswith("CHANGED ") and told in said
  corpora.take(iterator, 5)
  # And what is saved next is of the data as they are now.
  again = json.loads(json.dumps(iterator.get_state()))
  expected = corpora.take(iterator, 5)
  chex.assert_trees_all_equal(corpora.take(resume(folder, again), 5), expected)


@pytest.mark.parametrize(
  "what",
  [
    *("nothing", "another folder", "copied", "times", "links"),
    *("what is empty", "an empty file", "no empty file", "another spelling"),
  ],
)
def test_what_makes_no_difference(folder, capsys, set_block_tokens, what):
  set_block_tokens(10_000)  # more than there are: their size sets a block's
  corpora.write(folder / "empty.txt", "")
  state = saved_state(folder)
  expected = corpora.take(resume(folder, state), 9)
  if what == "another folder":
    folder = folder.rename(folder.with_name("elsewhere"))
  if what == "copied":
    for file in folder.iterdir():
      content = file.read_bytes()
      file.unlink()
      file.write_bytes(content)
  if what == "times":
    for file in folder.iterdir():
      os.utime(file, (1, 1))
  if what == "links":
    aside = folder.rename(folder.with_name("aside"))
    folder.mkdir()
    for file in aside.iterdir():
      os.symlink(file, folder / file.name)
  if what == "what is empty":
    replace(folder / "u.jsonl", "\n" + json.dumps({"text": "u19-" * 5}), "")
    with (folder / "u.jsonl").open("a") as out:
      out.write('\n{"text": "' + "u19-" * 5 + '"}')
  if what == "an empty file":
    (folder / "_SUCCESS").touch()
    corpora.write(folder / "t.jsonl", '\n{"text": ""}\n')
  if what == "no empty file":
    (folder / "empty.txt").unlink()
  if what == "another spelling":
    lines = (folder / "u.jsonl").read_bytes()
    (folder / "u.jsonl").write_bytes(lines.replace(b": ", b" :  "))
  resumed = resume(folder, state)
  chex.assert_trees_all_equal(corpora.take(resumed, 9), expected)
  assert capsys.readouterr().out == ""


def bad_line(folder):
  replace(folder / "u.jsonl", '"' + "u11-" * 5 + '"', "u11-" * 5)


def bad_book(folder):
  (folder / "book07.txt").write_bytes(b"\xff\xff")


def unreadable_book(folder):
  os.remove(folder / "book07.txt")
  os.symlink("nowhere", folder / "book07.txt")


@pytest.mark.parametrize("spoil", [bad_line, bad_book, unreadable_book])
@pytest.mark.parametrize("first", ["good", "bad"])
def test_a_record_that_turns_bad_is_no_change(
  folder, capsys, set_block_tokens, spoil, first
):
  """Nor is one that is mended, or that was and stays bad."""
  set_block_tokens(10_000)
  kept = {file: file.read_bytes() for file in folder.iterdir()}
  if first == "bad":
    spoil(folder)
  state = saved_state(folder, max_bad_share=0.1)
  if first == "good":
    spoil(folder)
  else:
    spoiled = resume(folder, state, max_bad_share=0.1)
    corpora.take(spoiled, 5)
    for file, content in kept.items():
      file.unlink(missing_ok=True)
      file.write_bytes(content)
  resumed = resume(folder, state, max_bad_share=0.1)
  corpora.take(resumed, 5)
  assert capsys.readouterr().out == ""
  # But other text beside it is one.
  other = '{"text": "v%02d-v%02d-v%02d-v%02d-xxx"}'
  (folder / "v.jsonl").write_text(
    "\n".join(other % (i, i, i, i) for i in range(20))
  )
  (folder / "u.jsonl").write_text(
    "\n".join(['{"text": 1}'] + ['{"text": "u"}'] * 19)
  )
  with pytest.raises(corpus_lib.DataError, match="u.jsonl holds other text, v"):
    resume(folder, state, max_bad_share=0.1)


def test_other_text_beside_a_record_that_stays_bad(folder):
  """Wherever it is: it need not be one of the samples."""
  bad_line(folder)
  state = saved_state(folder, max_bad_share=0.1)
  lines = (folder / "u.jsonl").read_text()
  for i in [*range(11), *range(12, 20)]:
    (folder / "u.jsonl").write_text(lines.replace(f"u{i:02d}-", "x" * 4, 1))
    with pytest.raises(corpus_lib.DataError, match="u.jsonl holds other text"):
      resume(folder, state, max_bad_share=0.1)
  (folder / "u.jsonl").write_text(lines)
  resume(folder, state, max_bad_share=0.1)


def test_the_tokenizer_is_one_of_them(folder, tmp_path, capsys):
  path = pathlib.Path(tokenizer_test.write_hf(tmp_path))
  state = saved_state(folder, tokenizer=str(path))
  content = json.loads(path.read_text())
  path.write_text(json.dumps(content, indent=8))
  resume(folder, state, tokenizer=str(path))
  content["pre_tokenizer"]["add_prefix_space"] = True
  path.write_text(json.dumps(content))
  with pytest.raises(
    corpus_lib.DataError, match="checkpoint: tokenizer .* is not as it was"
  ):
    resume(folder, state, tokenizer=str(path))
  with pytest.raises(corpus_lib.DataError, match="tokenizer bytes is not as"):
    resume(folder, state)
  assert capsys.readouterr().out == ""
  resume(folder, state, tokenizer=str(path), allow_changed=True)
  assert "CHANGED" in capsys.readouterr().out


def test_sources_in_another_order(folder):
  sources = [
    corpus_lib.SourceConfig(path=f"{folder}/{name}.jsonl") for name in "uv"
  ]
  first, other = (
    corpus_lib.Corpus(corpus_lib.DataConfig(sources=tuple(each)))
    for each in (sources, sources[::-1])
  )
  state = json.loads(json.dumps(iterate(first).get_state()))
  iterate(first).set_state(state)
  with pytest.raises(
    corpus_lib.DataError,
    match=r"the sources are \['v', 'u'\], were \['u', 'v'\]",
  ):
    iterate(other).set_state(state)


def test_compressed_files_are_known_by_their_text(folder, set_block_tokens):
  set_block_tokens(10_000)
  file = folder / "u.jsonl.gz"
  lines = (folder / "u.jsonl").read_bytes()
  (folder / "u.jsonl").unlink()
  file.write_bytes(gzip.compress(lines, mtime=1))
  state = saved_state(folder)
  for level in (0, 9):
    file.write_bytes(gzip.compress(lines, level, mtime=2))
    resume(folder, state)
  file.write_bytes(gzip.compress(lines[:99]) + gzip.compress(lines[99:]))
  resume(folder, state)
  file.write_bytes(gzip.compress(lines.replace(b"u07-", b"u70-"), mtime=1))
  with pytest.raises(corpus_lib.DataError, match="u.jsonl.gz holds other text"):
    resume(folder, state)


def test_large_tables_are_known_by_samples(tmp_path):
  """Every row group's metadata, and some blocks of the file."""
  rng = np.random.default_rng(0)
  texts = [rng.bytes(500).hex() for _ in range(2000)]
  path = tmp_path / "in/x.parquet"
  path.parent.mkdir()
  options = dict(row_group_size=100, compression="none", use_dictionary=False)
  corpora.write_parquet(path, {"text": texts}, **options)
  assert path.stat().st_size > 20 * manifest._BLOCK
  state = saved_state(tmp_path / "in")
  for at in (0, 1000, 1999):
    changed = list(texts)
    changed[at] = changed[at][:-1] + "x"
    corpora.write_parquet(path, {"text": changed}, **options)
    with pytest.raises(corpus_lib.DataError, match="x.parquet holds other"):
      resume(tmp_path / "in", state)
  rng.shuffle(texts)
  corpora.write_parquet(path, {"text": texts}, **options)
  with pytest.raises(corpus_lib.DataError, match="x.parquet holds other"):
    resume(tmp_path / "in", state)


def test_many_files_take_little_room(tmp_path, monkeypatch):
  monkeypatch.setattr(manifest, "_MARKS", 32)
  for i in range(120):
    corpora.write(tmp_path / f"in/{i:03d}.txt", f"text {i:03d}")
  folder = tmp_path / "in"
  state = saved_state(folder)
  assert len(json.dumps(state)) < 5000
  resume(folder, state)
  (folder / "050.txt").write_text("text ABC")
  with pytest.raises(
    corpus_lib.DataError,
    match="'in': 048.txt, or one of the 3 after it, holds other text",
  ):
    resume(folder, state)
  (folder / "050.txt").write_text("text 050")
  swap(folder / "010.txt", folder / "011.txt")
  with pytest.raises(corpus_lib.DataError, match="'in': 008.txt, or one of"):
    resume(folder, state)
  swap(folder / "010.txt", folder / "011.txt")
  os.remove(folder / "119.txt")
  with pytest.raises(
    corpus_lib.DataError, match="116.txt.* is one of 3 files, was one of 4"
  ):
    resume(folder, state)


def test_the_state_of_very_many_files_stays_small():
  marks = [
    manifest.Mark(name=f"{i}.jsonl", documents=3, digest=i, samples=(i,) * 3)
    for i in range(10_000)
  ]
  found = manifest.condense(marks)
  assert 100 < len(found) <= 256
  assert sum(mark.documents for mark in found) == 30_000
  assert manifest.from_json(
    json.loads(json.dumps(manifest.to_json(found)))
  ) == (found)
  changed = [*marks]
  changed[777] = manifest.Mark(name="777.jsonl", documents=3, digest=0)
  assert len(manifest.differences(found, manifest.condense(changed))) == 1


def test_every_source_is_compared(tmp_path):
  sources = []
  for name in ("a", "b"):
    texts = [f"{name} {i:02d}" for i in range(30)]
    path = corpora.write_json_lines(tmp_path / f"{name}.jsonl", texts)
    sources.append(corpus_lib.SourceConfig(path=path))
  config = corpus_lib.DataConfig(sources=tuple(sources))
  state = iterate(corpus_lib.Corpus(config)).get_state()
  iterate(corpus_lib.Corpus(config)).set_state(state)
  swap(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
  with pytest.raises(
    corpus_lib.DataError,
    match="source 'a': a.jsonl holds other.*; source 'b': b.jsonl holds other",
  ):
    iterate(corpus_lib.Corpus(config)).set_state(state)


def test_the_first_shard_holds_the_manifest(folder):
  corpus = open_corpus(folder, shards=2)
  states = {str(i): iterate(corpus, shard=i).get_state() for i in range(2)}
  assert "manifest" in states["0"] and "manifest" not in states["1"]
  states = json.loads(json.dumps(states))
  batches_lib.compare(corpus, states)
  batches_lib.compare(corpus, {})  # nothing is saved yet
  (folder / "book07.txt").write_text("<xx>" * 6)
  changed = open_corpus(folder, shards=2)
  with pytest.raises(corpus_lib.DataError, match="book07.txt holds other"):
    batches_lib.compare(changed, states)
  # Whatever the stage: it is not asked for.
  iterate(changed, shard=1).set_state(states["1"])


def test_a_state_without_a_manifest(folder):
  state = saved_state(folder)
  del state["manifest"]
  with pytest.raises(corpus_lib.DataError, match="does not say which data"):
    resume(folder, state)
  corpora.take(resume(folder, state, allow_changed=True), 3)
