"""Records that are odd: each is a document, a bad record, or one line."""

import json
import pathlib

import pytest

from tests.train.data import corpora
from train.data import corpus as corpus_lib
from train.data import records

DIGITS = b"1" * 5000
DEEP = b"[" * 200_000 + b"]" * 200_000
OBJECTS = b'{"a":' * 200_000

BAD = {
  "an integer of 5,000 digits": b'{"text": "a", "n": ' + DIGITS + b"}",
  "a negative one, deep inside": b'{"text": "a", "n": [{"m": -%s}]}' % DIGITS,
  "in place of the object": DIGITS,
  "as the text": b'{"text": ' + DIGITS + b"}",
  "nested": b'{"text": "a", "n": ' + DEEP + b"}",
  "nested objects": OBJECTS,
  "nested text": b'{"text": ' + DEEP + b"}",
  "the text twice": b'{"text": "a", "text": "b"}',
  "twice, once spelt otherwise": b'{"text": "a", "\\u0074ext": "b"}',
  "NaN as the text": b'{"text": NaN}',
  "an object as the text": b'{"text": {"text": "a"}}',
  "a list as the text": b'{"text": ["a"]}',
  "true as the text": b'{"text": true}',
  "half a surrogate pair": b'{"text": "\\udfff"}',
  "half of one in a key": b'{"\\ud800": "a"}',
  "NULs": b"\0" * 4096,
  "a NUL": b'{"text": "a\0"}',
  "a NUL after it": b'{"text": "a"}\0',
  "a control character": b'{"text": "a\x01"}',
  "two objects": b'{"text": "a"}{"text": "b"}',
  "a comma after it": b'{"text": "a"},',
  "no object": b'"text"',
  "null": b"null",
  "Python": b"{'text': 'a'}",
  "no bytes of UTF-8": b'{"text": "\xc3"}',
  "UTF-16": '{"text": "a"}'.encode("utf-16-le"),
  "a byte order mark inside": b'\xef\xbb\xbf{"text": "a"}',
  "an empty object": b"{}",
  "a carriage return inside": b'{"text": "a"}\r{"text": "b"}',
}
GOOD = {
  "NaN beside it": (b'{"text": "a", "n": [NaN, Infinity, -Infinity]}', "a"),
  "another key twice": (b'{"n": 1, "n": 2, "text": "a"}', "a"),
  "the key inside": (b'{"n": {"text": "b"}, "text": "a"}', "a"),
  "a surrogate pair": (b'{"text": "\\ud83d\\ude42"}', "🙂"),
  "spaces around it": (b' \t {"text": "a"} \t\r', "a"),
  "a NUL, spelt": (b'{"text": "a\\u0000"}', "a\0"),
  "a huge float": (b'{"text": "a", "n": 1e999999}', "a"),
  "line breaks of Unicode": ('{"text": "a\u2028\x85"}'.encode(), "a\u2028\x85"),
}


def open_line(folder: pathlib.Path, line: bytes, share: float):
  """20 good lines, and this one in the middle."""
  lines = [b'{"text": "%d"}' % i for i in range(20)]
  lines.insert(10, line)
  path = corpora.write(folder / "x.jsonl", b"\n".join(lines))
  config = corpus_lib.DataConfig(
    sources=corpora.sources(path), max_bad_share=share
  )
  (source,) = corpus_lib.Corpus(config).sources
  texts = corpora.side(source.train) + corpora.side(source.heldout)
  return source, sorted(set(texts) - {str(i) for i in range(20)})


@pytest.mark.parametrize("what", BAD)
def test_bad(tmp_path, what):
  source, others = open_line(tmp_path, BAD[what], share=0.1)
  assert (source.quarantine.count, others) == (1, [""])
  with pytest.raises(corpus_lib.DataError, match="x.jsonl") as e:
    open_line(tmp_path, BAD[what], share=0.0)
  (line,) = str(e.value).splitlines()
  assert len(line) < 600
  line.encode()  # it can be printed


@pytest.mark.parametrize("what", GOOD)
def test_good(tmp_path, what):
  line, text = GOOD[what]
  source, others = open_line(tmp_path, line, share=0.0)
  assert (source.quarantine.count, others) == (0, [text])


def test_lines_that_are_left_out(tmp_path):
  content = b'\r\n\n  \n{"text": "a"}\r\n\t\n{"text": ""}\n\n{"text": "b"}\n \n'
  path = corpora.write(tmp_path / "x.jsonl", content)
  assert corpora.side(corpora.open_documents(path)) == ["a", "b"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
  "name, content",
  [
    ("x.jsonl", b'{"body": "a"}'),
    ("x.jsonl", b'{"text": 1}'),
    ("x.json", b'[{"body": "a"}]'),
    ("x.parquet", None),
  ],
)
def test_the_option_is_told_as_one_types_it(tmp_path, number, name, content):
  good = corpora.write(tmp_path / "good.txt", "good")
  path = str(tmp_path / name)
  if content is None:
    corpora.write_parquet(path, {"body": ["a"]})
  else:
    corpora.write(tmp_path / name, content)
  paths = [path] if number == 0 else [f"{good},{good[:-8]}g*", path]
  corpora.write(tmp_path / "g2.txt", "good too")
  with pytest.raises(
    corpus_lib.DataError, match=rf"--data\.sources\.{number}\.text-field"
  ):
    corpus_lib.Corpus(corpus_lib.DataConfig(sources=corpora.sources(*paths)))


def test_many_fields_are_not_all_told(tmp_path):
  line = json.dumps({f"{'field' * 100} {i}": i for i in range(1000)})
  path = corpora.write(tmp_path / "x.jsonl", line)
  with pytest.raises(corpus_lib.DataError, match="and 980 more") as e:
    corpora.open_documents(path)
  assert len(str(e.value)) < 2000
  assert records.shown(["a", "b"]) == "['a', 'b']"


@pytest.mark.parametrize(
  "text, expected",
  [
    ("[]", []),
    (" [ ] ", []),
    ("[1]", ["1"]),
    ('[{"a": "[,]"} ,\n[2, 3], "]"]\n', ['{"a": "[,]"}', "[2, 3]", '"]"']),
  ],
)
def test_spans(text, expected):
  assert [text[a:b] for a, b in records.spans(text)] == expected


@pytest.mark.parametrize(
  "text", ["", "1", "[", "[1", "[1,", "[,]", "[1,]", "[1 2]", "[1]]", "[1]x"]
)
def test_what_is_no_array_has_no_spans(text):
  with pytest.raises(json.JSONDecodeError):
    records.spans(text)
