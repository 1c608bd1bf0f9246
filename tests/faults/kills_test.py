"""A run that was killed comes to the same as one that was not."""

import pytest

from tests.faults import kills


@pytest.mark.long
def test_a_killed_run_comes_to_the_same(tmp_path):
  tally = kills.prove(
    tmp_path, kills=2, seed=0, processes=1, stages=("pretrain",)
  )
  assert tally.failures == []
  assert tally.kills == 2
  assert tally.attempts > tally.runs  # something was gone on with
