"""Of two programs that are started on one run's folder, one trains."""

import pytest

from tests.faults import owners


@pytest.mark.slow
def test_one_of_two_programs_trains(tmp_path):
  assert owners.prove(tmp_path, times=3) == []
