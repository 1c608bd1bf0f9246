"""What the tests of whole runs share."""

import jax
import pytest

from tests.train import runs


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
  """A module's runs are alike: a program is compiled once for all of them."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update(
    "jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache"))
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of documents."""
  folder = tmp_path_factory.mktemp("text")
  runs.write_text(folder)
  return folder
