"""What differs between two runs, and how attempts may not end, is found."""

import json

import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from tests.faults import comparison
from tests.faults import kills

LINES = [
  {"step": 1, "kind": "train", "loss": 2.0, "ms_per_step": 7.0},
  {"step": 2, "kind": "train", "loss": float("nan"), "ms_per_step": 9.0},
  {"step": 2, "kind": "eval", "dense": 1.5},
]


def write_run(folder, lines=LINES, weight=1.0, place=4, step=2):
  folder.mkdir()
  config = {"stages": [{"steps": 1}, {"steps": 1}]}
  (folder / "config.json").write_text(json.dumps(config))
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  for number, last in ((1, 1.0), (step, weight)):
    ocp.save_checkpointables(
      str(folder / "checkpoints" / str(number)),
      {"state": {"params": {"a": np.array([0.0, last], np.float32)}}},
      custom_metadata={
        "progress": json.dumps(
          {"data": {"dealt": place}, "owes_evaluation": False}
        )
      },
    )
  return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp("runs") / "unbroken")


def test_equal_runs_have_no_differences(tmp_path, unbroken):
  later = [line | {"ms_per_step": 1.0} for line in LINES[:2]] + LINES[2:]
  assert (
    comparison.differences(write_run(tmp_path / "a", later), unbroken) == []
  )


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    # The smallest change that float32 knows.
    (dict(weight=np.nextafter(np.float32(1), np.float32(2))), "'a'] differs"),
    (dict(place=5), "the progress differs"),
    (dict(step=3), "checkpoint 2 is missing"),
    (dict(lines=LINES + LINES[:1]), "2 train lines of step 1, not 1"),
    (dict(lines=LINES[:2]), "0 eval lines of step 2, not 1"),
    (dict(lines=[*LINES, LINES[2] | {"step": 3}]), "3 should not be there"),
    (dict(lines=[LINES[0] | {"loss": 2.5}, *LINES[1:]]), "train of step 1"),
  ],
)
def test_finds(tmp_path, unbroken, changes, says):
  found = comparison.differences(write_run(tmp_path / "b", **changes), unbroken)
  assert found and all(says in text for text in found)


@pytest.mark.parametrize(
  ("batches", "wrong"),
  [("cd", False), ("", False), ("bc", True), ("ce", True), ("cdef", True)],
)
def test_batches_follow_the_newest_checkpoint(batches, wrong):
  said = kills.check_batches([(x,) for x in batches], [*zip("abcde")], 2)
  assert bool(said) == wrong


@pytest.mark.parametrize(
  ("codes", "sent", "victims", "wrong"),
  [
    ([-9], "SIGKILL", [0], False),
    ([-15], "SIGTERM", [0], False),  # it was still starting
    ([0], "SIGTERM", [0], False),
    ([0, 0], "SIGTERM", [1], False),
    ([1, -9], "SIGKILL", [1], False),
    ([0, 0], "", [], False),
    ([1], "", [], True),
    ([1], "SIGKILL", [0], True),
    ([-9], "SIGTERM", [0], True),  # it did not stop in time
    ([0, -9], "SIGTERM", [0], True),  # the other did not stop with it
    ([0, 1], "SIGTERM", [0], True),
  ],
)
def test_an_attempt_ends_by_its_kill_alone(codes, sent, victims, wrong):
  assert bool(kills.check_end(codes, sent, victims)) == wrong
