"""TensorBoard's event files, written where they are asked for: in no thread.

A thread of the library would die of a full disk, and the loop wait for it.
"""

import itertools
import pathlib
import time
from typing import Any, Final

from tensorboardX import event_file_writer
from tensorboardX import summary
from tensorboardX.proto import event_pb2

from train.host import outputs
from train.host import processes

_FLUSH_SECONDS: Final = 120
_PAUSE_SECONDS: Final = 60
# Made by protoc, which leaves nothing for a type checker to see.
_PROTO: Any = event_pb2
# Files of one second have one name, but for this.
_numbers = itertools.count()


class Board:
  """Numbers and texts, in a folder of event files.

  That a file cannot be written is told, and another one begun after a while;
  what comes meanwhile is in metrics.jsonl alone.
  """

  def __init__(self, folder: pathlib.Path, first_step: int):
    """Hides what the folder has of `first_step` and later."""
    self._folder, self._first = folder, first_step
    self._output = outputs.Output(str(folder))
    self._file: event_file_writer.EventsWriter | None = None
    self._flushed = self._again = time.monotonic()

  def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    """Adds what was measured after `step`, see `metrics.Writer.write`."""
    shown = [
      summary.scalar(f"{kind}/{name}", value)
      if isinstance(value, (int, float))
      else summary.text(f"{kind}/{name}", processes.visible(str(value)))
      for name, value in values.items()
      if value is not None
    ]
    if time.monotonic() < self._again:
      return
    with self._output.attempt():
      try:
        if self._file is None:
          self._file = self._open()
        for each in shown:
          self._add(self._file, step=step, summary=each)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
          self._flushed = time.monotonic()
          self._file.flush()
      except OSError:  # what comes after half a record is not read
        self._file = None
        self._again = time.monotonic() + _PAUSE_SECONDS
        raise

  def close(self) -> None:
    if self._file is not None:
      with self._output.attempt():
        self._file.close()

  def _open(self) -> event_file_writer.EventsWriter:
    self._folder.mkdir(parents=True, exist_ok=True)
    file = event_file_writer.EventsWriter(
      str(self._folder / "events"), f".{next(_numbers)}"
    )
    start = _PROTO.SessionLog.START
    log = _PROTO.SessionLog(status=start)
    self._add(file, step=self._first, session_log=log)
    return file

  def _add(self, file: event_file_writer.EventsWriter, **values: Any) -> None:
    file.write_event(_PROTO.Event(wall_time=time.time(), **values))
