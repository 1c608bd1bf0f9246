"""Bad records, when a source is opened and while it is trained on."""

import json
import os
import shutil
import unittest.mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from tests.train.data import corpus_test
from train.data import corpus as corpus_lib
from train.data import sources as sources_lib

rows, served = corpus_test.rows, corpus_test.served
side, take = corpus_test.side, corpus_test.take

BROKEN = (b'{"text": "cut', b'{"body": "no text"}', b'{"text": "\xff"}')


class QuarantineTestCase(corpus_test.DataTestCase):
  def setUp(self):
    super().setUp()
    self.quarantine = self.folder / "run" / "quarantine"
    self.slept = []
    self.patch(sources_lib.time, "sleep", self.slept.append)

  def write_lines(self, bad=BROKEN) -> tuple[str, list[str]]:
    """300 lines; the good ones' texts."""
    texts = self.words(300)
    lines = [json.dumps({"text": text}).encode() for text in texts]
    for i, line in enumerate(bad):
      lines[50 * i + 7] = line
      texts[50 * i + 7] = ""
    path = self.write("web.jsonl", b"\n".join(lines))
    return path, [text for text in texts if text]

  def open(self, path, **config) -> corpus_lib.Corpus:
    config = corpus_lib.DataConfig(sources=corpus_test.sources(path), **config)
    return corpus_lib.Corpus(config, self.quarantine)

  def batches(self, corpus):
    self.set_block_tokens(1)  # a row a block: nothing is read far ahead
    return corpus.batches(seq_len=16, batch_size=1, seed=0)

  def lines(self, process=0) -> list[dict]:
    text = (self.quarantine / f"{process}.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]


class OpeningTest(QuarantineTestCase):
  def test_one_percent_of_broken_lines_is_left_out(self):
    path, texts = self.write_lines()
    corpus = self.open(path, max_bad_share=0.01)
    self.assertEqual(corpus.bad_records, {"web": 3})
    self.assertIn("3 bad records", str(corpus))
    self.assertFalse(self.quarantine.exists())  # training has not begun
    iterator = self.batches(corpus)
    stream = served(rows(take(iterator, 420)))
    kept = [text for text in side(corpus.sources[0].train) if text]
    held = [text for text in side(corpus.sources[0].heldout) if text]
    self.assertCountEqual(stream[: len(kept)], kept)
    self.assertCountEqual(kept + held, texts)
    lines = self.lines()
    self.assertLen(lines, 3)
    content = open_bytes(path)
    for line, broken, number, why in zip(
      lines, BROKEN, (8, 58, 108), ("not JSON", "no field", "not UTF-8")
    ):
      self.assertEqual((line["source"], line["file"]), ("web", path))
      self.assertEqual(content[line["at"] :][: len(broken)], broken)
      self.assertIn(why, line["why"])
      if why != "not UTF-8":
        self.assertIn(f"web.jsonl:{number}", line["why"])
      self.assertEqual(
        line["head"].rstrip("\n"), broken.decode(errors="backslashreplace")
      )
    # Going on writes nothing again, and reads the same.
    again = self.open(path, max_bad_share=0.01)
    self.assert_batches_equal(
      next(self.batches(again)), next(self.batches(corpus))
    )
    self.assertEqual(self.lines(), lines)

  def test_only_the_first_process_writes_what_all_find(self):
    path, _ = self.write_lines()
    with unittest.mock.patch.object(jax, "process_index", lambda: 1):
      corpus = self.open(path, max_bad_share=0.01)
      self.batches(corpus)
      self.assertEqual(corpus.bad_records, {"web": 3})
      self.assertFalse(self.quarantine.exists())

  def test_a_torn_line_is_no_obstacle(self):
    path, _ = self.write_lines()
    self.batches(self.open(path, max_bad_share=0.01))
    file = self.quarantine / "0.jsonl"
    whole = self.lines()
    file.write_text(file.read_text()[:-20])  # the third is torn
    self.batches(self.open(path, max_bad_share=0.01))
    last = file.read_text().split("\n")[-1]
    self.assertEqual(json.loads(last), whole[-1])

  def test_a_mended_line_moves_no_other(self):
    path, _ = self.write_lines()
    bad = self.open(path, max_bad_share=0.01).sources[0]
    bad_sides = [side(bad.train), side(bad.heldout)]
    good = self.open(self.write_lines(bad=())[0]).sources[0]
    for of_bad, of_good in zip(bad_sides, [good.train, good.heldout]):
      pairs = zip(of_bad, side(of_good), strict=True)
      self.assertTrue(all(a in ("", b) for a, b in pairs))

  def test_too_many(self):
    path, _ = self.write_lines(bad=[*BROKEN, b"[1]"])
    with self.assertRaisesRegex(
      corpus_lib.DataError,
      r"'web': 4 of 300 records are bad, more than data.max_bad_share=0.01"
      r".*web.jsonl:8 is not JSON.*raise data.max_bad_share",
    ):
      self.open(path, max_bad_share=0.01)
    with self.assertRaisesRegex(
      corpus_lib.DataError, "^.*web.jsonl:8 is not JSON"
    ):
      self.open(path)
    self.assertFalse(self.quarantine.exists())

  def test_files_that_are_not_what_they_say(self):
    for i in range(6):
      self.write(f"in/{i}.txt", f"text {i}")
    self.write("in/latin.txt", b"caf\xe9")
    self.write("in/x.parquet", b"PAR")
    self.write("in/y.array_record", b"no records")
    columns = {"body": ["a", "b", "c"]}
    parquet.write_table(pa.table(columns), self.folder / "in/z.parquet")
    corpus = self.open(f"{self.folder}/in/*", max_bad_share=0.6)
    # Three files, and three rows without the column.
    self.assertEqual(corpus.bad_records, {"in": 6})
    self.batches(corpus)
    files = [os.path.basename(line["file"]) for line in self.lines()]
    self.assertEqual(
      files, ["latin.txt", "x.parquet", "y.array_record", "z.parquet"]
    )
    with self.assertRaisesRegex(corpus_lib.DataError, "in': 6 of 12 records"):
      self.open(f"{self.folder}/in/*", max_bad_share=0.49)

  @parameterized.parameters(-0.1, 1.0, float("nan"))
  def test_shares_are_checked(self, share):
    with self.assertRaisesRegex(corpus_lib.DataError, "max_bad_share"):
      corpus_lib.DataConfig(max_bad_share=share)


class TrainingTest(QuarantineTestCase):
  def write_files(self, n=100):
    for i in range(n):
      self.write(f"books/{i:02d}.txt", f"<{i:02d}>" * 6)
    return f"{self.folder}/books/*.txt"

  def test_a_file_that_vanishes_is_left_out(self):
    path = self.write_files()
    corpus = self.open(path, max_bad_share=0.02)
    lost = side(corpus.sources[0].train)[5]
    os.remove(self.folder / f"books/{lost[1:3]}.txt")
    iterator = self.batches(corpus)
    texts = served(rows(take(iterator, 400)))  # more than two epochs
    kept = [text for text in side(corpus.sources[0].train) if text]
    self.assertLen(kept, len(corpus.sources[0].train) - 1)
    self.assertCountEqual(texts[: len(kept)], kept)
    self.assertNotIn(lost, texts)
    self.assertEqual(corpus.bad_records, {"books": 1})
    (line,) = self.lines()
    self.assertIn(f"{lost[1:3]}.txt", line["file"])
    self.assertIn("FileNotFoundError", line["why"])
    self.assertEqual(self.slept[:3], [0.1, 0.5, 2.0])

  def test_a_file_that_comes_back_is_waited_for(self):
    path = self.write_files()
    corpus = self.open(path)
    expected = rows(take(self.batches(corpus), 150))
    books, away = self.folder / "books", self.folder / "away"
    iterator = self.batches(corpus)
    shutil.move(books, away)

    def sleep(seconds):
      if books.exists():
        return
      self.slept.append(seconds)
      if seconds == 2.0:
        shutil.move(away, books)

    with unittest.mock.patch.object(sources_lib.time, "sleep", sleep):
      np.testing.assert_array_equal(rows(take(iterator, 150)), expected)
    self.assertIn(2.0, self.slept)
    self.assertEqual(corpus.bad_records, {"books": 0})
    self.assertFalse(self.quarantine.exists())

  def test_a_source_that_vanishes_stops_training(self):
    path = self.write_files()
    other = self.write("web.jsonl", '{"text": "web"}\n' * 20)
    config = corpus_lib.DataConfig(
      sources=corpus_test.sources(path, other), max_bad_share=0.1
    )
    corpus = corpus_lib.Corpus(config, self.quarantine)
    iterator = self.batches(corpus)
    read = take(iterator, 20)
    shutil.move(self.folder / "books", self.folder / "away")
    message = (
      r"'books': 1\d of 100 records are bad.*max_bad_share=0.1 .*books/\d\d.txt"
      rf".*No such file.*listed in {self.quarantine}"
    )
    with self.assertRaisesRegex(corpus_lib.DataError, message):
      while True:
        state = json.dumps(iterator.get_state())
        read.append(next(iterator))
    # The place is that of the last batch, as often as one asks.
    self.assertEqual(json.dumps(iterator.get_state()), state)
    with self.assertRaisesRegex(corpus_lib.DataError, message):
      next(iterator)
    self.assertLess(sum(self.slept), 20)
    self.assertGreaterEqual(len(self.lines()), 11)
    # Once the source is back, training goes on from there.
    shutil.move(self.folder / "away", self.folder / "books")
    whole = corpus_lib.Corpus(config)
    resumed = self.batches(whole)
    resumed.set_state(json.loads(state))
    unbroken = self.batches(whole)
    ends = json.loads(state)["block"]  # of one row
    take(unbroken, ends)
    for _ in range(20):
      self.assert_batches_equal(next(resumed), next(unbroken))

  def test_the_first_one_stops_where_none_may_be(self):
    corpus = self.open(self.write_files())
    lost = side(corpus.sources[0].train)[5]
    os.remove(self.folder / f"books/{lost[1:3]}.txt")
    iterator = self.batches(corpus)
    with self.assertRaisesRegex(
      corpus_lib.DataError, f"1 of 100.*{lost[1:3]}.txt"
    ):
      take(iterator, 400)

  def test_a_source_of_which_nothing_is_left(self):
    corpus = self.open(self.write_files(), max_bad_share=0.99)
    train = len(corpus.sources[0].train)
    shutil.rmtree(self.folder / "books")
    with self.assertRaisesRegex(
      corpus_lib.DataError, f"None of {train} documents"
    ):
      take(self.batches(corpus), 1000)

  def test_what_changes_is_bad(self):
    self.write("in/a.txt", "a text")
    self.write("in/b.jsonl", '{"text": "b 1"}\n{"text": "b 2"}\n')
    self.write("in/c.txt", "another")
    corpus = self.open(f"{self.folder}/in/*", max_bad_share=0.9)
    source = corpus.sources[0]
    self.batches(corpus)
    texts = side(source.train) + side(source.heldout)
    self.assertCountEqual(texts, ["a text", "b 1", "b 2", "another"])
    self.write("in/a.txt", "a te")
    self.write("in/b.jsonl", '{"text": "b 1"}\n{"text": "')
    texts = side(source.train) + side(source.heldout)
    self.assertCountEqual(texts, ["", "b 1", "", "another"])
    why = {line["why"] for line in self.lines()}
    self.assertLen(why, 2)
    self.assertTrue(any("has 4 bytes; it had 6" in text for text in why), why)
    self.assertTrue(any("b.jsonl, byte 16, is not JSON" in x for x in why), why)

  def test_each_process_writes_what_it_finds(self):
    path = self.write_files()
    with unittest.mock.patch.object(jax, "process_index", lambda: 3):
      corpus = self.open(path, max_bad_share=0.5)
      self.batches(corpus)
      os.remove(self.folder / "books/07.txt")
      source = corpus.sources[0]
      side(source.train), side(source.heldout)
      self.assertLen(self.lines(process=3), 1)
      # Another start of it, or of another process, does not write it again.
    corpus = self.open(path, max_bad_share=0.5)
    self.assertFalse((self.quarantine / "0.jsonl").exists())


def open_bytes(path) -> bytes:
  with open(path, "rb") as file:
    return file.read()


if __name__ == "__main__":
  absltest.main()
