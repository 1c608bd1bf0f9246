"""What the tests of whole runs share."""

import pytest

from tests.train import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of documents."""
  folder = tmp_path_factory.mktemp("text")
  runs.write_text(folder)
  return folder
