import json
import pathlib
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import tokenizers

from dsa_jax.chat import tokenizer as tokenizer_lib

TEXT = "Größe: 3 €, 語 🙂\r\n\tdef f(x): return x\n"


def write_hf(folder: str, *, eos="</s>", special=True, config=None) -> str:
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
  path = pathlib.Path(folder, "tokenizer.json")
  hf.save(str(path))
  if config is not None:
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
  return str(path)


class TokenizerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = folder.name

  @parameterized.parameters("bytes", "hf")
  def test_round_trip(self, kind):
    name = kind if kind == "bytes" else write_hf(self.folder)
    tokenizer = tokenizer_lib.load_tokenizer(name)
    for text in (TEXT, "", "\0", "a" * 1000):
      ids = tokenizer.encode(text)
      self.assertEqual(ids.dtype, np.int32)
      self.assertEqual(ids.ndim, 1)
      self.assertNotIn(tokenizer.eos_id, ids)
      self.assertEqual(tokenizer.decode(ids), text)
      self.assertEqual(
        tokenizer.decode([*ids.tolist(), tokenizer.eos_id]), text
      )
    self.assertLess(tokenizer.eos_id, tokenizer.vocab_size)

  def test_bytes(self):
    tokenizer = tokenizer_lib.load_tokenizer("bytes")
    np.testing.assert_array_equal(tokenizer.encode("aé"), [97, 0xC3, 0xA9])
    self.assertEqual((tokenizer.eos_id, tokenizer.vocab_size), (256, 257))
    self.assertEqual(tokenizer.decode([97, 0xC3, 256, 300, 98]), "a\ufffdb")

  @parameterized.parameters(
    # The configuration decides, in either form, even against a known name.
    dict(eos="<end>", config={"eos_token": "<end>"}),
    dict(eos="<end>", config={"eos_token": {"content": "<end>", "id": 1}}),
    dict(eos="<end>", special=False, config={"eos_token": "<end>"}),
    # Without one, or when it is silent, a well-known name does.
    dict(eos="<｜end▁of▁sentence｜>"),
    dict(eos="<|endoftext|>", config={}),
    dict(eos="<eos>", config={"eos_token": None}),
  )
  def test_finds_eos(self, eos, **kwargs):
    path = write_hf(self.folder, eos=eos, **kwargs)
    tokenizer = tokenizer_lib.HfTokenizer(path)
    hf = tokenizers.Tokenizer.from_file(path)
    self.assertEqual(tokenizer.eos_id, hf.token_to_id(eos))
    self.assertEqual(tokenizer.vocab_size, hf.get_vocab_size())
    self.assertGreater(
      tokenizer.vocab_size, hf.get_vocab_size(with_added_tokens=False)
    )

  @parameterized.parameters(True, False)
  def test_a_text_cannot_spell_eos(self, special):
    path = write_hf(self.folder, special=special, config={"eos_token": "</s>"})
    tokenizer = tokenizer_lib.HfTokenizer(path)
    ids = tokenizer.encode("a</s>b")
    self.assertNotIn(tokenizer.eos_id, ids)
    self.assertEqual(tokenizer.decode(ids), "a</s>b")

  @parameterized.parameters(
    dict(eos=None, message="which token ends a document"),
    # An ordinary token with a well-known name may be an accident.
    dict(eos="</s>", special=False, message="which token ends a document"),
    dict(config={"eos_token": "<end>"}, message="'<end>'.* is not in"),
  )
  def test_refuses_to_guess_eos(self, message, **kwargs):
    path = write_hf(self.folder, **kwargs)
    with self.assertRaisesRegex(tokenizer_lib.TokenizerError, message):
      tokenizer_lib.HfTokenizer(path)

  def test_bad_file(self):
    with self.assertRaisesRegex(
      tokenizer_lib.TokenizerError, "'byte' is not a file"
    ):
      tokenizer_lib.load_tokenizer("byte")
    path = pathlib.Path(self.folder, "x.json")
    path.write_text("{}")
    with self.assertRaisesRegex(
      tokenizer_lib.TokenizerError, "not a tokenizer.json"
    ):
      tokenizer_lib.load_tokenizer(str(path))

  def test_missing_package(self):
    with (
      mock.patch.dict(sys.modules, {"tokenizers": None}),
      self.assertRaisesRegex(
        tokenizer_lib.TokenizerError, r"pip install .dsa-jax\[hf\]"
      ),
    ):
      tokenizer_lib.load_tokenizer("tokenizer.json")


if __name__ == "__main__":
  absltest.main()
