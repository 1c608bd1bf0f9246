"""Events are there to be read; that they cannot be written costs nothing."""

import gc
import pathlib
import struct

import pytest
from tensorboardX import event_file_writer

from train.run import tensorboard


def events(folder):
  """All events, in order, of files that may end in the middle of one."""
  found = []
  for file in sorted(folder.iterdir()):
    content = file.read_bytes()
    while len(content) >= 12:
      (size,) = struct.unpack("<Q", content[:8])
      if len(content) < 16 + size:
        break
      event = tensorboard._PROTO.Event()
      event.ParseFromString(content[12 : 12 + size])
      found.append(event)
      content = content[16 + size :]
  return found


def values(folder):
  return [
    (x.step, value.tag) for x in events(folder) for value in x.summary.value
  ]


def test_numbers_and_texts_are_events(tmp_path):
  board = tensorboard.Board(tmp_path / "board", first_step=3)
  text = "a\ud800\0b"  # what a model may write
  board.write(3, "train", {"loss": 1.5, "stage": "sparse", "none": None})
  board.write(4, "sample", {"text": text})
  board.close()
  assert values(tmp_path / "board") == [
    *((3, "train/loss"), (3, "train/stage/text_summary")),
    (4, "sample/text/text_summary"),
  ]
  start = [x.step for x in events(tmp_path / "board") if x.session_log.status]
  assert start == [3]  # what was there of later steps is hidden


# The library leaves a file open that it could not write.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_loses_events_and_nothing_else(
  tmp_path, monkeypatch, capsys
):
  board = tensorboard.Board(tmp_path / "board", first_step=1)
  board.write(1, "train", {"loss": 1.0})

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(tensorboard, "_PAUSE_SECONDS", 0)
  with monkeypatch.context() as patch:
    patch.setattr(event_file_writer.EventsWriter, "write_event", full)
    for step in range(2, 40):  # more than any queue holds
      board.write(step, "train", {"loss": 1.0})
  board.write(40, "train", {"loss": 1.0})
  board.close()
  gc.collect()
  assert (40, "train/loss") in values(tmp_path / "board")
  assert capsys.readouterr().out.count("No space left") == 1


def test_each_attempt_has_a_file_of_its_own(tmp_path):
  for step in (1, 2, 1):  # within one second
    board = tensorboard.Board(tmp_path / "board", first_step=step)
    board.write(step, "train", {"loss": 1.0})
    board.close()
  assert [step for step, _ in values(tmp_path / "board")] == [1, 2, 1]
  assert len(list(pathlib.Path(tmp_path / "board").iterdir())) == 3
