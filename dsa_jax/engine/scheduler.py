"""Who has which slot and which pages: decisions of the host, without a device.

They depend on what was submitted and on results alone, never on a clock, so
that all processes of a mesh decide alike.
"""

import collections
import dataclasses

from jaxtyping import Int32
import numpy as np

from dsa_jax.engine import pages as pages_lib
from dsa_jax.engine import sequence as sequence_lib
from dsa_jax.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Copy:
  """A page whose rows another one gets, too."""

  group: int
  source: int
  target: int


class Scheduler:
  """Places sequences, oldest first.

  Slots and pages come in groups, one for each device (or group of devices) that
  has rows of a batch of its own.

  Attributes:
    waiting: Sequences without a slot, in the order in which they get one.
    placed: The sequence of each slot.
    table: Pages of each slot; the device is given copies.
    preemptions: Times that a sequence lost its slot.
    found: Tokens that sequences found in the cache as they were placed.
  """

  waiting: collections.deque[Sequence]
  placed: list[Sequence | None]
  table: Int32[np.ndarray, "B P"]
  preemptions: int
  found: int

  def __init__(
    self,
    *,
    slots: int,
    groups: int,
    pages: int,
    page_size: int,
    pages_per_slot: int,
    most: int,
    lookahead: int,
    shares: bool,
  ):
    """Makes empty slots.

    Args:
      slots: B, a multiple of the groups.
      groups: Groups of slots and pages.
      pages: Pages of each group.
      page_size: Tokens of a page.
      pages_per_slot: P.
      most: The most tokens that a program caches for each that decodes.
      lookahead: See `pages.Pages`.
      shares: Whether sequences that begin alike share pages.
    """
    self.waiting = collections.deque()
    self.placed = [None] * slots
    self.table = np.zeros((slots, pages_per_slot), np.int32)
    self.preemptions = self.found = 0
    self._size, self._most = page_size, most
    self._per_group = slots // groups
    self._pages = [
      pages_lib.Pages(pages, page_size, lookahead=lookahead)
      for _ in range(groups)
    ]
    self._shares = shares
    self._order = 0  # of placements
    self._placed_at: dict[Sequence, int] = {}

  @property
  def available(self) -> int:
    """Pages that can be allocated now."""
    return sum(pages.available for pages in self._pages)

  def of_group(self, group: int) -> list[Sequence]:
    """Those placed in a group, oldest placement first."""
    first = group * self._per_group
    slots = self.placed[first : first + self._per_group]
    return sorted(
      (s for s in slots if s is not None), key=self._placed_at.__getitem__
    )

  def place(self) -> list[Copy]:
    """Gives slots and pages to those waiting, as far as there are some.

    Returns:
      Pages to copy before anything else is done.
    """
    copies: list[Copy] = []
    for sequence in list(self.waiting):
      placed = self._place(sequence, copies)
      if placed:
        self.waiting.remove(sequence)
      elif placed is not None:
        break
    return copies

  def _place(self, sequence: Sequence, copies: list[Copy]) -> bool | None:
    """Whether there was a slot; None if its prompt is being cached."""
    prompt, begins, is_led = sequence.prompt, not sequence.tokens, False
    for group in self._groups(prompt):
      if begins and group in prompt.leaders:
        is_led = True
        continue
      trunk = prompt.trunks.get(group) if begins else None
      if self._fill(sequence, group, trunk, copies):
        self._count_placed(sequence, sequence.cached)
        leads = begins and sequence.prefills and prompt.unplaced
        if leads and self._shares:
          prompt.leaders[group] = sequence
        return True
    return None if is_led else False

  def _count_placed(self, sequence: Sequence, found: int) -> None:
    """Notes that a sequence needs its prompt's trunk no more."""
    prompt = sequence.prompt
    if sequence.found is None:
      sequence.found = found
      prompt.unplaced -= 1
    if not prompt.unplaced:
      self.drop_trunks(prompt)

  def _groups(self, prompt: sequence_lib.Prompt) -> list[int]:
    """Groups with a free slot: those that have the prompt, then by their free
    pages."""
    with_room = [
      group
      for group in range(len(self._pages))
      if len(self.of_group(group)) < self._per_group
    ]
    return sorted(
      with_room,
      key=lambda g: (g not in prompt.trunks, -self._pages[g].available, g),
    )

  def _fill(self, sequence, group, trunk, copies) -> bool:
    """Takes a slot and pages of a group, if it has enough."""
    pages, known = self._pages[group], sequence.known
    target = len(known) - 1
    if trunk is not None:
      shared = trunk[: target // self._size]
      pages.hold(shared)
    elif self._shares and self._may_find(sequence):
      shared = pages.find(known, target)
    else:
      shared = []
    of_group = self.of_group(group)
    # Room for a call of the decoding program, too, its own and that of each of
    # those that run, lest one of them lose its slot at once.
    room = min(target + self._most, sequence.most_rows)
    wanted = self._pages_for(room) - len(shared)
    spare = self._pages_for(self._most) * len(of_group)
    if pages.available < wanted + spare:
      pages.release(shared)
      return False
    own = pages.allocate(self._pages_for(target + 1) - len(shared))
    assert own is not None  # there are as many
    first = group * self._per_group
    slot = self.placed.index(None, first)
    self.placed[slot] = sequence
    self._order += 1
    self._placed_at[sequence] = self._order
    sequence.slot, sequence.group = slot, group
    sequence.pages = shared + own
    sequence.target, sequence.decodes = target, False
    sequence.cached = len(shared) * self._size
    if trunk is not None:
      if target % self._size:  # the page that each sample continues
        copies.append(Copy(group, trunk[len(shared)], own[0]))
      sequence.cached = target
    self.found += sequence.cached
    sequence.bound = target
    sequence.registered = len(shared)
    self._tabulate(sequence)
    return True

  def _pages_for(self, rows: int) -> int:
    return -(-rows // self._size)

  def _may_find(self, sequence) -> bool:
    """Whether it may use what is cached: log-probs need the whole prompt."""
    log_probs = sequence.prompt.log_probs
    return log_probs is None or not np.isnan(log_probs).any()

  def _tabulate(self, sequence):
    row = self.table[sequence.slot]
    row[: len(sequence.pages)] = sequence.pages
    row[len(sequence.pages) :] = 0

  def cached(self, sequence: Sequence, count: int) -> None:
    """Notes that a program caches so many more of a sequence's tokens."""
    sequence.cached += count
    self._register(sequence, sequence.cached)
    prompt, group = sequence.prompt, sequence.group
    if prompt.leaders.get(group) is sequence and not sequence.prefills:
      del prompt.leaders[group]
      trunk = sequence.pages[: self._pages_for(sequence.target)]
      self._pages[group].hold(trunk)
      prompt.trunks[group] = trunk

  def _register(self, sequence, rows: int) -> None:
    full = rows // self._size
    if self._shares and full > sequence.registered:
      pages = self._pages[sequence.group]
      known = sequence.known[: full * self._size + 1]
      first = sequence.registered
      pages.register(known, sequence.pages[:full], first)
      sequence.registered = full

  def grew(self, sequence: Sequence) -> None:
    """Notes that tokens of a sequence have been read: all but the last are
    cached."""
    if sequence.slot is not None and not sequence.prefills:
      self._register(sequence, sequence.length - 1)

  def reserve(self) -> None:
    """Gives those that decode room for a call; the youngest may lose their
    slots for it."""
    for group, pages in enumerate(self._pages):
      for sequence in self.of_group(group):
        while sequence.slot is not None and not sequence.prefills:
          rows = min(sequence.bound + self._most, sequence.most_rows)
          needed = self._pages_for(rows) - len(sequence.pages)
          if needed <= 0:
            break
          if (new := pages.allocate(needed)) is not None:
            sequence.pages = sequence.pages + new
            self._tabulate(sequence)
            break
          if not self._drop_a_trunk(group):
            self.preempt(self.of_group(group)[-1])

  def _drop_a_trunk(self, group: int) -> bool:
    for sequence in self.waiting:
      trunk = sequence.prompt.trunks.pop(group, None)
      if trunk is not None:
        self._pages[group].release(trunk)
        return True
    return False

  def unblock(self) -> bool:
    """Releases a trunk where nobody is placed and nobody can be."""
    return any(self._drop_a_trunk(group) for group in range(len(self._pages)))

  def drop_trunks(self, prompt: sequence_lib.Prompt) -> None:
    """Releases a prompt's pages; other samples of it find them, or cache it
    anew."""
    for group, trunk in prompt.trunks.items():
      self._pages[group].release(trunk)
    prompt.trunks.clear()
    prompt.leaders.clear()

  def preempt(self, sequence: Sequence) -> None:
    """Takes a sequence's slot; it is the first to get one again."""
    self.leave(sequence)
    sequence.preemptions += 1
    self.preemptions += 1
    self.waiting.appendleft(sequence)

  def leave(self, sequence: Sequence) -> None:
    """Takes a sequence from its slot, or from those waiting."""
    leaders = sequence.prompt.leaders
    if leaders.get(sequence.group) is sequence:
      del leaders[sequence.group]
    if sequence.slot is None:
      if sequence in self.waiting:
        self.waiting.remove(sequence)
    else:
      self.grew(sequence)
      self._pages[sequence.group].release(sequence.pages)
      self.placed[sequence.slot] = None
      del self._placed_at[sequence]
      sequence.slot, sequence.decodes = None, False
    self._count_placed(sequence, 0)

  def forget(self) -> None:
    """Lets nobody use what has been cached: the weights change."""
    for prompt in dict.fromkeys(s.prompt for s in self.waiting):
      self.drop_trunks(prompt)
    for sequence in sorted(
      (s for s in self.placed if s is not None),
      key=self._placed_at.__getitem__,
      reverse=True,
    ):
      self.drop_trunks(sequence.prompt)
      self.preempt(sequence)
    for pages in self._pages:
      pages.forget()

  def decoding(self) -> list[tuple[int, Sequence]]:
    """Slots whose sequences' prompts are cached, with these."""
    return [
      (slot, sequence)
      for slot, sequence in enumerate(self.placed)
      if sequence is not None and not sequence.prefills
    ]
