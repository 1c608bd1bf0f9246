import json
import pathlib
import sys

import numpy as np
import pytest
import tokenizers

from dsa_jax.chat import tokenizer as tokenizer_lib

TEXT = "Größe: 3 €, 語 🙂\r\n\tdef f(x): return x\n"


def write_hf(
  folder: pathlib.Path, *, eos="</s>", special=True, config=None
) -> str:
  """Trains a byte-level BPE on `TEXT` and returns its tokenizer.json's path."""
  hf = tokenizers.Tokenizer(tokenizers.models.BPE())
  hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  hf.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=270,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  hf.train_from_iterator([TEXT] * 4, trainer)
  if eos is not None:
    hf.add_special_tokens([eos]) if special else hf.add_tokens([eos])
  # What a careless export leaves behind; it must not change a text.
  hf.enable_truncation(3)
  hf.enable_padding(length=64)
  path = folder / "tokenizer.json"
  hf.save(str(path))
  if config is not None:
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
  return str(path)


@pytest.mark.parametrize("kind", ["bytes", "hf"])
def test_round_trip(tmp_path, kind):
  name = kind if kind == "bytes" else write_hf(tmp_path)
  tokenizer = tokenizer_lib.load_tokenizer(name)
  for text in (TEXT, "", "\0", "a" * 1000):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id]) == text
  assert tokenizer.eos_id < tokenizer.vocab_size


def test_bytes():
  tokenizer = tokenizer_lib.load_tokenizer("bytes")
  np.testing.assert_array_equal(tokenizer.encode("aé"), [97, 0xC3, 0xA9])
  assert (tokenizer.eos_id, tokenizer.vocab_size) == (256, 257)
  assert tokenizer.decode([97, 0xC3, 256, 300, 98]) == "a\ufffdb"


@pytest.mark.parametrize(
  "eos, options",
  [
    # The configuration decides, in either form, even against a known name.
    ("<end>", dict(config={"eos_token": "<end>"})),
    ("<end>", dict(config={"eos_token": {"content": "<end>", "id": 1}})),
    ("<end>", dict(special=False, config={"eos_token": "<end>"})),
    # Without one, or when it is silent, a well-known name does.
    ("<｜end▁of▁sentence｜>", dict()),
    ("<|endoftext|>", dict(config={})),
    ("<eos>", dict(config={"eos_token": None})),
  ],
)
def test_finds_eos(tmp_path, eos, options):
  path = write_hf(tmp_path, eos=eos, **options)
  tokenizer = tokenizer_lib.HfTokenizer(path)
  hf = tokenizers.Tokenizer.from_file(path)
  assert tokenizer.eos_id == hf.token_to_id(eos)
  assert tokenizer.vocab_size == hf.get_vocab_size()
  assert tokenizer.vocab_size > hf.get_vocab_size(with_added_tokens=False)


@pytest.mark.parametrize("special", [True, False])
def test_a_text_cannot_spell_eos(tmp_path, special):
  path = write_hf(tmp_path, special=special, config={"eos_token": "</s>"})
  tokenizer = tokenizer_lib.HfTokenizer(path)
  ids = tokenizer.encode("a</s>b")
  assert tokenizer.eos_id not in ids
  assert tokenizer.decode(ids) == "a</s>b"


@pytest.mark.parametrize("eos", ["e", "{", "Ċ"])
def test_a_word_is_no_eos(tmp_path, eos):
  path = write_hf(tmp_path, config={"eos_token": eos})
  with pytest.raises(
    tokenizer_lib.TokenizerError, match=f"texts have '{eos}' within them"
  ):
    tokenizer_lib.HfTokenizer(path)


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
def test_what_unknown_characters_become_is_no_eos(tmp_path, kind):
  path = pathlib.Path(write_hf(tmp_path))
  raw = json.loads(path.read_text()) | {"pre_tokenizer": None, "decoder": None}
  raw["added_tokens"][0]["id"] = 0
  for unknown, refused in (("</s>", True), ("?", False)):
    model = {"type": kind, "vocab": {"</s>": 0, "?": 1}, "unk_token": unknown}
    merges = {"merges": []} if kind == "BPE" else {}
    path.write_text(json.dumps(raw | {"model": model | merges}))
    if refused:
      with pytest.raises(tokenizer_lib.TokenizerError, match="'</s>' within"):
        tokenizer_lib.HfTokenizer(str(path))
    else:
      assert tokenizer_lib.HfTokenizer(str(path)).encode("x").tolist() == [1]


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(eos=None), "which token ends a document"),
    # An ordinary token with a well-known name may be an accident.
    (dict(eos="</s>", special=False), "which token ends a document"),
    (dict(config={"eos_token": "<end>"}), "'<end>'.* is not in"),
  ],
)
def test_refuses_to_guess_eos(tmp_path, options, message):
  path = write_hf(tmp_path, **options)
  with pytest.raises(tokenizer_lib.TokenizerError, match=message):
    tokenizer_lib.HfTokenizer(path)


def test_bad_file(tmp_path):
  with pytest.raises(
    tokenizer_lib.TokenizerError, match="'byte' is not a file"
  ):
    tokenizer_lib.load_tokenizer("byte")
  path = tmp_path / "x.json"
  path.write_text("{}")
  with pytest.raises(
    tokenizer_lib.TokenizerError, match="not a tokenizer.json"
  ):
    tokenizer_lib.load_tokenizer(str(path))


def test_missing_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(
    tokenizer_lib.TokenizerError, match=r"pip install .dsa-jax\[hf\]"
  ):
    tokenizer_lib.load_tokenizer("tokenizer.json")
