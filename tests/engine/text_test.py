"""Streamed text equals the text of all ids, however they are cut."""

import json
import random

import pytest

from dsa_jax.chat import tokenizer as tokenizer_lib
from dsa_jax.engine import text as text_lib

TEXT = "Größe: 3 €, 語語\u3000語 🙂👩‍👩‍👧 e\u0301o\u0308 नमस्ते\r\n\tx  y \ufffd!"
BYTES = tokenizer_lib.ByteTokenizer()
WORDS = ["▁", "▁a", "▁be", "a", "b", "c", "語", "é", ".", "▁▁", "🙂"]
BYTE_WORDS = [f"<0x{i:02X}>" for i in range(256)]
METASPACE = {
  "type": "Metaspace",
  "replacement": "▁",
  "prepend_scheme": "always",
  "split": True,
}
# As the models of LLaMA's and Gemma's families have it.
SENTENCEPIECE = {
  "type": "Sequence",
  "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
  ],
}
BYTE_LEVEL = {
  "type": "ByteLevel",
  "add_prefix_space": False,
  "trim_offsets": False,
  "use_regex": False,
}


def load(folder, decoder, words):
  """A tokenizer.json whose first id is special and whose next are `words`."""
  vocab = {word: i for i, word in enumerate(["</s>", *words])}
  special = {"id": 0, "content": "</s>", "special": True}
  special |= dict.fromkeys(
    ["single_word", "lstrip", "rstrip", "normalized"], False
  )
  path = folder / "tokenizer.json"
  path.write_text(
    json.dumps(
      {
        "version": "1.0",
        "added_tokens": [special],
        "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": words[0]},
      }
    )
  )
  return tokenizer_lib.HfTokenizer(str(path))


def byte_letters():
  """What GPT-2 calls each of the 256 bytes."""
  visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [i for i in range(256) if i not in visible]
  names = {i: chr(i) for i in visible}
  return names | {i: chr(256 + n) for n, i in enumerate(hidden)}


def streamed(tokenizer, ids, rng, stop=()):
  """The text in pieces, of up to 5 ids each, and the stream."""
  stream = text_lib.TextStream(tokenizer, stop)
  pieces, at = [], 0
  while at < len(ids):
    step = rng.randrange(6)
    pieces.append(stream.push(ids[at : at + step]))
    at += step
  return [*pieces, stream.finish()], stream


class Counting:
  """A tokenizer that counts the ids it decodes."""

  eos_id, vocab_size = BYTES.eos_id, BYTES.vocab_size

  def __init__(self):
    self.count = 0

  def encode(self, text):
    return BYTES.encode(text)

  def decode(self, ids):
    ids = list(ids)
    self.count += len(ids)
    return BYTES.decode(ids)


def test_a_character_is_shown_when_it_is_whole():
  """Byte by byte: what is shown is the text so far, and what is not a part."""
  stream, shown = text_lib.TextStream(BYTES), ""
  raw = TEXT.replace("\ufffd", "").encode()
  for n, byte in enumerate(raw, 1):
    shown += stream.push([byte])
    assert shown == raw[:n].decode(errors="ignore")
  assert stream.finish() == ""


def test_random_bytes():
  rng = random.Random(0)
  parts = [
    TEXT.encode(),
    b"\xff",
    b"\xe2\x82",
    b"\xf0\x9f\x98",
    b"\xed\xa0\x80",
  ]
  for _ in range(300):
    ids = []
    for _ in range(rng.randrange(12)):
      part = rng.choice([*parts, rng.randbytes(rng.randrange(30))])
      start = rng.randrange(len(part) + 1)
      ids += part[start : start + rng.randrange(40)]
      ids += [256] * rng.randrange(3)
    pieces, stream = streamed(BYTES, ids, rng)
    assert "".join(pieces) == BYTES.decode(ids)
    assert (stream.used, stream.stopped) == (len(ids), False)


@pytest.mark.parametrize("byte", [b"\xff", b"\x80", b"\xe2", b"\xf0"])
def test_what_is_no_utf8_is_not_held_back_forever(byte):
  stream, shown = text_lib.TextStream(BYTES), ""
  for n in range(1, 100):
    shown += stream.push(byte)
    assert len(shown) >= n - 3
  assert shown + stream.finish() == "\ufffd" * 99
  stream = text_lib.TextStream(BYTES)
  assert stream.push([*byte]) == ""
  assert stream.push(b"a") == "\ufffda"
  stream = text_lib.TextStream(BYTES)
  assert stream.push(b"a\xf0\x9f\x98") == "a"
  assert stream.finish() == "\ufffd"
  assert stream.finish() == ""


@pytest.mark.parametrize(
  "ids",
  [
    TEXT.encode() * 40,
    b"\xff" * 3000,
    "🙂".encode() * 800,
    [256] * 3000,
    [0xFF] + [256] * 3000,
    [97, 256] * 1500,
    [0xE2, 256] * 1500,
  ],
  ids=lambda _: "",
)
@pytest.mark.parametrize("step", [1, 7, 10**9])
def test_cost_of_an_id_is_the_same_wherever_it_is(ids, step):
  tokenizer, pieces = Counting(), []
  stream = text_lib.TextStream(tokenizer)
  for at in range(0, len(ids), step):
    pieces.append(stream.push(ids[at : at + step]))
  pieces.append(stream.finish())
  assert tokenizer.count <= 40 * len(ids)
  assert "".join(pieces) == BYTES.decode(ids)


@pytest.mark.parametrize("decoder", ["metaspace", "sentencepiece"])
def test_spaces_between_words(tmp_path, decoder):
  rng = random.Random(1)
  kind = METASPACE if decoder == "metaspace" else SENTENCEPIECE
  tokenizer = load(tmp_path, kind, WORDS)
  # A decoder that drops the first space makes each word alone another text.
  assert tokenizer.decode([2, 3]) == "a be"
  assert tokenizer.decode([3]) == "be"
  for case in range(150):
    weights = [rng.choice([0, 0, 1, 5]) for _ in WORDS]
    weights = [rng.choice([0, 1, 40]), 1, *weights[1:]]
    ids = rng.choices(range(1 + len(WORDS)), weights, k=rng.randrange(80))
    # Words that begin with special tokens, and have them between.
    ids = [0] * rng.choice([0, 0, 1, 7, 8, 9, 20]) + ids
    pieces, _ = streamed(tokenizer, ids, rng)
    assert "".join(pieces) == tokenizer.decode(ids), case


def test_a_word_is_shown_at_once(tmp_path):
  stream = text_lib.TextStream(load(tmp_path, METASPACE, WORDS))
  assert [stream.push([i]) for i in (2, 3, 4, 0, 3)] == [
    *("a", " be", "a", "", " be")
  ]


def test_bytes_among_words(tmp_path):
  rng = random.Random(2)
  tokenizer = load(tmp_path, SENTENCEPIECE, [*WORDS, *BYTE_WORDS])
  first = 1 + len(WORDS)
  for case in range(150):
    ids = []
    for _ in range(rng.randrange(20)):
      character = rng.choice("é語🙂€ \u0301")
      ids += [first + byte for byte in character.encode()] * rng.randrange(3)
      ids += rng.choices(range(1 + len(WORDS)), k=rng.randrange(4))
    pieces, _ = streamed(tokenizer, ids, rng)
    assert "".join(pieces) == tokenizer.decode(ids), case


def test_whole_characters_stay_whatever_bytes_follow(tmp_path):
  """Where the tokenizer itself would make all of them unknown."""
  tokenizer = load(tmp_path, SENTENCEPIECE, [*WORDS, *BYTE_WORDS])
  first = 1 + len(WORDS)
  for n in (1, 5, 30):
    broken = [first + byte for byte in "é".encode() * n + b"\xff"]
    ids = [2, *broken, 3, 3, 3]
    assert tokenizer.decode(ids).count("\ufffd") == 2 * n + 1
    pieces, _ = streamed(tokenizer, ids, random.Random(n))
    assert "".join(pieces) == "a" + "é" * n + "\ufffd be be be"
    stream = text_lib.TextStream(tokenizer)
    assert stream.push(ids) == "a" + "é" * n + "\ufffd be be be"
  # So many bytes without an end are read in parts.
  pieces, _ = streamed(tokenizer, [first + 255, *broken * 9], random.Random(0))
  assert set("".join(pieces)) <= set("é\ufffd")


def test_byte_level(tmp_path):
  rng = random.Random(3)
  names = byte_letters()
  pairs = [a + b for a in "ðŁĺĢâĤ" for b in "Ģ¬ðŁ"]
  tokenizer = load(tmp_path, BYTE_LEVEL, [*names.values(), *pairs])
  ids = {name: i for i, name in enumerate(["</s>", *names.values(), *pairs])}
  of_text = [ids[names[byte]] for byte in TEXT.encode()]
  assert tokenizer.decode(of_text) == TEXT
  for case in range(150):
    random_ids = rng.choices(range(len(ids)), k=rng.randrange(30))
    random_pairs = rng.choices(range(257, len(ids)), k=rng.randrange(30))
    start = rng.randrange(len(of_text))
    mixed = random_pairs + of_text[start:] + random_ids + of_text[:start]
    pieces, _ = streamed(tokenizer, mixed, rng)
    assert "".join(pieces) == tokenizer.decode(mixed), case


def cut(text, stops):
  """Where the text ends, and how much of it the stop text needs: all tried."""
  for end in range(len(text) + 1):
    starts = [end - len(s) for s in stops if text[:end].endswith(s)]
    if starts:
      return min(starts), end
  return None


@pytest.mark.parametrize(
  "text, stops, shown",
  [
    ("xaab", ("aab", "ab"), "x"),
    ("xab", ("aab", "ab"), "x"),
    ("xaaab", ("aab", "ab"), "xa"),
    ("abcd", ("abcd", "bc"), "a"),  # the first that is complete
    ("stop at once", ("stop",), ""),
    ("no. No? no!", ("no?", "no!"), "no. No? "),
    ("ababac", ("ababab", "bac"), "aba"),
    ("die Größe 🙂!", ("ße 🙂",), "die Grö"),
    ("aaaa", ("aaaaa",), "aaaa"),
  ],
)
def test_stop_texts(text, stops, shown):
  for step in range(1, 6):
    stream, ids, pieces = text_lib.TextStream(BYTES, stops), text.encode(), []
    for at in range(0, len(ids), step):
      pieces.append(stream.push(ids[at : at + step]))
    pieces.append(stream.finish())
    assert "".join(pieces) == shown
    found = cut(text, stops)
    assert stream.stopped == (found is not None)
    assert stream.used == len((text[: found[1]] if found else text).encode())
    assert stream.push(b"more") + stream.finish() == "" or not found


def test_what_may_begin_a_stop_text_is_held_back():
  stream = text_lib.TextStream(BYTES, ("aab", "ac"))
  pieces = [stream.push([ord(c)]) for c in "xaaaxaaab"]
  assert pieces == ["x", "", "", "a", "aax", "", "", "a", ""]
  assert stream.stopped
  stream = text_lib.TextStream(BYTES, ("aab",))
  assert (stream.push(b"xaa"), stream.finish()) == ("x", "aa")


def test_a_stop_text_that_only_the_end_completes():
  stream = text_lib.TextStream(BYTES, ("a\ufffd",))
  assert stream.push(b"xa\xe2") == "x"
  assert not stream.stopped
  assert stream.finish() == ""
  assert (stream.stopped, stream.used) == (True, 3)


def test_random_stop_texts():
  rng = random.Random(4)
  for _ in range(500):
    text = "".join(rng.choices("abé", k=rng.randrange(40)))
    stops = tuple(
      "".join(rng.choices("abé", k=rng.randrange(1, 7)))
      for _ in range(rng.randrange(1, 4))
    )
    ids = list(text.encode())
    pieces, stream = streamed(BYTES, ids, rng, stops)
    start, end = cut(text, stops) or (len(text), len(text))
    assert "".join(pieces) == text[:start]
    assert stream.used == len(text[:end].encode())


def test_a_stop_text_across_words(tmp_path):
  tokenizer = load(tmp_path, METASPACE, WORDS)
  stream = text_lib.TextStream(tokenizer, ("a be",))
  # "be", " a", "a", then " be" completes it; what follows is dropped.
  pieces = [stream.push([3, 2, 4]), stream.push([3, 2, 2]), stream.push([2])]
  assert pieces == ["be a", "", ""]
  assert (stream.stopped, stream.used) == (True, 4)
