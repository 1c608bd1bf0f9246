"""What a run writes for people to read: it goes on where that fails."""

from collections.abc import Iterator
import contextlib

from train.host import processes


class Output:
  """Something written that training does not hang on.

  That it fails is told once, and again only after it has worked in between.
  """

  def __init__(self, name: str):
    """`name`: what is written, as a person knows it: a file, for example."""
    self._name, self._failing = name, False

  @contextlib.contextmanager
  def attempt(self, *raised: type[Exception]) -> Iterator[None]:
    """Inside, it is written; OSError stays inside, and so do `raised`."""
    try:
      yield
    except (OSError, *raised) as e:
      self._tell(e)
    else:
      self._failing = False

  def _tell(self, e: Exception) -> None:
    if self._failing:
      return
    self._failing = True
    reason = e.strerror if isinstance(e, OSError) and e.strerror else repr(e)
    processes.say(
      f"WARNING: {self._name} could not be written ({reason}); training goes on"
    )
