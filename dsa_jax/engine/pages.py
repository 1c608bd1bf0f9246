"""Pages of the engine's pool: who holds them, and what is found in them.

A page has room for `size` tokens. Sequences that begin alike share the full
pages of their beginning. These are found in a tree: a page's way from the root
spells the tokens that it and the pages before it hold, so that no two contents
are ever taken for each other.
"""

import collections
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
from typing import Annotated, Literal

from jaxtyping import Integer
import numpy as np

from dsa_jax import ranges

type Tokens = Sequence[int] | Integer[np.ndarray, " S"]


@dataclasses.dataclass(eq=False, slots=True)
class _Node:
  """Contents of one page, after those of its parents."""

  page: int  # that is found for it; -1 for the root
  parent: "_Node | None"
  content: bytes
  children: "dict[bytes, _Node]" = dataclasses.field(default_factory=dict)
  found: bool = True  # from the root; a page that has been taken is not


class Pages:
  """Pages of one pool: who holds them, and which prefixes they hold.

  A page is free, held (by one sequence or more), or cached: held by nobody, but
  found by its contents until its room is needed. Each operation takes a time
  proportional to the pages it is about; `forget`, to all of them.
  """

  def __init__(self, count: int, size: int, *, lookahead: int = 0):
    """Makes `count` free pages.

    Args:
      count: Pages of the pool.
      size: Tokens of a page.
      lookahead: How many of the tokens after a page its rows depend on: 1, if
        the MTP layer has its rows there, which reads each next token.
    """
    positive = Annotated[int, ranges.Interval(1, 2**31 - 1)]
    ranges.require("Pages: count", count, positive)
    ranges.require("Pages: size", size, positive)
    ranges.require("Pages: lookahead", lookahead, Literal[0, 1])
    self.count = count
    self.size = size
    self._lookahead = lookahead
    self._holders = [0] * count
    # What a page is known to contain. Another page may be the node's: two
    # sequences have computed the same at the same time.
    self._nodes: list[_Node | None] = [None] * count
    self._root = _Node(-1, None, b"")
    self._free = list(reversed(range(count)))  # the next one last
    # An ordered set, the next one first; a dict finds its first one slowly.
    self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
    self._stale: set[int] = set()  # held since before `forget`

  @property
  def available(self) -> int:
    """Pages that can be allocated now."""
    return len(self._free) + len(self._cached)

  def allocate(self, count: int) -> list[int] | None:
    """Returns pages that nobody else holds, or None if there are too few.

    Cached pages are taken when no free ones are left, the least recently used
    first. What lies beyond them in the tree could not be found any more, and is
    forgotten, too.
    """
    ranges.require("Pages.allocate: count", count, ranges.Index)
    if count > self.available:
      return None
    pages = []
    for _ in range(count):
      if not self._free:
        node = self._nodes[next(iter(self._cached))]
        assert node is not None
        self._unregister(node)
      page = self._free.pop()
      self._holders[page] = 1
      pages.append(page)
    return pages

  def find(self, tokens: Tokens, limit: int) -> list[int]:
    """Returns the pages that hold the longest known beginning of `tokens`.

    The caller holds them from now on, with those who hold them already.

    Args:
      tokens: A sequence from its beginning.
      limit: The pages cover at most this many of its tokens.
    """
    node, pages = self._root, []
    contents = self._contents(tokens, 0)
    for _, content in zip(range(limit // self.size), contents, strict=False):
      node = node.children.get(content)
      if node is None:
        break
      pages.append(node.page)
    for page in pages:
      self._cached.pop(page, None)
      self._holders[page] += 1
    return pages

  def register(self, tokens: Tokens, pages: list[int], first: int) -> None:
    """Lets full pages of a sequence be found, from the `first`-th on.

    A page whose contents another one has already stays as it is: not to be
    found. So do pages after one that cannot be found, and those of which a part
    was computed before `forget`.

    Args:
      tokens: The sequence from its beginning. Every row of a full page must
        have been computed.
      pages: Its pages, held by the caller: the i-th has the tokens from
        `i * size` on.
      first: Pages before this one have been registered, or found.
    """
    for page in pages[first:]:
      self._require_held(page, "register")
    parent = self._nodes[pages[first - 1]] if first else self._root
    for page, content in zip(
      pages[first:], self._contents(tokens, first), strict=False
    ):
      if parent is None or not parent.found or page in self._stale:
        return
      node = self._nodes[page]
      if node is None or not node.found:
        new = _Node(page, parent, content)
        node = self._nodes[page] = parent.children.setdefault(content, new)
      parent = node

  def hold(self, pages: list[int]) -> None:
    """Adds a holder to pages that are held already."""
    for page in pages:
      self._require_held(page, "hold")
      self._holders[page] += 1

  def release(self, pages: list[int]) -> None:
    """Takes a holder from each page.

    Of those that nobody holds now, the ones that can be found are cached, and
    the others are free.
    """
    # In a cache that is full, the end of a sequence goes before its beginning.
    for page in reversed(pages):
      self._require_held(page, "release")
      self._holders[page] -= 1
      if self._holders[page]:
        continue
      node = self._nodes[page]
      if node is not None and node.page == page:
        self._cached[page] = None
      else:
        self._nodes[page] = None
        self._stale.discard(page)
        self._free.append(page)

  def forget(self) -> None:
    """Lets nothing be found that was computed until now: the weights change.

    Pages stay with their holders, but they cannot be registered any more.
    """
    self._free += self._cached
    self._cached.clear()
    self._nodes = [None] * self.count
    self._root = _Node(-1, None, b"")
    self._stale.update(i for i, n in enumerate(self._holders) if n)

  def _contents(self, tokens: Tokens, first: int) -> Iterator[bytes]:
    """Of each full page from the `first`-th on, the tokens it depends on."""
    ids_S = np.asarray(tokens[first * self.size :], np.int32)
    end = self.size + self._lookahead
    while len(ids_S) >= end:
      yield ids_S[:end].tobytes()
      ids_S = ids_S[self.size :]

  def _unregister(self, top: _Node) -> None:
    """Removes a node and all below it; pages that were cached become free."""
    assert top.parent is not None
    del top.parent.children[top.content]
    nodes = [top]
    while nodes:
      node = nodes.pop()
      nodes += node.children.values()
      node.found = False
      self._nodes[node.page] = None
      if node.page in self._cached:
        del self._cached[node.page]
        self._free.append(node.page)

  def _require_held(self, page: int, name: str) -> None:
    if not 0 <= page < self.count or not self._holders[page]:
      raise ValueError(
        f"Pages.{name}: nobody holds {page=} of {self.count}; allocate or find "
        "it first, and release it once a holder."
      )
