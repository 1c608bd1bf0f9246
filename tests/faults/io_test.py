"""Whichever call fails, a run goes on, or ends with a line and resumes."""

import pytest

from tests.faults import failing_calls
from tests.faults import io


@pytest.mark.slow
def test_failing_calls_cost_nothing(tmp_path):
  try:
    failing_calls.variables(tmp_path)
  except RuntimeError as e:
    pytest.skip(str(e))
  assert io.prove(tmp_path, places=8, seed=0) == []
