"""What all tests of the data run under."""

import functools

import pytest

from train.data import corpus as corpus_lib
from train.data import stream as stream_lib


@pytest.fixture(autouse=True)
def set_block_tokens(monkeypatch):
  """Sets the size of a block; it is small, so that a test crosses several."""
  set_block_tokens = functools.partial(
    monkeypatch.setattr, corpus_lib, "_BLOCK_TOKENS"
  )
  set_block_tokens(256)
  # Small blocks would read most documents in vain.
  monkeypatch.setattr(stream_lib, "_GROUP", 2)
  return set_block_tokens
