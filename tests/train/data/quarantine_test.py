"""Bad records, when a source is opened and while it is trained on."""

import json
import os
import pathlib
import shutil
import threading

import chex
import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from tests.train.data import corpora
from train.data import corpus as corpus_lib
from train.data import sources as sources_lib

BROKEN = (b'{"text": "cut', b'{"body": "no text"}', b'{"text": "\xff"}')


@pytest.fixture(autouse=True)
def one_row_a_block(set_block_tokens):
  """Nothing is read far ahead."""
  set_block_tokens(1)


@pytest.fixture(autouse=True)
def slept(monkeypatch) -> list[float]:
  """Seconds that would have been slept."""
  slept = []
  monkeypatch.setattr(sources_lib.time, "sleep", slept.append)
  return slept


@pytest.fixture
def quarantine(tmp_path) -> pathlib.Path:
  return tmp_path / "run" / "quarantine"


def write_lines(folder, bad=BROKEN) -> tuple[str, list[str]]:
  """300 lines; the good ones' texts."""
  texts = corpora.words(300)
  lines = [json.dumps({"text": text}).encode() for text in texts]
  for i, line in enumerate(bad):
    lines[50 * i + 7] = line
    texts[50 * i + 7] = ""
  path = corpora.write(folder / "web.jsonl", b"\n".join(lines))
  return path, [text for text in texts if text]


def write_books(folder) -> str:
  for i in range(100):
    corpora.write(folder / f"books/{i:02d}.txt", f"<{i:02d}>" * 6)
  return f"{folder}/books/*.txt"


def open_corpus(path, quarantine, max_bad_share=0.0) -> corpus_lib.Corpus:
  config = corpus_lib.DataConfig(
    sources=corpora.sources(path), max_bad_share=max_bad_share
  )
  return corpus_lib.Corpus(config, quarantine)


def iterate(corpus):
  return corpus.batches(seq_len=16, batch_size=1, seed=0)


def kept_texts(subset) -> list[str]:
  return [text for text in corpora.side(subset) if text]


def written(quarantine, process=0) -> list[dict]:
  text = (quarantine / f"{process}.jsonl").read_text()
  return [json.loads(line) for line in text.split("\n") if line]


def test_one_percent_of_broken_lines_is_left_out(tmp_path, quarantine):
  path, texts = write_lines(tmp_path)
  corpus = open_corpus(path, quarantine, max_bad_share=0.01)
  assert corpus.bad_records == {"web": 3}
  assert "3 bad records" in str(corpus)
  assert not quarantine.exists()  # training has not begun
  iterator = iterate(corpus)
  stream = corpora.served(corpora.take_rows(iterator, 420))
  (source,) = corpus.sources
  kept, held = kept_texts(source.train), kept_texts(source.heldout)
  assert sorted(stream[: len(kept)]) == sorted(kept)
  assert sorted(kept + held) == sorted(texts)
  lines = written(quarantine)
  assert len(lines) == 3
  content = pathlib.Path(path).read_bytes()
  for line, broken, number, why in zip(
    lines, BROKEN, (8, 58, 108), ("not JSON", "no field", "not UTF-8")
  ):
    assert (line["source"], line["file"]) == ("web", path)
    assert content[line["at"] :][: len(broken)] == broken
    assert why in line["why"]
    if why != "not UTF-8":
      assert f"web.jsonl:{number}" in line["why"]
    assert line["head"].rstrip("\n") == broken.decode(errors="backslashreplace")
  # Going on writes nothing again, and reads the same.
  again = open_corpus(path, quarantine, max_bad_share=0.01)
  chex.assert_trees_all_equal(next(iterate(again)), next(iterate(corpus)))
  assert written(quarantine) == lines


def test_only_the_first_process_writes_what_all_find(
  tmp_path, monkeypatch, quarantine
):
  path, _ = write_lines(tmp_path)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  corpus = open_corpus(path, quarantine, max_bad_share=0.01)
  iterate(corpus)
  assert corpus.bad_records == {"web": 3}
  assert not quarantine.exists()


def test_a_torn_line_is_no_obstacle(tmp_path, quarantine):
  path, _ = write_lines(tmp_path)
  iterate(open_corpus(path, quarantine, max_bad_share=0.01))
  file = quarantine / "0.jsonl"
  whole = written(quarantine)
  file.write_text(file.read_text()[:-20])  # the third is torn
  iterate(open_corpus(path, quarantine, max_bad_share=0.01))
  last = file.read_text().split("\n")[-1]
  assert json.loads(last) == whole[-1]


def test_a_mended_line_moves_no_other(tmp_path, quarantine):
  path, _ = write_lines(tmp_path)
  bad = open_corpus(path, quarantine, max_bad_share=0.01).sources[0]
  bad_sides = [corpora.side(bad.train), corpora.side(bad.heldout)]
  path, _ = write_lines(tmp_path, bad=())
  good = open_corpus(path, quarantine).sources[0]
  for of_bad, of_good in zip(bad_sides, [good.train, good.heldout]):
    pairs = zip(of_bad, corpora.side(of_good), strict=True)
    assert all(a in ("", b) for a, b in pairs)


def test_too_many(tmp_path, quarantine):
  path, _ = write_lines(tmp_path, bad=[*BROKEN, b"[1]"])
  with pytest.raises(
    corpus_lib.DataError,
    match=r"'web': 4 of 300 records are bad, more than data.max_bad_share=0.01"
    r".*web.jsonl:8 is not JSON.*raise data.max_bad_share",
  ):
    open_corpus(path, quarantine, max_bad_share=0.01)
  with pytest.raises(corpus_lib.DataError, match="^.*web.jsonl:8 is not JSON"):
    open_corpus(path, quarantine)
  assert not quarantine.exists()


def test_files_that_are_not_what_they_say(tmp_path, quarantine):
  for i in range(6):
    corpora.write(tmp_path / f"in/{i}.txt", f"text {i}")
  corpora.write(tmp_path / "in/latin.txt", b"caf\xe9")
  corpora.write(tmp_path / "in/x.parquet", b"PAR")
  corpora.write(tmp_path / "in/y.array_record", b"no records")
  columns = {"body": ["a", "b", "c"]}
  parquet.write_table(pa.table(columns), tmp_path / "in/z.parquet")
  corpus = open_corpus(f"{tmp_path}/in/*", quarantine, max_bad_share=0.6)
  # Three files, and three rows without the column.
  assert corpus.bad_records == {"in": 6}
  iterate(corpus)
  files = [os.path.basename(line["file"]) for line in written(quarantine)]
  assert files == ["latin.txt", "x.parquet", "y.array_record", "z.parquet"]
  with pytest.raises(corpus_lib.DataError, match="in': 6 of 12 records"):
    open_corpus(f"{tmp_path}/in/*", quarantine, max_bad_share=0.49)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_are_checked(share):
  with pytest.raises(corpus_lib.DataError, match="max_bad_share"):
    corpus_lib.DataConfig(max_bad_share=share)


def test_a_file_that_vanishes_is_left_out(tmp_path, quarantine, slept):
  path = write_books(tmp_path)
  corpus = open_corpus(path, quarantine, max_bad_share=0.02)
  lost = corpora.side(corpus.sources[0].train)[5]
  os.remove(tmp_path / f"books/{lost[1:3]}.txt")
  iterator = iterate(corpus)
  # More than two epochs.
  texts = corpora.served(corpora.take_rows(iterator, 400))
  kept = kept_texts(corpus.sources[0].train)
  assert len(kept) == len(corpus.sources[0].train) - 1
  assert sorted(texts[: len(kept)]) == sorted(kept)
  assert lost not in texts
  assert corpus.bad_records == {"books": 1}
  (line,) = written(quarantine)
  assert f"{lost[1:3]}.txt" in line["file"]
  assert "FileNotFoundError" in line["why"]
  assert slept[:3] == [0.1, 0.5, 2.0]


def test_a_file_that_comes_back_is_waited_for(
  tmp_path, monkeypatch, quarantine, slept
):
  path = write_books(tmp_path)
  corpus = open_corpus(path, quarantine)
  expected = corpora.take_rows(iterate(corpus), 150)
  books, away = tmp_path / "books", tmp_path / "away"
  moving = threading.Lock()  # several threads read

  def sleep(seconds):
    with moving:
      if books.exists():
        return
      slept.append(seconds)
      if seconds == 2.0:
        shutil.move(away, books)

  monkeypatch.setattr(sources_lib.time, "sleep", sleep)
  iterator = iterate(corpus)  # which begins to read
  shutil.move(books, away)
  np.testing.assert_array_equal(corpora.take_rows(iterator, 150), expected)
  assert 2.0 in slept
  assert corpus.bad_records == {"books": 0}
  assert not quarantine.exists()


def test_a_source_that_vanishes_stops_training(tmp_path, quarantine, slept):
  path = write_books(tmp_path)
  other = corpora.write(tmp_path / "web.jsonl", '{"text": "web"}\n' * 20)
  config = corpus_lib.DataConfig(
    sources=corpora.sources(path, other), max_bad_share=0.1
  )
  corpus = corpus_lib.Corpus(config, quarantine)
  iterator = iterate(corpus)
  read = corpora.take(iterator, 20)
  shutil.move(tmp_path / "books", tmp_path / "away")
  message = (
    r"'books': 1\d of 100 records are bad.*max_bad_share=0.1 .*books/\d\d.txt"
    rf".*No such file.*listed in {quarantine}"
  )
  with pytest.raises(corpus_lib.DataError, match=message):
    while True:
      state = json.dumps(iterator.get_state())
      read.append(next(iterator))
  # The place is that of the last batch, as often as one asks.
  assert json.dumps(iterator.get_state()) == state
  with pytest.raises(corpus_lib.DataError, match=message):
    next(iterator)
  assert sum(slept) < 20
  assert len(written(quarantine)) >= 11
  # Once the source is back, training goes on from there.
  shutil.move(tmp_path / "away", tmp_path / "books")
  whole = corpus_lib.Corpus(config)
  resumed = iterate(whole)
  resumed.set_state(json.loads(state))
  unbroken = iterate(whole)
  ends = json.loads(state)["block"]  # of one row
  corpora.take(unbroken, ends)
  for _ in range(20):
    chex.assert_trees_all_equal(next(resumed), next(unbroken))


def test_the_first_one_stops_where_none_may_be(tmp_path, quarantine):
  corpus = open_corpus(write_books(tmp_path), quarantine)
  lost = corpora.side(corpus.sources[0].train)[5]
  os.remove(tmp_path / f"books/{lost[1:3]}.txt")
  iterator = iterate(corpus)
  with pytest.raises(corpus_lib.DataError, match=f"1 of 100.*{lost[1:3]}.txt"):
    corpora.take(iterator, 400)


def test_a_source_of_which_nothing_is_left(tmp_path, quarantine):
  corpus = open_corpus(write_books(tmp_path), quarantine, max_bad_share=0.99)
  train = len(corpus.sources[0].train)
  shutil.rmtree(tmp_path / "books")
  with pytest.raises(corpus_lib.DataError, match=f"None of {train} documents"):
    corpora.take(iterate(corpus), 1000)


def test_what_changes_is_bad(tmp_path, quarantine):
  corpora.write(tmp_path / "in/a.txt", "a text")
  corpora.write(tmp_path / "in/b.jsonl", '{"text": "b 1"}\n{"text": "b 2"}\n')
  corpora.write(tmp_path / "in/c.txt", "another")
  corpus = open_corpus(f"{tmp_path}/in/*", quarantine, max_bad_share=0.9)
  source = corpus.sources[0]
  iterate(corpus)
  texts = corpora.side(source.train) + corpora.side(source.heldout)
  assert sorted(texts) == ["a text", "another", "b 1", "b 2"]
  corpora.write(tmp_path / "in/a.txt", "a te")
  corpora.write(tmp_path / "in/b.jsonl", '{"text": "b 1"}\n{"text": "')
  texts = corpora.side(source.train) + corpora.side(source.heldout)
  assert sorted(texts) == ["", "", "another", "b 1"]
  why = {line["why"] for line in written(quarantine)}
  assert len(why) == 2
  assert any("has 4 bytes; it had 6" in text for text in why), why
  assert any("b.jsonl, byte 16, is not JSON" in x for x in why), why


def test_each_process_writes_what_it_finds(tmp_path, monkeypatch, quarantine):
  path = write_books(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(jax, "process_index", lambda: 3)
    corpus = open_corpus(path, quarantine, max_bad_share=0.5)
    iterate(corpus)
    os.remove(tmp_path / "books/07.txt")
    source = corpus.sources[0]
    corpora.side(source.train), corpora.side(source.heldout)
    assert len(written(quarantine, process=3)) == 1
    # Another start of it, or of another process, does not write it again.
  corpus = open_corpus(path, quarantine, max_bad_share=0.5)
  assert not (quarantine / "0.jsonl").exists()


def test_a_full_disk_ends_nothing(tmp_path, monkeypatch, capsys, quarantine):
  """It is told once; what could not be written is, as soon as it can be."""
  path = write_books(tmp_path)
  (tmp_path / "books/07.txt").write_bytes(b"\xff")
  corpus = open_corpus(path, quarantine, max_bad_share=0.5)
  opened, full = pathlib.Path.open, [True]

  def no_room(self, *args, **kwargs):
    if full and self.parent == quarantine and args[:1] == ("a",):
      return opened(pathlib.Path("/dev/full"), *args, **kwargs)
    return opened(self, *args, **kwargs)

  monkeypatch.setattr(pathlib.Path, "open", no_room)
  iterator = iterate(corpus)
  corpora.take(iterator, 5)
  for name in ("11", "12"):
    os.remove(tmp_path / f"books/{name}.txt")
  source = corpus.sources[0]
  corpora.side(source.train), corpora.side(source.heldout)
  assert corpus.bad_records == {"books": 3}
  said = capsys.readouterr().out
  assert said.count("ERROR") == 1 and "No space left on device" in said
  assert f"{quarantine}/0.jsonl" in said
  full.clear()
  os.remove(tmp_path / "books/13.txt")
  corpora.side(source.train), corpora.side(source.heldout)
  names = {os.path.basename(line["file"]) for line in written(quarantine)}
  assert names == {"07.txt", "11.txt", "12.txt", "13.txt"}
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
  "spoil",
  [
    lambda at: at.write_text("a file in its place"),
    lambda at: os.symlink("nowhere/at/all", at),
    lambda at: (at / "0.jsonl").mkdir(parents=True),
  ],
  ids=["file", "link", "folder"],
)
def test_a_folder_that_is_none_ends_nothing(
  tmp_path, capsys, quarantine, spoil
):
  quarantine.parent.mkdir()
  spoil(quarantine)
  path, _ = write_lines(tmp_path)
  corpora.take(iterate(open_corpus(path, quarantine, max_bad_share=0.02)), 30)
  assert capsys.readouterr().out.count("cannot be written") == 1


def test_lines_of_others_are_no_obstacle(tmp_path, quarantine):
  path, _ = write_lines(tmp_path)
  quarantine.mkdir(parents=True)
  odd = (
    '5\n[1]\n{"source": "web"}\nnull\n{"source": "web", "file": [], "at": 1}'
  )
  (quarantine / "0.jsonl").write_bytes(odd.encode() + b"\n\xff\xfe")
  (quarantine / "1.jsonl").write_text("")
  iterate(open_corpus(path, quarantine, max_bad_share=0.01))
  text = (quarantine / "0.jsonl").read_bytes().split(b"\n")
  assert len(text) == 6 + len(BROKEN)


def test_what_is_read_and_bad_is_not_waited_for(tmp_path, quarantine, slept):
  path = write_books(tmp_path)
  corpus = open_corpus(path, quarantine, max_bad_share=0.9)
  for i in range(0, 100, 2):
    (tmp_path / f"books/{i:02d}.txt").write_bytes(b"\xff" * 24)
  source = corpus.sources[0]
  corpora.side(source.train), corpora.side(source.heldout)
  assert corpus.bad_records == {"books": 50}
  assert not slept
