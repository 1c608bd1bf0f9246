"""Pages against a model that remembers every page's contents."""

import inspect
import random

import numpy as np
import pytest

from dsa_jax.engine import pages as pages_lib

SIZE = 4


def tokens(*ids):
  return np.array(ids, np.int32)


def take(pages, count) -> list[int]:
  new = pages.allocate(count)
  assert new is not None
  return new


def prefill(pages, ids):
  """As the engine does: what is found, what is new, and their number."""
  found = pages.find(ids, len(ids) - 1)
  new = take(pages, -(-len(ids) // pages.size) - len(found))
  pages.register(ids, found + new, len(found))
  return found + new, len(found)


def test_a_prefix_is_found_again():
  pages = pages_lib.Pages(8, SIZE)
  ids = np.arange(10)
  first, found = prefill(pages, ids)
  assert (found, pages.available) == (0, 5)
  # Held or not, the two full pages are found, and only these.
  second, found = prefill(pages, ids)
  assert (second[:2], found, pages.available) == (first[:2], 2, 4)
  assert second[2] != first[2]
  pages.release(first)
  pages.release(second)
  assert pages.available == 8
  third, found = prefill(pages, [*range(8), 1, 1, 1])
  assert (third[:2], found) == (first[:2], 2)
  # Another first token is another sequence, although the second page is alike.
  assert pages.find([9, *range(1, 8)], 8) == []
  assert pages.find([*range(4), 9, *range(5, 8)], 8) == first[:1]


@pytest.mark.parametrize(
  "limit, found", [(-1, 0), (0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (99, 2)]
)
def test_at_most_the_limit_is_found(limit, found):
  """One token of a prompt must be left to compute."""
  pages = pages_lib.Pages(4, SIZE)
  mine, _ = prefill(pages, np.arange(9))
  assert pages.find(list(range(9)), limit) == mine[:found]


def test_the_next_token_counts_with_lookahead():
  pages = pages_lib.Pages(8, SIZE, lookahead=1)
  mine, _ = prefill(pages, np.arange(8))
  # The token after the second page is not known: neither found nor registered.
  assert pages.find(np.arange(9), 9) == mine[:1]
  pages.register(np.arange(9), mine, 1)
  assert pages.find(np.arange(8), 8) == mine[:1]
  assert pages.find(np.arange(9), 9) == mine
  assert pages.find(np.arange(9), 8) == mine
  # The same tokens, but another one follows the second page, or the first.
  assert pages.find(tokens(*range(8), 99), 9) == mine[:1]
  assert pages.find(tokens(0, 1, 2, 3, 99, 5, 6, 7, 8), 9) == []
  other = take(pages, 1)
  pages.register(tokens(*range(8), 99), [mine[0], *other], 1)
  assert pages.find(tokens(*range(8), 99), 9) == [mine[0], *other]


def test_pages_are_registered_one_by_one():
  pages = pages_lib.Pages(4, SIZE)
  ids, mine = list(range(16)), take(pages, 4)
  for n in range(17):
    pages.register(ids[:n], mine[: -(-n // SIZE)], max(0, n // SIZE - 1))
    found = pages.find(ids, 16)
    assert found == mine[: n // SIZE]
    pages.release(found)


def test_of_two_alike_the_first_is_found():
  pages = pages_lib.Pages(8, SIZE)
  ids = np.arange(12)
  a, b = take(pages, 2), take(pages, 3)
  pages.register(ids[:8], a, 0)
  pages.register(ids, b, 0)
  assert pages.find(ids, 12) == [*a, b[2]]  # the first's, and what follows
  pages.release([*a, b[2]])
  pages.release(b)
  assert pages.available == 6  # b's first two are free, its last is cached
  assert pages.find(ids, 12) == [*a, b[2]]


def test_a_page_that_is_taken_takes_those_after_it():
  """Another's page follows it, which is held: it is not found for what is then
  in its parent's place, and becomes free when it is released."""
  pages = pages_lib.Pages(6, SIZE)
  ids = np.arange(16)
  a, b = take(pages, 1), take(pages, 4)
  pages.register(ids[:4], a, 0)
  pages.register(ids[:8], b, 0)  # b[1] comes after a's page
  pages.release(a)
  other = take(pages, 2)
  assert a[0] in other
  assert pages.find(ids, 16) == []
  for first in (1, 2):  # after what cannot be found
    pages.register(ids[:12], b, first)
  assert pages.find(ids, 16) == []
  # Nor with another's page in the same place, until it says so.
  pages.register(ids[:4], other, 0)
  assert pages.find(ids, 16) == other[:1]
  pages.register(ids, b, 0)
  assert pages.find(ids, 16) == [other[0], *b[1:]]
  pages.release([other[0], *b[1:]])
  pages.release([other[0], *other, *b])
  assert pages.available == 6
  assert len(set(take(pages, 6))) == 6


def test_the_least_recently_used_is_taken_first():
  pages = pages_lib.Pages(6, SIZE)
  sequences = [np.arange(8) + 100 * i for i in range(3)]
  held = [prefill(pages, ids)[0] for ids in sequences]
  for mine in held:
    pages.release(mine)
  pages.release(pages.find(sequences[0], 8))  # used again
  # Of the second, the end goes before the beginning.
  assert pages.allocate(1) == held[1][1:]
  assert pages.allocate(2) == [held[1][0], held[2][1]]
  assert pages.find(sequences[1], 8) == []
  assert pages.find(sequences[2], 8) == held[2][:1]
  assert pages.find(sequences[0], 8) == held[0]


def test_nothing_changes_if_there_are_too_few():
  pages = pages_lib.Pages(4, SIZE)
  mine, _ = prefill(pages, np.arange(8))
  pages.release(mine)
  held = take(pages, 1)
  assert pages.allocate(4) is None
  assert pages.allocate(0) == []
  assert pages.available == 3
  assert pages.find(np.arange(8), 8) == mine
  pages.release(held + mine)
  assert pages.allocate(5) is None
  assert len(set(take(pages, 4))) == 4


def test_what_is_forgotten_is_not_found():
  pages = pages_lib.Pages(12, SIZE)
  ids = np.arange(16)
  cached, _ = prefill(pages, ids + 50)
  pages.release(cached)
  old, _ = prefill(pages, ids[:8])
  pages.forget()
  assert pages.available == 10
  assert pages.find(ids, 16) == []
  assert pages.find(ids + 50, 16) == []
  # Its sequence goes on: what it computes now depends on the old pages.
  old += take(pages, 1)
  pages.register(ids[:12], old, 2)
  assert pages.find(ids, 16) == []
  pages.register(ids[:12], old, 0)
  assert pages.find(ids, 16) == []
  # Not even when another has computed the same beginning anew.
  new = take(pages, 2)
  pages.register(ids[:8], new, 0)
  pages.register(ids[:12], old, 2)
  pages.register(ids[:12], old, 0)
  assert pages.find(ids, 16) == new
  pages.release(new + new + old)
  assert pages.available == 12
  # A page that was released is as good as any.
  again = take(pages, 12)
  pages.register(np.arange(48) + 200, again, 0)
  assert pages.find(np.arange(48) + 200, 48) == again


def test_errors_of_the_holder():
  pages = pages_lib.Pages(4, SIZE)
  mine = take(pages, 2)
  pages.release(mine[:1])
  for page in (mine[0], 3, -1, 4):
    for call in (pages.hold, pages.release):
      with pytest.raises(ValueError, match=rf"nobody holds page={page} of 4"):
        call([page])
    with pytest.raises(ValueError, match="register: nobody holds"):
      pages.register(np.arange(8), [mine[1], page], 0)
  assert pages.find(np.arange(8), 8) == []
  assert pages.available == 3
  for count in (-1, 1.0, True):
    with pytest.raises(ValueError, match="count="):
      inspect.unwrap(pages_lib.Pages.allocate)(pages, count)
  for args in ((0, 4, 0), (4, 0, 0), (4, 4, 2), (4, 4, -1)):
    with pytest.raises(ValueError, match="Pages: "):
      pages_lib.Pages(*args[:2], lookahead=args[2])


class Model:
  """Who holds which page, and what was written there, by which weights."""

  def __init__(self, pages):
    self.pages = pages
    self.sequences = []  # [tokens, pages, version when it began]
    self.contents = {}  # page: its tokens, all before them, the next, version
    self.version = 0

  def holders(self, page):
    return sum(mine.count(page) for _, mine, _ in self.sequences)

  def write(self, ids, mine, version, first, lookahead):
    """What the engine would compute; rows are never written under others."""
    for i in range(first, len(mine)):
      assert self.holders(mine[i]) == 1
      end = (i + 1) * SIZE
      full = len(ids) >= end + lookahead
      content = tuple(ids[: end + lookahead]) if full else None
      self.contents[mine[i]] = (content, version)

  def check_found(self, ids, found, lookahead):
    for i, page in enumerate(found):
      wanted = tuple(ids[: (i + 1) * SIZE + lookahead])
      assert self.contents[page] == (wanted, self.version)

  def check(self):
    held = {page for _, mine, _ in self.sequences for page in mine}
    assert self.pages.available == self.pages.count - len(held)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_random_operations(lookahead):
  rng = random.Random(lookahead)
  pages = pages_lib.Pages(24, SIZE, lookahead=lookahead)
  model, hits = Model(pages), 0
  for step in range(10_000):
    kind = rng.choices("begin grow fork end forget".split(), (6, 6, 2, 7, 0.05))
    match kind[0]:
      case "begin":
        # Two tokens of three sequences: prefixes are shared all the time.
        ids = [rng.choice((0, 0, 0, 1)) for _ in range(rng.randrange(1, 30))]
        before = pages.available
        found = pages.find(ids, len(ids) - 1)
        assert len(found) * SIZE <= len(ids) - 1
        model.check_found(ids, found, lookahead)
        hits += len(found)
        new = pages.allocate(-(-len(ids) // SIZE) - len(found))
        if new is None:
          pages.release(found)
          assert pages.available == before
          continue
        assert all(model.holders(page) == 0 for page in new)
        assert len({*found, *new}) == len(found) + len(new)
        mine = found + new
        model.sequences.append((ids, mine, model.version))
        model.write(ids, mine, model.version, len(found), lookahead)
        if rng.random() < 0.8:  # or two compute the same at a time
          pages.register(ids, mine, len(found))
      case "grow" if model.sequences:
        i = rng.randrange(len(model.sequences))
        ids, mine, version = model.sequences[i]
        if model.holders(mine[-1]) > 1 and len(ids) % SIZE:
          continue  # the engine would have copied it
        longer = ids + [rng.choice((0, 0, 0, 1)) for _ in range(3)]
        new = pages.allocate(-(-len(longer) // SIZE) - len(mine))
        if new is None:
          continue
        assert all(model.holders(page) == 0 for page in new)
        first = max(0, (len(ids) - lookahead) // SIZE)
        while first < len(mine) and model.holders(mine[first]) > 1:
          first += 1
        mine = mine + new
        model.sequences[i] = (longer, mine, version)
        model.write(longer, mine, version, first, lookahead)
        pages.register(longer, mine, rng.choice((0, first)))
      case "fork" if model.sequences:
        ids, mine, version = rng.choice(model.sequences)
        full = len(ids) // SIZE
        if full and len(ids) % SIZE == 0 and not lookahead:
          pages.hold(mine)
          model.sequences.append((ids, list(mine), version))
      case "end" if model.sequences:
        i = rng.randrange(len(model.sequences))
        _, mine, _ = model.sequences.pop(i)
        pages.release(mine)
      case "forget":
        pages.forget()
        model.version += 1
    model.check()
    if step % 500 == 499:
      for _, mine, _ in model.sequences:
        pages.release(mine)
      model.sequences = []
      assert pages.available == 24
  assert hits > 700
  assert sorted(take(pages, 24)) == list(range(24))


def test_many_pages():
  """A sequence of 100,000 pages, the last ones one by one, and what takes all.

  If an operation looked at all pages, this would take hours.
  """
  pages = pages_lib.Pages(100_000, SIZE)
  ids = np.arange(400_000, dtype=np.int32)
  mine = take(pages, 98_000)
  pages.register(ids[: 98_000 * SIZE], mine, 0)
  for i in range(98_000, 100_000):
    mine += take(pages, 1)
    pages.register(ids[: (i + 1) * SIZE], mine, i)
  pages.release(mine)
  assert pages.find(ids, len(ids)) == mine
  pages.release(mine[50_000:])
  assert take(pages, 50_000) == mine[:49_999:-1]  # one by one, from the end
  assert pages.find(ids, len(ids)) == mine[:50_000]
