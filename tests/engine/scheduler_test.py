"""Slots and pages of several groups of devices, without a device."""

from typing import Any

import numpy as np

from dsa_jax.engine import scheduler as scheduler_lib
from dsa_jax.engine import sequence as sequence_lib
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import SamplingParams


def scheduler(**kwargs):
  sizes: dict[str, Any] = dict(
    slots=8, groups=2, pages=64, page_size=4, pages_per_slot=16
  )
  sizes.update(most=4, lookahead=0, shares=True)
  return scheduler_lib.Scheduler(**(sizes | kwargs))


def submit(to, length, n):
  request = Request(np.arange(length), SamplingParams(n=n, max_tokens=20))
  prompt = sequence_lib.Prompt(request, unplaced=n)
  sequences = [sequence_lib.Sequence(prompt, i, None) for i in range(n)]
  to.waiting.extend(sequences)
  return sequences


def cache_all(of) -> int:
  """Caches what is placed; how many tokens that took."""
  tokens = 0
  for sequence in of.placed:
    if sequence is not None and sequence.prefills:
      count = sequence.target - sequence.cached
      of.cached(sequence, count)
      tokens += count
  return tokens


def test_a_group_of_samples_is_one_prefill_on_each_group_of_devices():
  own = scheduler()
  sequences = submit(own, 34, n=8)
  assert not own.place()
  assert [s.slot is not None for s in sequences] == [True] * 2 + [False] * 6
  assert cache_all(own) == 2 * 33
  copies = own.place()
  assert all(s.slot is not None for s in sequences)
  assert cache_all(own) == 0
  # Each but the two has a copy of the ninth page, of its own group.
  assert len(copies) == len({(c.group, c.target) for c in copies}) == 6
  leaders = {s.group: s for s in sequences[:2]}
  for sequence in sequences[2:]:
    leader = leaders[sequence.group]
    assert sequence.pages[:8] == leader.pages[:8]
    assert sequence.pages[8] != leader.pages[8]
  for sequence in sequences:
    own.leave(sequence)
  assert own.available == 2 * 64


def test_samples_wait_for_their_prompt_and_let_others_pass():
  own = scheduler(groups=1, slots=3)
  group, (other,) = submit(own, 30, n=2), submit(own, 9, n=1)
  own.place()
  assert [s.slot for s in (*group, other)] == [0, None, 1]
  cache_all(own)
  own.place()
  assert group[1].slot == 2


def test_one_that_ends_while_it_caches_leaves_it_to_the_next():
  own = scheduler(groups=1)
  first, second = submit(own, 30, n=2)
  own.place()
  own.cached(first, 12)
  own.leave(first)
  own.place()
  assert second.cached == 12 and second.prefills
  cache_all(own)
  own.leave(second)
  assert own.available == 64


def test_nobody_gets_a_slot_that_the_next_call_would_take_again():
  own = scheduler(groups=1, pages=16)
  sequences = [submit(own, 13, n=1)[0] for _ in range(8)]
  own.place()
  cache_all(own)
  own.reserve()
  placed = sum(s.slot is not None for s in sequences)
  assert own.preemptions == 0
  assert 1 < placed < 8
