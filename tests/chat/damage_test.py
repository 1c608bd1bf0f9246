"""Damaged tokenizers: refused in one line, or a tokenizer that works."""

import json
import os
import pathlib
import random

import pytest

from dsa_jax.chat import tokenizer as tokenizer_lib
from tests import damage
from tests.chat import tokenizer_test

TEXT = tokenizer_test.TEXT


class Folder:
  """A tokenizer.json and its tokenizer_config.json."""

  def __init__(self, folder: pathlib.Path):
    self.file = pathlib.Path(
      tokenizer_test.write_hf(folder, config={"eos_token": "</s>"})
    )
    self.config = folder / "tokenizer_config.json"
    self.raw = json.loads(self.file.read_text())
    self.size = 1 + max(x["id"] for x in self.raw["added_tokens"])

  def read(self, case) -> damage.Outcome:
    def use():
      tokenizer = tokenizer_lib.load_tokenizer(str(self.file))
      ids = tokenizer.encode(TEXT)
      assert tokenizer.eos_id not in ids
      assert tokenizer.vocab_size == self.size and ids.max() < self.size
      tokenizer.decode(ids)
      return tokenizer

    got = damage.read(use)
    if got.refused:
      assert "tokenizer" in got.said, case
    return got


@pytest.fixture
def folder(tmp_path):
  return Folder(tmp_path)


def test_values_of_tokenizer_json(folder):
  """Which the package makes its own sense of: at least it does not end us."""
  rng = random.Random(0)
  refused = 0
  short = damage.without(folder.raw, ("model", "merges"))
  short = damage.without(short, ("model", "vocab"))
  for path in [*damage.paths(short), ("model", "merges"), ("model", "vocab")]:
    for value in rng.sample(damage.HOSTILE, 6):
      text = damage.dumps(damage.replaced(folder.raw, path, value))
      folder.file.write_bytes(text)
      refused += folder.read((path, value)).refused
  assert refused > 100


def test_bytes_of_tokenizer_json(folder):
  whole = folder.file.read_bytes()
  rng = random.Random(0)
  for _ in range(100):
    at = rng.randrange(len(whole))
    flipped = bytes([whole[at] ^ 1 << rng.randrange(8)])
    damaged = rng.choice((whole[:at], whole[:at] + flipped + whole[at + 1 :]))
    folder.file.write_bytes(damaged)
    folder.read(at)
  folder.file.write_bytes(b"\xef\xbb\xbf" + whole)
  assert not folder.read("a byte order mark").refused
  folder.file.write_bytes(whole.decode().encode("utf-16"))
  assert folder.read("UTF-16").refused


@pytest.mark.parametrize("i", [0, 5, 271, 1000, 2**31, 2**32 - 1])
def test_an_added_token_with_another_id(folder, i):
  """The package would number it anew, and say so in its log alone."""
  path = ("added_tokens", 0, "id")
  folder.file.write_bytes(damage.dumps(damage.replaced(folder.raw, path, i)))
  said = folder.read(i).said
  assert f"added_tokens gives '</s>' the id {i}, but it is 270" in said


@pytest.mark.parametrize("i", [5, 269, 2**31, 2**32 - 1])
def test_a_token_with_an_id_of_another_or_far_too_large(folder, i):
  token = list(folder.raw["model"]["vocab"])[50]
  path = ("model", "vocab", token)
  folder.file.write_bytes(damage.dumps(damage.replaced(folder.raw, path, i)))
  got = folder.read(i)
  assert got.refused and f"the id {i} of" in got.said


def test_panics_of_the_package(folder):
  """Which are no Exceptions: at loading, and at the first text."""
  charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
  replace = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
  for normalizer, what in ((charsmap, "is not a"), (replace, "cannot encode")):
    raw = folder.raw | {"normalizer": normalizer}
    folder.file.write_bytes(damage.dumps(raw))
    said = folder.read(normalizer).said
    assert f"{what}" in said and "PanicException" in said


def test_an_interrupt_is_no_error_of_the_file(folder, monkeypatch):
  tokenizer = tokenizer_lib.HfTokenizer(str(folder.file))

  def stop(*_, **__):
    raise KeyboardInterrupt

  class Stops:
    encode = stop

  monkeypatch.setattr(tokenizer, "_tokenizer", Stops())
  with pytest.raises(KeyboardInterrupt):
    tokenizer.encode("a")


@pytest.mark.parametrize("value", damage.HOSTILE, ids=lambda x: repr(x)[:20])
def test_values_of_tokenizer_config_json(folder, value):
  for config in ({"eos_token": value}, {"eos_token": {"content": value}}):
    folder.config.write_bytes(damage.dumps(config))
    got = folder.read(config)
    if config["eos_token"] is not None:  # "1" is a token, but one of texts
      assert got.refused and "tokenizer_config.json" in got.said
    else:
      assert not got.refused
  folder.config.write_bytes(damage.dumps(value))
  assert folder.read(value).refused == (value not in ({}, {"a": {"b": 1}}))


@pytest.mark.parametrize(
  "text", [b"", b"{", b'{"eos_token": "</s>"', b"\xff\xfe{\0}\0", b"[1]"]
)
def test_a_broken_tokenizer_config_json(folder, text):
  folder.config.write_bytes(text)
  got = folder.read(text)
  assert got.refused and "tokenizer_config.json" in got.said


def test_a_tokenizer_config_json_with_a_byte_order_mark(folder):
  folder.config.write_bytes(b'\xef\xbb\xbf{"eos_token": "</s>"}')
  assert not folder.read("a byte order mark").refused


@pytest.mark.parametrize("other", damage.OTHERS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_what_is_no_file(folder, name, other):
  file = folder.file.with_name(name)
  file.unlink()
  damage.OTHERS[other](file)
  got = folder.read(other)
  assert got.refused and name in got.said


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read(folder):
  folder.file.chmod(0)
  assert "tokenizer.json" in folder.read("unreadable").said
