"""What programs gave, read a call late and told to the sequences.

Letters: A pages, L layers (Lmoe with experts), J experts a token, G groups.
"""

import collections
import dataclasses
from typing import Any

import jax
import numpy as np

from dsa_jax.engine import programs
from dsa_jax.engine import request as request_lib
from dsa_jax.engine import sampling
from dsa_jax.engine import scheduler as scheduler_lib
from dsa_jax.engine.sequence import Sequence


@dataclasses.dataclass(eq=False)
class Part:
  """A row of a prefill call."""

  row: int
  sequence: Sequence
  group: int
  """Of the pages: the sequence may be in another one when this is read."""
  pages: list[int]
  offset: int
  count: int


@dataclasses.dataclass(eq=False)
class Prefill:
  """A prefill call that was launched."""

  parts: list[Part]
  given: programs.Prefilled


@dataclasses.dataclass(eq=False)
class Decode:
  """A decode call that was launched."""

  sequences: list[tuple[int, Sequence]]
  """With their slots."""
  most: int
  """The most tokens that each may have got."""
  version: int
  given: programs.Decoded


@dataclasses.dataclass(kw_only=True)
class Counts:
  """What an engine has done so far."""

  prefill_tokens: int = 0
  """Tokens that were cached before their sequences decode."""
  decoded_tokens: int = 0
  """Tokens that were sampled."""
  calls: int = 0
  """Calls of the decoding program,"""
  steps: int = 0
  """and its steps, of a token for each slot, or two where a draft was right."""
  drafts: int = 0
  """Tokens that MTP drafted, and were verified;"""
  accepted: int = 0
  """and those that were right."""
  finished: int = 0
  """Sequences that ended."""


@dataclasses.dataclass(kw_only=True)
class Stats(Counts):
  """What an engine has done so far, and what it has to do."""

  found_tokens: int
  """Tokens that had been cached already when their sequences got a slot."""
  preemptions: int
  """Times that a sequence lost its slot: others needed its pages, or the
  weights changed."""
  waiting: int
  """Sequences without a slot."""
  running: int
  """Sequences with one."""
  free_pages: int
  """Pages that nobody holds; some may still be found by their contents."""


class Results:
  """Calls on their way, in the order in which they were launched.

  Attributes:
    counts: What has been done so far.
    launches: Calls so far.
  """

  counts: Counts
  launches: int

  def __init__(
    self,
    scheduler: scheduler_lib.Scheduler,
    experts: np.ndarray | None,
    page_size: int,
  ):
    """Begins without calls.

    Args:
      scheduler: Is told what ends, and what is cached.
      experts: Room for those of the cached tokens, [G, A, page, Lmoe, J]; None
        if they are not asked for.
      page_size: Tokens of a page.
    """
    self.counts = Counts()
    self.launches = 0
    self._scheduler = scheduler
    self._experts = experts
    self._size = page_size
    self._calls: collections.deque[Any] = collections.deque()

  def launched(self, call: Prefill | Decode | scheduler_lib.Copy) -> None:
    """Takes a call; its results begin to travel."""
    if not isinstance(call, scheduler_lib.Copy):
      for x in jax.tree.leaves(call.given):
        x.copy_to_host_async()
    self._calls.append(call)
    self.launches += 1

  def read(self, but: int = 0) -> None:
    """Waits for all calls but the last few, and reads their results."""
    while len(self._calls) > but:
      if not isinstance(self._calls[0], scheduler_lib.Copy):
        # Who interrupts this finds the call here again.
        jax.block_until_ready(self._calls[0].given)
      match self._calls.popleft():
        case Decode() as call:
          self._read_decode(call)
        case Prefill() as call:
          self._read_prefill(call)
        case scheduler_lib.Copy() as call if self._experts is not None:
          pages = self._experts[call.group]
          pages[call.target] = pages[call.source]

  def _read_prefill(self, call: Prefill) -> None:
    given = jax.device_get(call.given)
    for part in call.parts:
      sequence, at = part.sequence, slice(part.offset, part.offset + part.count)
      if (log_probs := sequence.prompt.log_probs) is not None:
        if given.log_probs is not None:
          room = log_probs[at]
          room[:] = given.log_probs[part.row, : len(room)]
      if self._experts is not None:
        place = np.arange(at.start, at.stop)
        page = np.asarray(part.pages)[place // self._size]
        of_row = given.experts[:, part.row, : part.count].swapaxes(0, 1)
        self._experts[part.group][page, place % self._size] = of_row
      if given.selected is not None and len(sequence.selected) == at.start:
        of_row = given.selected[:, part.row, : part.count]
        sequence.selected.extend(of_row.swapaxes(0, 1).copy())

  def _read_decode(self, call: Decode) -> None:
    given = jax.device_get(call.given)
    tokens = np.asarray(given.tokens)
    self.counts.calls += 1
    self.counts.steps += int((tokens >= 0).any((1, 2)).sum())
    for slot, sequence in call.sequences:
      count = 0
      for i, t in np.argwhere(tokens[:, slot] >= 0).tolist():
        count += 1
        if sequence.finish is None:
          self._take(sequence, given, i, slot, t, call.version)
      sequence.bound -= call.most - count
      self.counts.drafts += int(given.drafted[:, slot].sum())
      self.counts.accepted += int((tokens[:, slot, 1:] >= 0).sum())
      if sequence.finish is None:
        self._scheduler.grew(sequence)

  def _take(self, sequence, given, i, slot, t, version) -> None:
    """Takes a token, and ends the sequence if that does."""
    params = sequence.prompt.request.params
    token = int(given.tokens[i, slot, t])
    sequence.tokens.append(token)
    sequence.log_probs.append(given.log_probs[i, slot, t])
    sequence.untruncated.append(given.untruncated[i, slot, t])
    sequence.versions.append(version)
    if given.kept is not None and params.cuts:
      sequence.kept.append(given.kept[i, slot, t].copy())
    if self._experts is not None:
      of_fed = given.experts[i, :, slot, t].copy()
      sequence.experts.append(of_fed)
      at = len(sequence.prompt.request.tokens) + len(sequence.tokens) - 2
      page = sequence.pages[at // self._size]
      self._experts[sequence.group][page, at % self._size] = of_fed
    if given.selected is not None:
      sequence.selected.append(given.selected[i, :, slot, t].copy())
    self.counts.decoded_tokens += 1
    stopped = token in params.stop_ids
    if sequence.stream is not None and not stopped:
      sequence.text.append(sequence.stream.push([token]))
      stopped = sequence.stream.stopped
    if stopped or len(sequence.tokens) == params.max_tokens:
      self.end(sequence, "stop" if stopped else "length")

  def end(self, sequence: Sequence, finish: request_lib.Finish) -> None:
    """Ends a sequence; its slot is free, and its pages are others'."""
    if self._experts is not None and sequence.pages:
      place = np.arange(len(sequence.prompt.request.tokens) - 1)
      page = np.asarray(sequence.pages)[place // self._size]
      group = sequence.group
      of_prompt = self._experts[group][page, place % self._size]
      sequence.experts = [*of_prompt, *sequence.experts]
    if sequence.stream is not None:
      sequence.text.append(sequence.stream.finish())
    sequence.finish = finish
    self._scheduler.leave(sequence)
    self.counts.finished += 1


def result(sequence: Sequence) -> request_lib.Result:
  """What a sequence that has ended gave."""
  request, prompt = sequence.prompt.request, sequence.prompt
  assert sequence.finish is not None  # it has ended
  ragged = sequence.finish == "cancelled"  # maybe before its prompt was cached

  def stacked(rows):
    return np.stack(rows) if rows and not ragged else None

  of_prompt = None if ragged else prompt.log_probs

  kept = stacked(sequence.kept)
  return request_lib.Result(
    prompt=request.tokens,
    tokens=np.asarray(sequence.tokens, np.int32),
    text=None if sequence.stream is None else "".join(sequence.text),
    log_probs=np.asarray(sequence.log_probs, np.float32),
    untruncated=np.asarray(sequence.untruncated, np.float32),
    finish=sequence.finish,
    versions=np.asarray(sequence.versions, np.int32),
    cached_tokens=sequence.found or 0,
    # Its own: the array of all samples is written to again if weights change.
    prompt_log_probs=None if of_prompt is None else of_prompt.copy(),
    kept=None if kept is None else sampling.kept_ids(kept),
    experts=stacked(sequence.experts),
    selected=stacked(sequence.selected),
    preemptions=sequence.preemptions,
  )
