"""Files damaged at random: documents, bad records, or one line; no more."""

import bz2
import gzip
import json
import lzma
import pathlib
import time

import numpy as np
import pyarrow as pa
import pytest

from tests.train.data import corpora
from tests.train.data import documents_test
from train.data import corpus as corpus_lib
from train.data import sources as sources_lib

TEXTS = [f"{i:02d} Größe 🙂\n" * (1 + i % 5) for i in range(30)]
OBJECTS = [{"id": i, "text": text, "n": [i]} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, OBJECTS)).encode()
_SECONDS = 5.0  # what a case may take


def whole(folder: pathlib.Path) -> dict[str, bytes]:
  """A file of each kind, by its name."""
  files = {
    "x.txt": TEXTS[4].encode(),
    "x.jsonl": LINES,
    "x.json": json.dumps(OBJECTS, indent=1, ensure_ascii=False).encode(),
    "lines.json": LINES,
    "x.jsonl.gz": gzip.compress(LINES, mtime=0),
    "x.jsonl.bz2": bz2.compress(LINES),
    "x.jsonl.xz": lzma.compress(LINES),
    "x.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "x.json.gz": gzip.compress(json.dumps(OBJECTS).encode(), mtime=0),
  }
  column = pa.array(TEXTS)
  for name, text, options in (
    ("plain", column, dict(use_dictionary=False, compression="none")),
    ("snappy", column, dict(row_group_size=7)),
    ("zstd", column, dict(compression="zstd", use_dictionary=False)),
    ("categories", column.dictionary_encode(), dict(row_group_size=11)),
    ("checked", column, dict(write_page_checksum=True, version="1.0")),
  ):
    path = folder / f"{name}.parquet"
    corpora.write_parquet(path, {"id": range(30), "text": text}, **options)
    files[path.name] = path.read_bytes()
  path = folder / "x.array_record"
  documents_test.write_array_records(
    path, [json.dumps(each).encode() for each in OBJECTS]
  )
  files[path.name] = path.read_bytes()
  return files


def damage(data: bytes, rng: np.random.Generator) -> bytes:
  """Flips, cuts, repeats, exchanges or overwrites some of the bytes."""
  out = bytearray(data)
  for _ in range(rng.integers(1, 4)):
    if not out:
      break
    at = int(rng.integers(len(out)))
    if rng.integers(2):  # footers are at the end
      at = max(len(out) - 1 - int(rng.integers(200)), 0)
    size = int(rng.choice([1, 4, 8, 100]))
    match rng.integers(7):
      case 0:
        out[at] ^= 1 << int(rng.integers(8))
      case 1:
        del out[at:]
      case 2:
        del out[at : at + size]
      case 3:
        out[at:at] = out[at : at + size]
      case 4:
        out[at : at + size] = rng.bytes(len(out[at : at + size]))
      case 5:
        out[at : at + size] = bytes(len(out[at : at + size]))
      case 6:
        there = int(rng.integers(len(out)))
        out[at : at + size] = out[there : there + len(out[at : at + size])]
  return bytes(out)


def read_all(path: pathlib.Path, share: float) -> str:
  """Returns what became of a file: "read", or the line that refused it."""
  good = corpora.write_json_lines(path.with_name("good.jsonl"), TEXTS[:6])
  source = corpus_lib.SourceConfig(path=f"{path},{good}", name=path.stem)
  config = corpus_lib.DataConfig(
    sources=(source,), max_bad_share=share, heldout_fraction=0.5
  )
  try:
    (source,) = corpus_lib.Corpus(config).sources
    texts = corpora.side(source.train) + corpora.side(source.heldout)
  except corpus_lib.DataError as e:
    (line,) = str(e).splitlines()
    assert path.name in line or path.stem in line
    return line
  assert all(isinstance(text, str) for text in texts)
  "".join(texts).encode()
  return "read"


def attack(folder, monkeypatch, seed: int, cases: int) -> None:
  monkeypatch.setattr(sources_lib.time, "sleep", lambda seconds: None)
  rng = np.random.default_rng(seed)
  files = whole(folder)
  ends = {name: set() for name in files}
  for case in range(cases):
    name = [*files][case % len(files)]
    path = folder / name
    path.write_bytes(damage(files[name], rng))
    began = time.monotonic()
    for share in (0.0, 0.9):
      ends[name].add(read_all(path, share) == "read")
    assert time.monotonic() - began < _SECONDS, (name, case)
    path.unlink()
  assert all({True, False} == found for found in ends.values()), ends


def test_damaged_files(tmp_path, monkeypatch):
  attack(tmp_path, monkeypatch, seed=0, cases=225)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_more_damaged_files(tmp_path, monkeypatch, seed):
  attack(tmp_path, monkeypatch, seed, cases=1000)
