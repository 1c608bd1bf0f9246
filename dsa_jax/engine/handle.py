"""A request that was submitted: its samples, whole or as they come."""

from collections.abc import Iterator
import dataclasses
from typing import Protocol, runtime_checkable

from dsa_jax.engine import results as results_lib
from dsa_jax.engine.request import Result
from dsa_jax.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Delta:
  """What came of a sample since it was last looked at."""

  tokens: list[int]
  text: str
  """Empty without a tokenizer."""


@runtime_checkable
class _Engine(Protocol):
  """What runs the samples."""

  def step(self) -> bool: ...

  def cancel(self, handle: "Handle") -> None: ...


class Handle:
  """A request that was submitted.

  Attributes:
    sequences: Its samples on their way.
  """

  sequences: list[Sequence]

  def __init__(self, engine: _Engine, sequences: list[Sequence]):
    self._engine = engine
    self.sequences = sequences

  @property
  def done(self) -> bool:
    """Whether all of its samples have ended."""
    return all(s.finish is not None for s in self.sequences)

  def results(self) -> list[Result]:
    """Its samples; runs the engine until they are there."""
    while not self.done:
      self._engine.step()
    return [results_lib.result(s) for s in self.sequences]

  def stream(self, sample: int = 0) -> Iterator[Delta]:
    """A sample, piece by piece; runs the engine between them.

    Raises:
      ValueError: There is no such sample.
    """
    if not 0 <= sample < len(self.sequences):
      raise ValueError(
        f"Handle.stream: {sample=} of {len(self.sequences)}, from 0."
      )
    return self._pieces(self.sequences[sample])

  def _pieces(self, sequence: Sequence) -> Iterator[Delta]:
    tokens, texts = 0, 0
    while True:
      # Others may run the engine while this waits: what is new comes first.
      ended = sequence.finish is not None
      new = sequence.tokens[tokens:], "".join(sequence.text[texts:])
      tokens, texts = len(sequence.tokens), len(sequence.text)
      if any(new):
        yield Delta(*new)
      if ended:
        return
      if sequence.finish is None:
        self._engine.step()

  def cancel(self) -> None:
    """Ends what has not ended yet; its slots and pages are free."""
    self._engine.cancel(self)
