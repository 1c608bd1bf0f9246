"""What a file is: by its suffix, its first bytes, and what is in it."""

import bz2
import errno
import gzip
import json
import lzma
import os
import pathlib
import tempfile

import numpy as np
import pyarrow as pa
import pytest

from tests.train.data import corpora
from train.data import content as content_lib
from train.data import corpus as corpus_lib

TEXTS = ["one", "zwei €\r\n", "🙂\u2028x", "a" * 3000, "five"]
OBJECTS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, OBJECTS)).encode()


def zstd(data: bytes) -> bytes:
  return pa.compress(data, codec="zstd", asbytes=True)


PACKED = {
  "gz": gzip.compress,
  "bz2": bz2.compress,
  "xz": lzma.compress,
  "zst": zstd,
  "GZ": gzip.compress,
}


@pytest.mark.parametrize(
  "name, content",
  [
    ("x.jsonl", LINES),
    ("x.JSONL", LINES),
    ("x.ndjson", LINES),
    ("x.json", LINES),
    ("x.Json", LINES + b"\n"),
    ("x.json", json.dumps(OBJECTS).encode()),
    ("x.json", json.dumps(OBJECTS, indent=2, ensure_ascii=False).encode()),
    ("x.json", b" \n\n [" + b" , ".join(LINES.split(b"\n")) + b" ] \n"),
    ("x.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
    ("x.json", b"\xef\xbb\xbf" + json.dumps(OBJECTS, indent=1).encode()),
  ],
)
@pytest.mark.parametrize("packing", [None, *PACKED])
def test_json_is_read_by_the_record(tmp_path, name, content, packing):
  if packing:
    name, content = f"{name}.{packing}", PACKED[packing](content)
  corpora.write(tmp_path / name, content)
  documents = corpora.open_in(tmp_path, "*")
  for i in np.random.default_rng(0).permutation(len(TEXTS)):
    assert documents[int(i)] == TEXTS[i]
  assert len(documents) == len(TEXTS)


@pytest.mark.parametrize("packing", PACKED)
def test_all_kinds_may_be_compressed(tmp_path, packing):
  pack = PACKED[packing]
  corpora.write(tmp_path / f"a.txt.{packing}", pack("text é\r\n".encode()))
  parquet = corpora.write_parquet(tmp_path / "b.parquet", {"text": TEXTS})
  os.rename(parquet, tmp_path / "b")
  corpora.write(
    tmp_path / f"b.parquet.{packing}", pack((tmp_path / "b").read_bytes())
  )
  os.remove(tmp_path / "b")
  corpora.write(tmp_path / f"c.{packing}", pack(b"no suffix"))
  # Two that follow each other are one.
  corpora.write(tmp_path / f"d.md.{packing}", pack(b"tw") + pack(b"o"))
  documents = corpora.open_in(tmp_path, "*")
  expected = ["text é\r\n", *TEXTS, "no suffix", "two"]
  assert corpora.side(documents) == expected


@pytest.mark.parametrize("packing", PACKED)
def test_what_is_cut_off_is_told(tmp_path, packing):
  data = PACKED[packing](LINES * 50)
  for name, broken in (
    ("half", data[: len(data) // 2]),
    ("end", data[:-1]),
    ("flipped", data[:1] + bytes([data[1] ^ 255]) + data[2:]),
    ("other", LINES),
  ):
    file = f"{name}.jsonl.{packing}"
    corpora.write(tmp_path / file, broken)
    with pytest.raises(corpus_lib.DataError, match=f"{file} cannot be unpack"):
      corpora.open_in(tmp_path, file)


@pytest.mark.parametrize("packing", PACKED)
def test_nothing_after_a_part_is_left_out(tmp_path, packing):
  pack = PACKED[packing]
  one, two = pack(LINES + b"\n"), pack(LINES)
  for name, broken in (
    ("garbage", one + b"garbage"),
    ("second", one + bytes([two[0] ^ 255]) + two[1:]),
    ("beginning", one + two[:1]),
    ("half", one + two[: len(two) // 2]),
    ("nothing", b""),
  ):
    file = f"{name}.jsonl.{packing}"
    corpora.write(tmp_path / file, broken)
    with pytest.raises(corpus_lib.DataError, match=f"{file} cannot be unpack"):
      corpora.open_in(tmp_path, file)
  if packing != "zst":  # whose tool refuses them, too
    zeros = bytes(content_lib._CHUNK + 4)
    corpora.write(tmp_path / f"x.jsonl.{packing}", one + zeros + two + zeros)
    documents = corpora.open_in(tmp_path, f"x.jsonl.{packing}")
    assert corpora.side(documents) == TEXTS * 2


def test_names_that_are_no_text(tmp_path):
  odd = os.fsdecode(b"\xff")
  parquet = corpora.write_parquet(tmp_path / "p", {"text": ["a row"]})
  table = pathlib.Path(parquet).read_bytes()
  os.remove(parquet)
  for kind, data in (
    ("txt", b"text"),
    ("jsonl", b'{"text": "line"}'),
    ("json", b'[{"text": "element"}]'),
    ("parquet", table),
  ):
    corpora.write(tmp_path / f"{kind}{odd}.{kind}", data)
    for packing, pack in PACKED.items():
      corpora.write(tmp_path / f"{kind}{odd}.{kind}.{packing}", pack(data))
  found = corpora.side(corpora.open_in(tmp_path, "*"))
  texts = ["line", "element", "a row", "text"]
  assert found == list(np.repeat(texts, 1 + len(PACKED)))
  corpora.write(tmp_path / f"{odd}.array_record", bytes(1 << 16))
  with pytest.raises(corpus_lib.DataError, match="not UTF-8.*; rename it"):
    corpora.open_in(tmp_path, "*")


def test_no_room_to_unpack(tmp_path, monkeypatch):
  corpora.write(tmp_path / "x.txt.gz", gzip.compress(b"text" * 9999))

  class Full:
    def seek(self, *_):
      return 0

    def write(self, _):
      raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
      pass

  with monkeypatch.context() as patch:
    patch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(corpus_lib.DataError, match="No space.*set TMPDIR"):
      corpora.open_in(tmp_path, "x.txt.gz")
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
  with pytest.raises(corpus_lib.DataError, match="set TMPDIR"):
    corpora.open_in(tmp_path, "x.txt.gz")


def test_what_is_unpacked_goes_with_its_source(tmp_path):
  corpora.write(tmp_path / "x.txt.gz", gzip.compress(b"text"))
  open_before = os.listdir("/proc/self/fd")
  for _ in range(3):
    documents = corpora.open_in(tmp_path, "x.txt.gz")
    assert documents[0] == "text"
    del documents
  assert len(os.listdir("/proc/self/fd")) <= len(open_before)


def test_many_compressed_files_take_one_handle(tmp_path):
  for i in range(40):
    corpora.write(tmp_path / f"{i:02d}.txt.gz", gzip.compress(b"text %d" % i))
  before = len(os.listdir("/proc/self/fd"))
  documents = corpora.open_in(tmp_path, "*")
  assert len(os.listdir("/proc/self/fd")) == before + 1
  assert corpora.side(documents) == [f"text {i}" for i in range(40)]


def test_suffixes():
  for name, expected in (
    ("a.jsonl", (".jsonl", "")),
    ("a.b.JSONL.Gz", (".jsonl", ".gz")),
    ("a.gz", ("", ".gz")),
    (".gz", ("", "")),
    ("a", ("", "")),
  ):
    assert content_lib.suffixes(pathlib.Path(name)) == expected


@pytest.mark.parametrize(
  "name, data, message",
  [
    ("x.csv", b"a,b\n1,2\n", "x.csv is a table, not text; convert it"),
    ("x.TSV", b"a\tb\n", "is a table"),
    ("x.csv.gz", gzip.compress(b"a,b\n"), "is a table"),
    ("x.zip", b"PK\x03\x04", "unpack it"),
    ("x.txt", b"PK\x03\x04text", "unpack it"),
    ("x.tar", b"text", "unpack it"),
    ("x.tar.gz", gzip.compress(b"text"), "unpack it"),
    ("x.tgz", gzip.compress(b"text"), "unpack it"),
    ("x.jsonl", gzip.compress(LINES), r"name does not say; add the suffix .gz"),
    ("x.txt", zstd(LINES), r"add the suffix .zst"),
    ("x.json", bz2.compress(LINES), r"add the suffix .bz2"),
    ("x.parquet", lzma.compress(LINES), r"add the suffix .xz"),
    ("x.gz", gzip.compress(gzip.compress(b"a")), r"add the suffix .gz"),
    ("x.txt", b"PAR1text", r"is Parquet; name it \*.parquet"),
    ("x.arrow", b"ARROW1", "Arrow's format; convert it to Parquet"),
    ("x", b"ARROW1\0\0", "Arrow's format"),
    ("x.pdf", b"%PDF-1.7\n%", "is PDF; convert it to text"),
    ("x.txt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("x.pyc", b"\xcb\r\r\n\0\0\0\0", "no text: byte 4 is a NUL"),
    ("x.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "no text: byte 8 is a NUL"),
    ("x.safetensors", b"\x40\0\0\0\0\0\0\0{}", "no text: byte 1 is a NUL"),
    ("x.txt", b"text\0text", "no text: byte 4 is a NUL; narrow the glob"),
    ("x.txt", "text".encode("utf-16"), "is UTF-16 or UTF-32; convert it"),
    ("x.jsonl", LINES.decode().encode("utf-16"), "is UTF-16 or UTF-32"),
    ("x.json", LINES.decode().encode("utf-16"), "is UTF-16 or UTF-32"),
    ("x.json", json.dumps(OBJECTS[0], indent=2).encode(), "neither a JSON"),
    (
      "x.json",
      b'{"data": [\n{"text": "a"}]}',
      "x.json is neither a JSON",
    ),
    ("x.json", b"no json at all", "neither a JSON array of objects nor JSON"),
    ("x.json", b'[{"text": "a"}', "x.json is not a JSON array"),
    ("x.json", b'[{"text": "a"} {"text": "b"}]', "x.json is not a JSON array"),
    ("x.json", b'[{"text": "a"}]\n[{"text": "b"}]', "array .Extra data"),
    ("x.json", b'[{"text": "a"},]', "x.json is not a JSON array"),
    ("x.json", b'[{"text": "a"}, "b"]', "x.json, element 1, holds a str"),
    ("x.json", b'[{"text": "a"}, {"a": 1}]', "element 1, has no field 'text'"),
    ("x.json", b"[" * 100_000, "not a JSON array .maximum recursion depth"),
    ("x.jsonl-00000-of-00002", LINES, r"JSON lines.*; name it \*.jsonl, or"),
    ("x.jsonl.bak", LINES, "x.jsonl.bak holds JSON lines"),
    ("x.jl", b"\xef\xbb\xbf\n" + LINES.replace(b"\n", b"\r\n\n"), "JSON lines"),
    ("x", LINES, "holds JSON lines"),
    ("x.gz", gzip.compress(LINES), "holds JSON lines"),
    ("x.json", b"[]", "all of them empty"),
    ("x.json", b"\n \n", "all of them empty"),
    ("x.json.gz", gzip.compress(b""), "all of them empty"),
  ],
)
def test_what_a_file_is_not(tmp_path, name, data, message):
  corpora.write(tmp_path / name, data)
  with pytest.raises(corpus_lib.DataError, match=message):
    corpora.open_in(tmp_path, name)


@pytest.mark.parametrize(
  "name, text",
  [
    ("x.txt", LINES.decode()),  # as it says
    ("x.txt.gz", LINES.decode()),
    ("x.py", "pass\n"),
    ("x.ipynb", json.dumps(OBJECTS[0], indent=1)),
    ("x.map", json.dumps(OBJECTS[0])),
    ("x.tmpl", "{}\n{body}\n"),
    ("x.set", "{1}\n{2}\n"),
    ("x.unheard_of", "text"),
    ("README", "text"),
    ("x.md", "BZh is text, and so is PK and %PDF"),
    ("x.2024", "text"),
  ],
)
def test_any_other_text_is_a_document(tmp_path, name, text):
  data = text.encode()
  corpora.write(
    tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data
  )
  assert corpora.side(corpora.open_in(tmp_path, name)) == [text]


def test_a_byte_order_mark_is_no_text(tmp_path):
  corpora.write(tmp_path / "a.txt", b"\xef\xbb\xbfone \xef\xbb\xbf two")
  assert corpora.side(corpora.open_in(tmp_path, "*")) == ["one \ufeff two"]


def test_a_bad_element_moves_no_other(tmp_path):
  values = [*OBJECTS * 4, [1], *OBJECTS, {"text": ""}, {"text": 3}]
  corpora.write(tmp_path / "x.json", json.dumps(values))
  config = corpus_lib.DataConfig(
    sources=corpora.sources(f"{tmp_path}/x.json"), max_bad_share=0.5
  )
  (source,) = corpus_lib.Corpus(config).sources
  assert source.quarantine.count == 2
  texts = corpora.side(source.train) + corpora.side(source.heldout)
  assert sorted(texts) == sorted(["", "", *TEXTS * 5])
